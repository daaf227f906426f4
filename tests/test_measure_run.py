"""Interleaved rounds, records that pair, floors and predictions against what the audit counts."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from record_samples import document, timing

from effivlm import registry
from effivlm.cli import app
from effivlm.config import ConfigError, MeasureSpec, build_experiment
from effivlm.experiment import run
from effivlm.families.loading import load
from effivlm.measure import workloads
from effivlm.measure.busy import Watch
from effivlm.measure.peaks import measured, stated
from effivlm.measure.predict import Predictor, table
from effivlm.measure.roofline import Peaks, TextShape, VisionShape, Work, segments_of
from effivlm.measure.run import Case, interleaved, measure
from effivlm.measure.timing import Timer
from effivlm.metrics.efficiency import speedup
from effivlm.records import StoreError, read_timings
from effivlm.report.rows import rows_of
from effivlm.report.speed import markdown, write_speed
from effivlm.report.speed_figures import quality_against_speed
from effivlm.setting import parse_setting

torch.set_num_threads(1)


def experiment(**measure):
    spec = {"workload": "tasks", "repeats": 3, "warmup": 0, "seconds": 60, **measure}
    return build_experiment(
        {
            "name": "t",
            "models": [{"name": "zoo:mini-qwen2-vl"}],
            "settings": ["visionzip@0.2", "snapkv@0.2"],
            "tasks": [{"name": "exist", "documents": 2}],
            "measure": spec,
        },
        "test",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    result = measure(experiment(), root)
    assert result.recorded == 9 and not result.failed
    return root


def test_records_pair_and_sum(folder):
    timings = read_timings(folder / "t")
    groups = {
        s: [t for t in timings if t.setting == s] for s in ("none", "visionzip@0.2", "snapkv@0.2")
    }
    assert all([t.sample for t in g] == [0, 1, 2] for g in groups.values())
    stages = ("media", "vision", "method", "prefill", "decode")
    sums = [sum(t.seconds[k] for k in stages) / t.seconds["total"] for t in timings]
    assert 0.98 <= np.median(sums) <= 1.0001, sums
    for t in timings:
        assert t.correct and t.workload == "exist" and t.model == "mini-qwen2-vl"
        assert set(t.memory) == {"resident", "kv", "weights"}
    found = speedup(groups["snapkv@0.2"], groups["none"], "total")
    assert found.pairs == 3 and found.low <= found.ratio <= found.high
    assert groups["snapkv@0.2"][0].memory["kv"] < 0.3 * groups["none"][0].memory["kv"]


def test_an_interrupted_measurement_goes_on(folder, tmp_path):
    done = measure(experiment(), folder)
    assert (done.recorded, done.found) == (0, 9)  # nothing to do
    shutil.copytree(folder / "t", tmp_path / "t")
    file = tmp_path / "t" / "timings" / "exist.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:6]))
    done = measure(experiment(), tmp_path)
    assert (done.recorded, done.found) == (3, 6)
    again = read_timings(tmp_path / "t")
    assert [t.sample for t in again] == [0] * 3 + [1] * 3 + [2] * 3
    file.write_text("".join(lines[:5]))
    with pytest.raises(StoreError, match="round 1 of mini-qwen2-vl is not whole"):
        measure(experiment(), tmp_path)


def test_tables(folder):
    path, picture = write_speed(folder / "t")
    text = path.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "visionzip@0.2" in text and "TTFT speed-up" in text and "floor / time" in text
    floors = json.loads((folder / "t" / "timings" / "exist.json").read_text())["mini-qwen2-vl"][
        "settings"
    ]
    assert 0 < floors["visionzip@0.2"]["floor"]["prefill"] < floors["none"]["floor"]["prefill"]
    assert (
        floors["snapkv@0.2"]["floor"]["decode_per_token"]
        < floors["none"]["floor"]["decode_per_token"]
    )
    assert len(floors["snapkv@0.2"]["kv_bytes_per_layer"]) == len(
        floors["snapkv@0.2"]["account"]["kv_per_layer"]
    )


def test_quality_against_speed_where_both_were_measured(tmp_path):
    settings = ("none", "visionzip@0.2")
    records = [
        document(i, s, score=float(i % 2 or s == "none")) for s in settings for i in range(6)
    ]
    timings = [
        timing(i, s, total=1.0 if s == "none" else 0.5 + i / 100)
        for s in settings
        for i in range(4)
    ]
    rows, path = rows_of(records, timings), tmp_path / "x.png"
    assert quality_against_speed(rows, "effivlm-bench", path) and path.read_bytes().startswith(
        b"\x89PNG"
    )
    assert (
        not quality_against_speed(rows_of(records), "effivlm-bench", tmp_path / "y.png")
        and not (tmp_path / "y.png").exists()
    )


def test_published_ratios_stand_beside_ours():
    timings = [
        timing(i, s, workload="polymorphic") for s in ("none", "visionzip@64") for i in range(3)
    ]
    text = markdown(timings, {})
    assert "Published: Polymorphic, Table 4" in text and "2.28x" in text and "8.80x" in text
    row = {
        "floor": dict.fromkeys(("prefill", "ttft", "decode_per_token"), 1.0),
        "predicted": {"ttft": 1.0, "total": 1.0},
    }
    facts = {
        "peaks": dataclasses.asdict(stated("h200")),
        "new_tokens": 2,
        "settings": {"none": row, "visionzip@64": row},
    }
    assert (
        "below their floor" in markdown(timings, {"tiny": facts})
        and "below their floor" not in text
    )
    wrong = [dataclasses.replace(t, correct=t.setting == "none") for t in timings]
    assert "no speed-up" in markdown(wrong, {}) and "failed its correctness check" in markdown(
        wrong, {}
    )


def test_no_section_and_unknown_workload(tmp_path):
    with pytest.raises(ConfigError, match="no section 'measure'"):
        measure(experiment().model_copy(update={"measure": None}), tmp_path)
    with pytest.raises(ConfigError, match="did you mean effivlm-bench"):
        measure(experiment(workload="effivlm-bnch"), tmp_path)


def test_a_setting_that_fails_is_named_and_the_others_are_timed(tmp_path, monkeypatch):
    once = Timer.once

    def broken(self, make, n):
        if str(self.session.setting) == "snapkv@0.2":
            raise RuntimeError("planted")
        return once(self, make, n)

    monkeypatch.setattr(Timer, "once", broken)
    result = measure(experiment(), tmp_path)
    assert (
        list(result.failed) == ["mini-qwen2-vl, exist, snapkv@0.2"]
        and "planted" in result.failed["mini-qwen2-vl, exist, snapkv@0.2"]
    )
    assert {t.setting for t in read_timings(tmp_path / "t")} == {"none", "visionzip@0.2"}


def test_tasks_may_be_left_out_only_for_a_fixed_workload(tmp_path):
    data = {
        "name": "t",
        "models": [{"name": "zoo:mini-qwen2-vl"}],
        "settings": ["fastv@0.2"],
        "measure": {"workload": "plphp"},
    }
    only = build_experiment(data, "test")
    with pytest.raises(ConfigError, match="can be measured but not run"):
        run(only, tmp_path)
    for measure_section in (None, {"workload": "tasks"}):
        with pytest.raises(ConfigError, match="tasks"):
            build_experiment({**data, "measure": measure_section}, "test")


def test_rounds_alternate_and_stop_in_time():
    model, inputs, ran = tiny.build("llava"), tiny.prompt("llava"), []

    class Spy(Timer):
        def once(self, make, n):
            ran.append(str(self.session.setting))
            timed = super().once(make, n)
            return dataclasses.replace(timed, seconds={**timed.seconds, "total": 1.0})

    settings = [parse_setting(s) for s in ("none", "random_pre@0.5", "snapkv@0.5")]
    timers, case = {s: Spy(model, s) for s in settings}, Case("x", [lambda: inputs], 2)
    rounds = list(interleaved(timers, case, MeasureSpec(repeats=9, seconds=3)))
    assert len(rounds) == 3 and all(list(r) == settings for r in rounds)
    names = [str(s) for s in settings]
    assert ran == names + names[::-1] + names
    assert (
        len(list(interleaved(timers, case, MeasureSpec(repeats=9, seconds=0.5)))) == 2
    )  # a pair is the least


def test_the_same_work_measured_twice_has_the_ratio_one():
    """Two settings that keep everything, interleaved; `benchmarks/speed_agreement.py` compares runs with intervals."""
    model, inputs = tiny.build("llava"), tiny.prompt("llava")
    settings = [parse_setting(s) for s in ("fastv@1.0", "divprune@1.0")]
    rounds = list(
        interleaved(
            {s: Timer(model, s) for s in settings},
            Case("x", [lambda: inputs], 2),
            MeasureSpec(repeats=15),
        )
    )
    ratios = [r[settings[0]][0].seconds["ttft"] / r[settings[1]][0].seconds["ttft"] for r in rounds]
    assert 0.75 < np.median(ratios) < 1.33, ratios


EXACT = (
    "none",
    "divprune@0.5",
    "random_pre@7",
    "fastv@0.5",
    "snapkv@0.3",
    "pyramidkv@0.4",
    "pyramiddrop@0.6",
    "vl_cache@0.3",
    "divprune@0.5 + fastv@0.5",
    "visionzip@0.5 + pyramiddrop@0.5 + snapkv@0.5",
)


@pytest.mark.parametrize("family", ("llava", "llava_next", "qwen2_5_vl", "internvl"))
def test_counts_from_budgets_are_the_audited_ones(family):
    model, inputs = tiny.build(family), tiny.prompt(family)
    predictor = Predictor(model, registry.families()[family], inputs, 3, 4)
    for text in (*EXACT, "tome@0.5"):
        setting = parse_setting(text)
        told, timed = predictor.counts(setting), Timer(model, setting).once(lambda: inputs, 2)
        if text in EXACT:
            assert told.tokens == timed.account.tokens_per_layer, text
            assert sum(told.kv) == pytest.approx(sum(timed.account.kv_per_layer)), text
        else:
            assert all(
                a <= b <= 1.15 * a
                for a, b in zip(timed.account.tokens_per_layer, told.tokens, strict=True)
            ), text
    assert (
        predictor.predict(parse_setting("none"), stated("h200")).kv
        == Timer(model, parse_setting("none")).once(lambda: inputs, 2).memory["kv"]
    )


def test_a_batch_is_its_prompt_so_many_times():
    model, family, peaks = tiny.build("llava"), registry.families()["llava"], stated("h200")
    one = Predictor(model, family, tiny.prompt("llava"), 3, 4)
    four = Predictor(model, family, tiny.batch("llava", *[tiny.prompt("llava")] * 4), 3, 4)
    assert one.batched(4).predict(parse_setting("snapkv@0.5"), peaks) == four.predict(
        parse_setting("snapkv@0.5"), peaks
    )


def test_a_rule_of_its_own_cannot_be_predicted():
    model, inputs = tiny.build("llava"), tiny.prompt("llava")
    with pytest.raises(ValueError, match="decides while it runs"):
        Predictor(model, registry.families()["llava"], inputs, 3, 4).counts(parse_setting("plphp"))


@pytest.mark.parametrize("family", ("llava", "llava_next", "qwen2_vl", "internvl"))
def test_operations_are_those_of_torch(family):
    """Dense products counted by torch's own counter, on the whole prompt."""
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs, f = (
        tiny.build(family, attn="eager"),
        tiny.prompt(family),
        registry.families()[family],
    )
    n = inputs["input_ids"].shape[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model.get_image_features(
            **{
                k: v
                for k, v in inputs.items()
                if k in ("pixel_values", "image_sizes", "image_grid_thw")
            }
        )
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    mine = VisionShape.of(model, f).work(segments_of(model, f, inputs), visual, 4)
    assert mine.flops == pytest.approx(
        counter.get_total_flops(), rel=0.25
    )  # newline tokens, all-patch projectors
    shape = TextShape.of(model.get_decoder().config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_decoder()(inputs_embeds=torch.zeros(1, n, shape.hidden), use_cache=False)
    dense = shape.prefill_flops([n] * shape.layers) - 2 * shape.hidden * shape.vocab
    causal = (
        shape.layers * 2 * n * n * shape.heads * shape.head_dim
    )  # eager computes the masked half too
    assert dense + causal == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_floors():
    assert (
        Work(2e12, 1e9).floor(Peaks("x", 1e12, 1e12)) == 2
        and Work(1e6, 3e12).floor(Peaks("x", 1e12, 1e12)) == 3
    )
    shape = TextShape(2, 8, 16, 4, 2, 2, 10)
    weights = 2 * (8 * 2 * (8 + 4) + 3 * 8 * 16) + 80
    assert shape.weights == weights and shape.kv_entry(2) == 16
    assert shape.decode_work([5.0, 7.0], 4, 2, batch=3).bytes == weights * 2 + 3 * (12 + 2 * 2) * 16
    assert shape.prefill_work([5, 5], 2).bytes == weights * 2 + 10 * 16
    peaks = measured(torch.device("cpu"), torch.float32, repeats=1)
    assert 1e8 < peaks.flops < 1e14 and 1e8 < peaks.bandwidth < 1e13


@pytest.mark.parametrize(
    ("name", "active"), [("qwen3-vl-30b-a3b", 3.0e9), ("glm-4.5v-106b-a12b", 12.0e9)]
)
def test_of_experts_a_token_is_counted_with_the_active_ones(name, active):
    """One token reads what the model's name says; many tokens read every matrix there is."""
    model = load(name, device="meta", random_weights=True).model
    text = model.get_decoder()
    shape = TextShape.of(text.config)
    held = sum(p.numel() for p in text.layers.parameters() if p.ndim > 1)
    head = shape.hidden * shape.vocab
    assert shape.weights == pytest.approx(active, rel=0.08)
    assert shape.read(10**4) - head == pytest.approx(held, rel=1e-9)
    assert shape.decode_work([100] * shape.layers, 1, 2, batch=8).bytes < 2 * 8 * shape.weights


def test_windows_bound_what_a_layer_reads_and_multiplies():
    whole = TextShape(2, 8, 16, 4, 2, 2, 10)
    half = TextShape(2, 8, 16, 4, 2, 2, 10, windows=(3, None))
    pairs = sum(min(i + 1, 3) for i in range(9))  # of nine queries, in the first layer
    gone = 2 * 4 * 2 * (9 * 9 - 2 * pairs) + 2 * 4 * 2 * 3  # the triangle counts half its diagonal
    assert whole.prefill_flops([9, 9]) - half.prefill_flops([9, 9]) == gone
    assert whole.decode_work([9, 9], 0, 2).bytes - half.decode_work([9, 9], 0, 2).bytes == 6 * 16


@pytest.mark.parametrize(
    "shape", ("llava-1.5-7b", "llava-onevision-7b", "qwen2-vl-7b", "internvl3-8b")
)
@pytest.mark.parametrize(
    "name", sorted(set(workloads.WORKLOADS) - {"serving"})
)  # its prompt is that of effivlm-bench
def test_workloads_have_their_length(shape, name):
    loaded, work = load(shape, random_weights=True, device="meta"), workloads.workload(name)
    batch = 2 if name == "polymorphic" else 1
    inputs = workloads.prompts(
        work, loaded.family, loaded.model.config, batch, workloads.image_sizes(shape)
    )
    length = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"][0] == loaded.model.config.image_token_id).sum())
    assert inputs["input_ids"].shape[0] == batch
    assert (
        length == work.prompt
        if work.prompt
        else length == visual + work.text + 2 * len(_runs(inputs, loaded))
    )
    assert visual > 0.8 * (work.prompt or 0)


def _runs(inputs, loaded):
    ids = (inputs["input_ids"][0] == loaded.model.config.image_token_id).long()
    return ((ids.diff() == 1).nonzero()).tolist()


def test_predict_needs_no_weights():
    lines = table("llava-1.5-7b", ["visionzip@64"], "h200", "polymorphic")
    assert "2.7" in lines[2] and "KV 57 MiB" in lines[2]
    serving = table("qwen2-vl-7b", ["snapkv@0.1"], "h100-sxm", "serving")
    assert any("largest batch" in x for x in serving)


@pytest.mark.parametrize(
    ("busy", "own", "note"), ((9.0, 9.0, ""), (19.0, 9.0, "others used 1.0 of"), (None, 9.0, None))
)
def test_busy_machine_is_noted(monkeypatch, busy, own, note):
    """Readings of (clock, CPU seconds of all processes, CPU seconds of ours), ten seconds apart."""
    readings = iter([(0.0, 0.0 if busy is not None else None, 0.0), (10.0, busy, own)])
    monkeypatch.setattr(Watch, "_read", staticmethod(lambda: next(readings)))
    monkeypatch.setattr("os.getloadavg", lambda: (torch.get_num_threads() + 2.0, 0.0, 0.0))
    found = Watch().note()
    assert found == "" if note == "" else (note or "load 2.0 above ours") in found, found


def test_cli(tmp_path):
    from typer.testing import CliRunner

    file = tmp_path / "e.yaml"
    file.write_text(
        "name: t\nmodels: [{name: 'zoo:mini-qwen2-vl'}]\nsettings: [fastv@0.2]\ntasks: [{name: exist, documents: 1}]\n"
        "measure: {workload: tasks, repeats: 2, warmup: 0}\n"
    )
    done = CliRunner().invoke(app, ["measure", str(file), "--root", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (
        "TTFT speed-up" in done.output and (tmp_path / "t" / "report" / "speed_exist.md").exists()
    )
    told = CliRunner().invoke(
        app, ["predict", "llava-1.5-7b", "visionzip@64", "--workload", "polymorphic"]
    )
    assert told.exit_code == 0 and "visionzip@64" in told.output
    assert (
        CliRunner()
        .invoke(app, ["predict", "llava-1.5-7b", "visionzip@64", "--device", "h20"])
        .exit_code
        == 2
    )
