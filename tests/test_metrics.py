"""Metrics against published numbers, slow obvious twins, and what statistics promise (coverage, level)."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from record_samples import document, timing

from effivlm.metrics import papers
from effivlm.metrics.efficiency import speedup
from effivlm.metrics.front import pareto
from effivlm.metrics.generalization import generalization
from effivlm.metrics.loyalty import agreements, loyalty
from effivlm.metrics.paired import holm, paired_test
from effivlm.metrics.performance import (
    MetricError,
    overall,
    pairs_of,
    task_score,
    values,
)
from effivlm.reference import published

ERROR = {"type": "MediaError", "message": "cannot read"}


# ---- OP, OG -------------------------------------------------------------------------------------------------------------


def test_op_reproduces_every_row_of_effivlm_bench_table_1():
    rows: dict = {}
    for r in published("EffiVLM-Bench", 1):
        rows.setdefault((r.model, r.method, r.setting), {})[r.benchmark] = r.value
    assert len(rows) == 30 and all(len(r) == 16 for r in rows.values())
    off = {}
    for (model, method, setting), printed in rows.items():
        original = {t: v for t, v in rows[model, "Original", "100%"].items() if t != "OP"}
        ours = overall({t: v for t, v in printed.items() if t != "OP"}, original) / 100
        if abs(ours - printed["OP"]) > 0.005:
            off[model, method, setting] = round(ours - printed["OP"], 3)
    assert off == {
        ("InternVL2.5-38B", "PruMerge+", "10%"): 0.01,
        ("InternVL2.5-38B", "PruMerge+", "40%"): 0.014,
    }


def test_published_names_what_there_is():
    assert {r.metric for r in published("Polymorphic", 4)} == {
        "prefill_ms",
        "decode_ms",
        "prefill_speedup",
    }
    with pytest.raises(
        KeyError, match=r"no published table 'EffiVLM' 1: expected one of EffiVLM-Bench 1,"
    ):
        published("EffiVLM", 1)


def test_op_by_hand_and_its_errors():
    assert overall({"a": 0.5, "b": 1.0}, {"a": 1.0, "b": 1.0}) == pytest.approx(
        100 * math.sqrt((0.25 + 1) / 2)
    )
    with pytest.raises(MetricError, match="the original model scores 0 on b: leave the task out"):
        overall({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    with pytest.raises(MetricError, match=r"tasks differ: \['b'\]"):
        overall({"a": 1.0}, {"a": 1.0, "b": 1.0})
    with pytest.raises(MetricError, match="none given"):
        overall({}, {})


def test_og_by_hand_and_its_errors():
    # model means: a (0.9 + 0.7) / 2 = 0.8, b (1.0 + 1.0) / 2 = 1.0; mean 0.9, population deviation 0.1
    assert generalization([{"a": 0.9, "b": 1.0}, {"a": 0.7, "b": 1.0}]) == pytest.approx(
        100 * 0.1 / 0.9
    )
    assert generalization([{"a": 0.5, "b": 0.5}]) == 0
    assert math.isnan(generalization([{"a": 0.0}]))
    with pytest.raises(MetricError, match="not all models have b"):
        generalization([{"a": 1.0, "b": 1.0}, {"a": 1.0}])
    with pytest.raises(MetricError, match="at least one model"):
        generalization([])


# ---- task scores, failures ----------------------------------------------------------------------------------------------


def yes_no(number, answer, truth, error=None):
    return document(
        number,
        answer=answer,
        references=(truth,),
        metric="yes_no",
        score=float(answer == truth),
        error=error,
    )


def test_f1_equals_its_definition():
    said, truth = (
        ["yes", "Yes, it is", "no", "no", "yes", "red"],
        ["yes", "no", "yes", "no", "yes", "yes"],
    )
    records = [yes_no(i, a, t) for i, (a, t) in enumerate(zip(said, truth, strict=True))]
    hits, wrongly_yes, missed = 2, 1, 2
    precision, recall = hits / (hits + wrongly_yes), hits / (hits + missed)
    assert task_score(records) == pytest.approx(2 * precision * recall / (precision + recall))
    assert task_score([yes_no(0, "no", "no")]) == 0  # no yes anywhere: 0, not a division by zero
    failed = [yes_no(0, "yes", "yes"), yes_no(1, "", "no", error=ERROR)]
    assert task_score(failed) == pytest.approx(2 / 3), "a failure is the wrong answer"


def test_failures_score_zero_or_are_left_out_on_request():
    base = [document(0), document(1), document(2, error=ERROR)]
    mine = [
        document(0, "fastv@0.1"),
        document(1, "fastv@0.1", error=ERROR),
        document(2, "fastv@0.1"),
    ]
    zero, exclude = pairs_of(mine, base)["colour"], pairs_of(mine, base, "exclude")["colour"]
    assert [x.document for x, _ in zero] == ["d0", "d1", "d2"] and task_score(
        [x for x, _ in zero]
    ) == pytest.approx(2 / 3)
    assert [x.document for x, _ in exclude] == ["d0"]
    with pytest.raises(MetricError, match="expected 'zero' or 'exclude'"):
        pairs_of(mine, base, "ignore")  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="without records has no score"):
        task_score([])


def test_answers_to_different_prompts_are_not_compared():
    with pytest.raises(
        MetricError,
        match=r"colour d0: prompt or image under fastv@0.1 differs from that under none",
    ):
        pairs_of([replace(document(0, "fastv@0.1"), digest="1" * 16)], [document(0)])


# ---- loyalty ------------------------------------------------------------------------------------------------------------


def test_loyalty_counts_agreement_right_or_wrong():
    base = [
        document(0, answer="red"),
        document(1, answer="blue", score=0.0),
        document(2, error=ERROR),
        document(3, answer="red"),
    ]
    mine = [
        document(0, answer="The Red."),
        document(1, answer="blue", score=0.0),
        document(2),
        document(3, error=ERROR),
    ]
    agreed = agreements(pairs_of(mine, base))
    assert agreed["colour"].tolist() == [1, 1, 0], (
        "the original's own failure is left out, ours disagrees"
    )
    assert loyalty(agreed) == pytest.approx(200 / 3)
    assert math.isnan(loyalty({}))
    other = agreements(pairs_of(mine, base), lambda x, y: 0.25)
    assert loyalty(other) == pytest.approx(25)
    assert loyalty({"a": np.array([1.0]), "b": np.array([0.0, 0.0, 0.0])}) == pytest.approx(50), (
        "every task weighs the same"
    )


# ---- paired test --------------------------------------------------------------------------------------------------------


def slow_test(differences):
    """Every sign pattern of every document, zero differences included."""
    weighted = [d / len(ds) for ds in differences.values() for d in ds]
    observed = abs(sum(weighted))
    sums = [
        abs(sum(s * w for s, w in zip(signs, weighted, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(weighted))
    ]
    return sum(s >= observed - 1e-12 for s in sums) / len(sums)


@pytest.mark.parametrize("seed", range(4))
def test_exact_test_equals_its_slow_twin(seed):
    rng = np.random.default_rng(seed)
    differences = {
        "a": rng.integers(-1, 2, 7).astype(float),
        "b": np.round(rng.normal(0.3, 0.5, 4), 3),
    }
    assert paired_test(differences) == pytest.approx(slow_test(differences))


def test_paired_test_level_and_power():
    """Under no effect 5 % of tests reject; a clear effect is found; nothing changed means p = 1."""
    rng = np.random.default_rng(7)
    nulls = [
        paired_test({"a": rng.choice([-1.0, 0.0, 0.0, 1.0], 60), "b": rng.normal(0, 1, 30)})
        for _ in range(400)
    ]
    assert 0.02 <= np.mean(np.array(nulls) < 0.05) <= 0.08
    assert paired_test({"a": np.array([-1.0] * 40 + [0.0] * 60)}) < 0.001
    assert paired_test({"a": np.zeros(10)}) == 1.0
    assert paired_test({}) == 1.0


def test_the_smallest_p_survives_holm_over_a_hundred_settings():
    """Fewer draws would make significance impossible however large the effect."""
    p = paired_test({"a": np.full(200, -1.0)})
    assert holm([p] + [0.9] * 99)[0] < 0.05


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_pareto_with_ties_and_missing_numbers():
    costs, quality = [1, 1, 2, 2, 3, 0.5], [50, 50, 80, 70, 80, float("nan")]
    assert pareto(costs, quality) == [True, True, True, False, False, False]


def test_costs_equal_within_rounding_are_equal():
    """A share summed in another order differs by 1e-16: 16 points worse is not on the front."""
    assert pareto([0.3, 0.1 + 0.2], [84.0, 100.0]) == [False, True]
    assert pareto([0.3, 0.1 + 0.2], [100.0, 84.0]) == [True, False]
    assert pareto([0.3, 0.3001], [84.0, 100.0]) == [True, True]


# ---- efficiency ---------------------------------------------------------------------------------------------------------


def measured(setting, factor, count=20, seed=0, **more):
    """The machine drifts slowly and by 3x, for both alike: only pairs see the factor."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(1, 3, count)
    return [
        timing(i, setting, ttft=drift[i] * factor * rng.normal(1, 0.01), **more)
        for i in range(count)
    ]


def test_speedup_is_that_of_pairs():
    result = speedup(measured("fastv@0.1", 0.5, seed=1), measured("none", 1.0), "ttft")
    assert (
        result.ratio == pytest.approx(2, rel=0.02)
        and 1.95 < result.low <= result.ratio <= result.high < 2.05
    )
    assert result.pairs == 20 and result.quartiles[0] < result.median < result.quartiles[1]
    memory_order = list(reversed(measured("none", 1.0)))
    assert speedup(measured("fastv@0.1", 0.5, seed=1), memory_order, "ttft") == result, (
        "pairs go by sample number"
    )


@pytest.mark.parametrize(
    ("mine", "base", "stage", "why"),
    [
        (
            measured("f", 0.5)[:-1],
            measured("none", 1),
            "ttft",
            r"unpaired samples 19 \(19 of the setting, 20 of the original\): time baseline",
        ),
        (
            measured("f", 0.5),
            [],
            "ttft",
            r"unpaired samples 0, 1, 2, 3, 4, ... \(20 of the setting, 0 of the original\)",
        ),
        (
            measured("f", 0.5, 1),
            measured("none", 1, 1),
            "ttft",
            "1 pair of samples: a ratio with an interval needs at least 2",
        ),
        (
            measured("f", 0.5),
            measured("none", 1, workload="other"),
            "ttft",
            "compares one model on one workload",
        ),
        (measured("f", 0.5) * 2, measured("none", 1), "ttft", "a sample number occurs twice"),
        (
            measured("f", 0.5),
            measured("none", 1),
            "vision",
            "has no time of 'vision': expected one of prefill, ttft, total",
        ),
        (
            measured("f", 0.5, correct=False),
            measured("none", 1),
            "ttft",
            "f failed its correctness check: no speed-up",
        ),
        (measured("f", 0.0), measured("none", 1), "ttft", "ttft took no time under f"),
    ],
)
def test_what_cannot_be_compared_is_refused(mine, base, stage, why):
    with pytest.raises(MetricError, match=why):
        speedup(mine, base, stage)


def test_values_of_scores():
    assert values([document(0, score=0.25), document(1, error=ERROR)]).tolist() == [[0.25], [0.0]]


# ---- the papers' own aggregates ------------------------------------------------------------------


def table_of(source, number):
    """(model, method, setting) -> benchmark -> value."""
    found: dict = {}
    for r in published(source, number):
        if r.metric == "score":
            found.setdefault((r.model, r.method, r.setting), {})[r.benchmark] = r.value
    return found


def test_effivlm_bench_table_4_by_hand():
    """No OP is shipped for it: every row against the formula written out."""
    rows = table_of("EffiVLM-Bench", 4)
    original = next(v for k, v in rows.items() if k[1] == "Original")
    assert len(rows) == 12 and papers.op(original, original) == 1
    for row in rows.values():
        squares = [(row[b] / original[b]) ** 2 for b in original]
        assert papers.op(row, original) == pytest.approx(math.sqrt(sum(squares) / len(squares)))
    with pytest.raises(MetricError, match="tasks differ"):
        papers.op({"DocVQA": 1.0}, original)


def test_og_is_the_spread_of_ratios_averaged_over_models():
    a, b = {"x": 1.0, "y": 1.0}, {"x": 2.0, "y": 2.0}
    found = papers.og([({"x": 1.0, "y": 0.5}, a), ({"x": 1.0, "y": 2.0}, b)])
    assert found == 0, "(1 + 0.5) / 2 and (0.5 + 1) / 2 are equal"
    assert papers.og([({"x": 1.0, "y": 0.5}, a)]) == pytest.approx(0.25 / 0.75)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_polymorphic_means_of_its_tables(number):
    rows = table_of("Polymorphic", number)
    original = next(v for k, v in rows.items() if k[1] == "Vanilla")
    for key, row in rows.items():
        want = 100 * sum(row[b] / original[b] for b in original) / len(original)
        assert papers.mean_percent(row, original) == pytest.approx(want)
        assert key[1] == "Vanilla" or 50 < want < 105


@pytest.mark.parametrize(("number", "held"), [(1, 4), (2, 6), (3, 6)])
def test_uniprunebench_drops_and_abilities_of_its_tables(number, held):
    rows = table_of("UniPruneBench", number)
    vanilla = {k[0]: v for k, v in rows.items() if k[1] == "Vanilla"}
    whole = [(k, v) for k, v in rows.items() if set(v) == set(vanilla[k[0]])]
    assert len(whole) > len(vanilla)
    for (model, method, _), row in whole:
        drop = papers.relative_drop(row, vanilla[model])
        before, after = sum(vanilla[model].values()), sum(row.values())
        assert drop == pytest.approx(100 * (after / before - 1)) and (drop <= 2 or method == "x")
        assert len(papers.abilities(row)) == held
        if "HallusionBench" in row:
            assert papers.abilities(row)["hallucination"] == pytest.approx(
                (row["POPE"] + row["HallusionBench"]) / 2
            )


def test_plphp_averages_are_plain_means():
    assert papers.mean({"a": 1.0, "b": 2.0}) == 1.5
    with pytest.raises(MetricError, match="no scores"):
        papers.mean({})
