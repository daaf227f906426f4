"""From records to a decision."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from record_samples import document, timing
from scipy import stats
from typer.testing import CliRunner

import effivlm
from effivlm.cli import USER_ERROR, app
from effivlm.errors import EffivlmError
from effivlm.metrics.losses import loss_of, within
from effivlm.metrics.performance import MetricError
from effivlm.recommendation import RecommendError, choose, look
from effivlm.recommendation.target import parse_target
from effivlm.recommendation.text import lines, plain
from effivlm.report.rows import rows_of

DOCUMENTS = 400


def answers(setting, wrong, share, model="tiny", documents=DOCUMENTS, seed=0):
    """``wrong`` documents of the first ones lost; the original has all right but the last fifth."""
    order = random.Random(seed).sample(range(4 * documents // 5), wrong)
    return [
        document(
            i,
            setting,
            score=float(i < 4 * documents // 5 and i not in order),
            share=share,
            model=model,
        )
        for i in range(documents)
    ]


def records(model="tiny", **settings):
    out = answers("none", 0, 1.0, model)
    for name, (wrong, share) in settings.items():
        out += answers(name, wrong, share, model)
    return out


def asked(target="visual=0.5x", drop=2.0, timings=(), predict=None, confidence=0.95, **settings):
    target = parse_target(target)
    looked = look(rows_of(records(**settings), timings), timings, target, predict)
    return choose(looked, target, drop, confidence)


def names(choices):
    return [c.setting for c in choices]


def reasons(advice):
    return {r.setting: r.reason for r in advice.refused}


SOME = {
    "good@0.3": (0, 0.3),  # nothing lost
    "worse@0.3": (1, 0.3),  # as dear, a little worse
    "cheap@0.1": (6, 0.1),  # 1.5 points of 400 documents: open
    "bad@0.1": (80, 0.1),  # 20 points
    "dear@0.9": (0, 0.9),
}


def test_an_answer():
    advice = asked(**SOME)
    assert names(advice.certain) == ["good@0.3"] and names(advice.open) == ["cheap@0.1"]
    assert reasons(advice) == {
        "worse@0.3": "off the front",
        "bad@0.1": "loses",
        "dear@0.9": "dear",
    }
    assert advice.counts() == {"dear": 1, "loses": 1, "off the front": 1}
    assert advice.considered == 5
    (good,), (cheap,) = advice.certain, advice.open
    assert good.low > -2 and good.difference == 0 and good.needed == 0
    assert cheap.low < -2 < cheap.difference and cheap.needed > cheap.documents == DOCUMENTS
    told = "\n".join(lines(advice, every=True))
    assert 'use it: with effivlm.compress(model, "good@0.3"):' in told
    assert "no promise:\n    cheap@0.1" in told and "bad@0.1: at least" in told
    assert "counted in the tensors" in told and "would decide for cheap@0.1" in told
    data = json.loads(json.dumps(plain(advice), allow_nan=False))
    assert data["certain"][0]["code"].startswith("with effivlm.compress(")
    assert len(data["ruled_out"]) == 3


def test_a_larger_drop_decides_and_nothing_is_left_of_a_hard_target():
    assert names(asked(drop=5.0, **SOME).certain) == ["good@0.3", "cheap@0.1"]
    advice = asked("visual=0.05x", **SOME)
    assert not advice.certain and not advice.open and set(reasons(advice).values()) == {"dear"}
    assert "none of 5 settings" in "\n".join(lines(advice))


def test_what_is_certain_rules_out_what_is_open_and_no_better():
    advice = asked(**{"good@0.3": (0, 0.3), "poor@0.4": (6, 0.4), "poor@0.1": (7, 0.1)})
    assert names(advice.open) == ["poor@0.1"] and reasons(advice) == {"poor@0.4": "off the front"}
    # what is open, and seems better, does not rule out what is certain
    drop = 3.0
    seems = {"sure@0.3": (1, 0.3), "seems@0.2": (0, 0.2)}
    target = parse_target("visual=0.5x")
    (looked,) = look(rows_of(records(**seems)), (), target)
    unsure = looked.losses["seems@0.2"]
    looked.losses["seems@0.2"] = replace(unsure, spread=unsure.spread._replace(error=0.2))
    advice = choose([looked], target, drop)
    assert names(advice.certain) == ["sure@0.3"] and names(advice.open) == ["seems@0.2"]


def test_five_settings_at_most():
    many = {f"m@0.{9 - i}": (3 * i, (9 - i) / 10) for i in range(8)}
    advice = asked("visual=0.95x", drop=20.0, **many)
    assert len(advice.certain) == 5
    assert list(reasons(advice).values()) == ["beyond"] * 3


def test_bounds_are_those_of_the_tables_at_the_same_confidence():
    rows = rows_of(records(**SOME))
    for row in rows[1:]:
        loss, decision = loss_of(row.pairs), row.comparison.decision
        assert loss.value == pytest.approx(decision.difference.value)
        assert loss.low(0.975) == pytest.approx(decision.difference.low)
        assert loss.high(0.975) == pytest.approx(decision.difference.high)
        assert max(0.0, -loss.low(0.95)) == pytest.approx(decision.at_most)


def test_all_statements_together_are_holms():
    """Against Holm's procedure on p-values, from scipy's t."""
    rng = np.random.default_rng(0)
    base = answers("none", 0, 1.0)
    losses = {}
    for i in range(12):
        mine = answers(f"s{i}", int(rng.integers(0, 10)), 0.5, seed=i)
        losses[f"s{i}"] = [loss_of(list(zip(mine, base, strict=True)))]
    p = {
        s: float(stats.t.sf((x.spread.centre + 0.02) / x.spread.error, x.spread.freedom))
        for s, (x,) in losses.items()
    }
    expected = set()
    for rank, s in enumerate(sorted(p, key=p.__getitem__)):
        if p[s] >= 0.05 / (len(p) - rank):
            break
        expected.add(s)
    found, _ = within(losses, 2.0, 0.95)
    assert set(found) == expected and 0 < len(expected) < len(p)
    # a setting that stands alone needs less
    single = {s for s, x in p.items() if x < 0.05}
    assert single > expected


def test_so_many_documents_do_decide():
    """The number that is called enough shows it, where the difference is what was observed."""
    (cheap,) = asked(drop=2.4, **{"cheap@0.1": (6, 0.1)}).open
    factor = int(np.ceil(cheap.needed / DOCUMENTS))
    assert 1 < factor < 5
    more = answers("none", 0, 1.0, documents=DOCUMENTS * factor)
    more += answers("cheap@0.1", 6 * factor, 0.1, documents=DOCUMENTS * factor)
    target = parse_target("visual=0.5x")
    (looked,) = look(rows_of(more), (), target)
    error = 100 * looked.losses["cheap@0.1"].spread.error
    reach = (stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) * error  # of so many documents
    assert reach == pytest.approx(0.9 * (cheap.needed / DOCUMENTS / factor) ** 0.5, rel=0.1)
    assert names(choose([looked], target, 2.4).certain) == ["cheap@0.1"]


def timed(setting, ttft, workload="effivlm-bench", rounds=6, **more):
    return [
        timing(i, setting, ttft * (1 + 0.01 * i), workload=workload, **more) for i in range(rounds)
    ]


def test_what_was_timed_decides_and_what_was_not_is_said():
    timings = timed("none", 0.2) + timed("good@0.3", 0.09) + timed("worse@0.3", 0.15)
    timings += timed("dear@0.9", 0.05, correct=False)
    advice = asked("ttft=0.5x", timings=timings, **SOME)
    assert names(advice.certain) == ["good@0.3"] and advice.costs.startswith("measured")
    assert advice.certain[0].cost.share == pytest.approx(0.45)
    found = {r.setting: (r.reason, r.found) for r in advice.refused}
    assert found["worse@0.3"][0] == "dear" and found["cheap@0.1"] == (
        "unknown cost",
        "it was not timed",
    )
    assert found["dear@0.9"][0] == "unknown cost" and "correctness" in found["dear@0.9"][1]
    assert "more timings: 3 settings" in "\n".join(lines(advice))
    # a second workload on which it is slow
    timings += timed("none", 0.2, "caption") + timed("good@0.3", 0.19, "caption")
    assert reasons(asked("ttft=0.5x", timings=timings, **SOME))["good@0.3"] == "dear"


def test_predicted_where_nothing_was_timed_and_counted_else():
    def predict(model, settings, what):
        assert (model, what) == ("tiny", "memory")
        return dict.fromkeys(settings, 0.4) | {"good@0.3": "no budget"}

    advice = asked("memory=0.6x", predict=predict, **SOME)
    assert advice.costs.startswith("predicted") and reasons(advice)["good@0.3"] == "unknown cost"
    assert "standing for" in asked("ttft=0.5x", **SOME).costs
    with pytest.raises(RecommendError, match=r"not measured.*--device h200.*kv=0\.6x"):
        asked("memory=0.6x", **SOME)
    memory = [
        timing(i, s, memory={"allocated": m})
        for i in range(3)
        for s, m in (("none", 10), ("good@0.3", 4))
    ]
    assert asked("memory=0.6x", timings=memory, **SOME).certain[0].cost.share == 0.4


def test_several_models_jointly():
    target = parse_target("visual=0.5x")
    found = records("one", **SOME) + records("two", **(SOME | {"good@0.3": (80, 0.3)}))
    looked = look(rows_of(found), (), target)
    one, two = (choose([x], target, 2.0) for x in looked)
    assert names(one.certain) == ["good@0.3"] and reasons(two)["good@0.3"] == "loses"
    joint = choose(looked, target, 2.0)
    assert joint.models == ("one", "two") and reasons(joint)["good@0.3"] == "loses"
    assert "good@0.3" not in names(joint.certain)


def test_a_confidence_has_its_price():
    strict = asked(drop=2.6, confidence=0.9999, **SOME)
    lax = asked(drop=2.6, confidence=0.5, **SOME)
    assert names(strict.certain) == ["good@0.3"] and set(names(lax.certain)) > {"good@0.3"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttft", "AXIS=SHARE"),
        ("speed=0.5x", "unknown axis"),
        ("ttft=2x", "at most 1"),
        ("ttft=0", "above 0"),
        ("ttft=half", "above 0"),
        ("ttft=-0.5", "above 0"),
    ],
)
def test_bad_targets(text, said):
    with pytest.raises(RecommendError, match=re.escape(said)):
        parse_target(text)


def test_targets_have_one_form():
    assert parse_target("ttft=50%") == parse_target(" ttft = .5x ") == parse_target("ttft=0.5")


@pytest.mark.parametrize(
    ("drop", "confidence"), [(0, 0.95), (-1, 0.95), (float("nan"), 0.95), (2, 1), (2, 0.2)]
)
def test_bad_promises(drop, confidence):
    with pytest.raises(RecommendError):
        asked(drop=drop, confidence=confidence, **SOME)


def test_without_none_or_with_none_alone():
    with pytest.raises(MetricError, match="'none'"):
        look(rows_of(records(**SOME))[1:], (), parse_target("kv=1"))
    with pytest.raises(RecommendError, match="nothing to choose"):
        asked()


def test_the_shape_in_a_models_name(monkeypatch):
    from effivlm.measure import shares
    from effivlm.measure.shares import UnknownShape, predicted_shares, shape_of

    monkeypatch.setattr(shares, "WORKLOAD", "uniprunebench")  # one picture instead of many
    assert shape_of("Qwen/Qwen2-VL-7B-Instruct") == "qwen2-vl-7b"
    with pytest.raises(UnknownShape, match="mini-qwen2-vl cannot be predicted"):
        shape_of("mini-qwen2-vl")
    told = predicted_shares("llava-onevision-0.5b", ["divprune@0.1", "wanda@0.5"], "ttft", "h200")
    assert 0 < told["divprune@0.1"] < 1 and "measure it" in told["wanda@0.5"]


@pytest.fixture
def folder(tmp_path):
    """A run's folder with the records of `SOME`."""
    from dataclasses import asdict

    (tmp_path / "experiment.yaml").write_text(f"settings: {json.dumps(['none', *SOME])}\n")
    by_setting = {}
    for r in records(**SOME):
        by_setting.setdefault(r.setting, []).append(json.dumps(asdict(r)))
    for i, found in enumerate(by_setting.values()):
        home = tmp_path / "records" / "tiny" / str(i)
        home.mkdir(parents=True)
        (home / "colour.jsonl").write_text("\n".join(found) + "\n")
    return tmp_path


def test_the_command_line_and_the_public_name(folder):
    said = CliRunner().invoke(app, ["recommend", str(folder), "--target", "visual=0.5x", "--json"])
    assert said.exit_code == 0, said.output
    data = json.loads(said.output)
    assert data["joint"] is None and data["each"][0]["certain"][0]["setting"] == "good@0.3"
    found = effivlm.recommend(folder, target="visual=0.5x")
    assert found.as_dict() == data and isinstance(found, effivlm.Recommendation)
    twice = effivlm.recommend(folder, folder, target="visual=0.5x")
    assert twice.joint and twice.joint.models == ("tiny", f"tiny ({folder})")
    for wrong in (
        ["total=0.5x"],
        ["foo=1"],
        ["kv=0.5x", "--max-drop", "0"],
        ["ttft=0.5", "--device", "h900"],
    ):
        said = CliRunner().invoke(app, ["recommend", str(folder), "--target", *wrong])
        assert said.exit_code == USER_ERROR and "error:" in said.output, said.output
    with pytest.raises(EffivlmError, match=r"no experiment\.yaml|no records"):
        effivlm.recommend(folder / "missing", target="kv=0.5x")
