"""Intervals, exact tests and decisions: against scipy and statsmodels, slow twins and simulated truth."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from record_samples import document

from effivlm import registry
from effivlm.metrics import builtin, intervals
from effivlm.metrics.comparison import compare
from effivlm.metrics.flips import flips
from effivlm.metrics.guess import blind_guess
from effivlm.metrics.metric import Metric
from effivlm.metrics.paired import paired_test
from effivlm.metrics.performance import MetricError, pairs_of, task_score
from effivlm.metrics.sample import Part, pseudo_values, samples_of, units_of
from effivlm.metrics.student import quantile

stats = pytest.importorskip("scipy.stats", reason="oracle of the tests: pip install scipy")


def part(numbers, start=0):
    return Part(np.array(numbers, dtype=float), np.arange(len(numbers)) + start)


@pytest.mark.parametrize("freedom", [1, 1.7, 4, 39.5, 2000, 3e5])
def test_quantiles_are_students(freedom):
    for p in (0.025, 0.6, 0.95, 0.999):
        assert quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=2e-5)
    with pytest.raises(ValueError, match="expected 0 < p < 1"):
        quantile(1.0, freedom)


def test_pseudo_values_are_left_out_units():
    rng = np.random.default_rng(0)
    rows, units = rng.integers(0, 2, (12, 3)).astype(float), np.repeat([4, 7, 9, 11], 3)
    join = builtin.yes_no.join
    found = pseudo_values(rows, units, join)
    left = [join(rows[units != u].mean(0)) for u in (4, 7, 9, 11)]
    slow = 3 * (join(rows.mean(0)) - np.array(left))
    assert found.values - found.values.mean() == pytest.approx(slow - slow.mean())
    assert found.values.mean() == pytest.approx(join(rows.mean(0)))
    even = pseudo_values(rows[:, :1], units)
    assert even.values == pytest.approx(rows[:, 0].reshape(4, 3).mean(1)), "a mean's units"


def test_many_graded_documents_have_students_interval():
    """With many documents nothing imagined matters: scipy's interval of a mean of differences."""
    d = np.random.default_rng(1).normal(0.02, 0.1, 4000)
    want = stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d))
    assert intervals.difference([part(d)]) == pytest.approx(want, abs=2e-4)
    proportion = pytest.importorskip("statsmodels.stats.proportion", reason="oracle")
    right = (np.arange(400) < 380).astype(float)
    want = proportion.proportion_confint(380, 400, method="agresti_coull")
    assert intervals.share([part(right)]) == pytest.approx(want, abs=2e-3)


def test_few_documents_never_have_a_point_for_an_interval():
    low, high = intervals.difference([part([0.0] * 20)])
    assert low == -high and 0.08 < high < 0.2
    assert intervals.share([part([1.0] * 5)])[0] < 0.6
    assert all(math.isnan(x) for x in intervals.difference([part([1.0]), part([0.0, 1.0], 1)]))


@pytest.mark.parametrize("together", [1, 5])
def test_intervals_hold_the_truth_also_where_questions_share_pictures(together):
    """20 pictures; the seed is fixed, so this cannot fail by chance."""
    rng, hits, runs = np.random.default_rng(together), 0, 300
    for _ in range(runs):
        lost = np.repeat(rng.random(20) < 0.3, together)
        change = -(lost & (rng.random(20 * together) < 0.9)).astype(float)[:, None]
        units = np.repeat(np.arange(20), together)
        low, high = intervals.difference([pseudo_values(change, units)])
        hits += low <= -0.27 <= high
    assert 0.93 <= hits / runs


def test_pictures_that_two_tasks_share_count_once():
    values = np.random.default_rng(2).normal(0, 0.3, 12)
    apart = intervals.of_changes([part(values), part(values, 12)])
    shared = intervals.of_changes([part(values), part(values)])
    assert shared.error > 1.3 * apart.error and shared.freedom == 11


# ---- exact sign flips ---------------------------------------------------------------------------------------------------


def test_right_or_wrong_answers_have_mcnemars_exact_p():
    d = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 89)
    assert paired_test({"a": d}) == pytest.approx(stats.binomtest(2, 11).pvalue)
    mcnemar = pytest.importorskip("statsmodels.stats.contingency_tables", reason="oracle").mcnemar
    assert paired_test({"a": d}) == pytest.approx(mcnemar([[50, 9], [2, 39]], exact=True).pvalue)


def test_units_are_flipped_together():
    d, units = np.array([-1.0, -1, -1, -1, 0, 1, 1, -1]), np.array([0, 0, 0, 1, 1, 2, 2, 3])
    sums = [-3.0, -1.0, 2.0, -1.0]
    every = [
        abs(sum(s * x for s, x in zip(signs, sums)))
        for signs in itertools.product((1, -1), repeat=4)
    ]
    assert paired_test({"a": d}, {"a": units}) == pytest.approx(np.mean(np.array(every) >= 3))
    assert paired_test({"a": -np.ones(60)}, {"a": np.repeat(np.arange(12), 5)}) == pytest.approx(
        2.0**-11
    )


# ---- decisions ----------------------------------------------------------------------------------------------------------


def compared(changes, cluster=lambda n: ""):
    """Documents that were right, and of which some are lost (-1) or gained (+1)."""
    base = [
        document(n, score=float(c <= 0), cluster=cluster(n), answer="red" if c <= 0 else "blue")
        for n, c in enumerate(changes)
    ]
    mine = [
        document(
            n, "x@1", score=float(c >= 0), cluster=cluster(n), answer="red" if c >= 0 else "blue"
        )
        for n, c in enumerate(changes)
    ]
    return compare(pairs_of(mine, base), {"colour": 0.0})


def test_as_good_open_and_worse():
    same, some, many = (
        compared([0] * 400),
        compared([0] * 95 + [-1] * 3 + [1] * 2),
        compared([-1] * 30 + [0] * 70),
    )
    assert [x.decision.as_good for x in (same, some, many)] == ["yes", "open", "no"]
    assert 0 < same.decision.at_most < 2 and math.isinf(same.decision.needed)
    assert some.decision.needed > 100 > many.decision.needed
    assert many.decision.difference.low <= -30 <= many.decision.difference.high


def test_what_documents_resolve_is_statsmodels_power():
    power = pytest.importorskip("statsmodels.stats.power", reason="oracle").TTestPower()
    d = np.random.default_rng(3).normal(0, 0.2, 300)
    want = 0.2 * power.solve_power(nobs=300, alpha=0.05, power=0.8)
    assert intervals.of_changes([part(d)]).resolution() == pytest.approx(want, rel=0.1)


def test_questions_of_one_picture_are_worth_less():
    alone, together = (
        compared([-1] * 10 + [0] * 40, c) for c in (lambda n: "", lambda n: f"p{n // 5}")
    )
    width = [x.decision.difference.high - x.decision.difference.low for x in (alone, together)]
    assert width[1] > 1.5 * width[0] and together.p == 0.5 and alone.p < 0.01
    assert together.tasks["colour"].units == 10
    one = compared([0] * 10, lambda n: "p")
    assert math.isnan(one.op.low) and "share one picture" in " ".join(one.notes)


def test_old_records_stand_for_themselves():
    pairs = pairs_of([document(n, "x@1") for n in range(4)], [document(n) for n in range(4)])
    assert units_of(pairs)["colour"].tolist() == [0, 1, 2, 3]
    assert samples_of(pairs)["colour"].base.values.tolist() == [1] * 4


def test_flips():
    base = [
        document(0),
        document(1, answer="blue", score=0.0),
        document(2, answer="blue", score=0.0),
        document(3),
    ]
    mine = [
        document(0, "x@1", answer="green", score=0.0),
        document(1, "x@1"),
        document(2, "x@1", answer="green", score=0.0),
        document(3, "x@1", answer="The red."),
    ]
    assert flips(pairs_of(mine, base)["colour"]) == (1, 1, 1, 1)


def test_blind_guess_is_the_best_single_answer():
    asked = [
        document(n, references=("red" if n < 3 else f"x{n}",), answer="?", score=0.0)
        for n in range(5)
    ]
    assert blind_guess(asked) == pytest.approx(0.6)
    assert blind_guess([document(n) for n in range(5)]) == 0
    both = [
        document(n, references=(t,), answer=t, metric="yes_no") for n, t in enumerate(("yes", "no"))
    ]
    assert blind_guess(both) == pytest.approx(2 / 3), "always yes"


# ---- metrics as entries -------------------------------------------------------------------------------------------------


def test_a_plug_in_metric_is_scored_joined_and_listed(monkeypatch):
    from effivlm import lists

    half = Metric(
        "half",
        "half of it",
        lambda a, r: 0.5,
        join=lambda means: means[..., 0] / 2,
        agree=lambda a, b: 0.25,
    )
    monkeypatch.setattr(builtin, "half", half, raising=False)
    registry.metrics.cache_clear()
    try:
        assert any(line.split()[0] == "half" for line in lists.LISTS["metrics"]())
        records = [document(n, metric="half", score=0.5) for n in range(8)]
        assert task_score(records) == 0.25
        other = [replace(r, setting="x@1") for r in records]
        assert compare(pairs_of(other, records), {"colour": 0.0}).ol.value == 25
    finally:
        monkeypatch.undo()
        registry.metrics.cache_clear()


def test_scores_that_are_not_there_are_not_zero():
    records = [document(n, score=None) for n in range(4)]
    with pytest.raises(MetricError, match="has an answer but no score"):
        task_score(records)
    found = compare(pairs_of([replace(r, setting="x@1") for r in records], records), {})
    assert found.tasks == {} and found.ol.value == 100 and math.isnan(found.op.value)
    assert "answers without a score are left out" in found.notes[0]
