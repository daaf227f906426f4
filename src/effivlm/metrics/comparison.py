"""One setting beside the original: every number of quality, with its interval, in percent or
points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from effivlm.metrics import intervals
from effivlm.metrics.flips import Flips, flips
from effivlm.metrics.generalization import generalization
from effivlm.metrics.intervals import NAN
from effivlm.metrics.paired import paired_test
from effivlm.metrics.performance import Pair, overall, score_of, unregistered, unscored
from effivlm.metrics.sample import Part, Sample, agreed_of, samples_of, units_of

MARGIN = 2.0  # points that a setting may lose and still be called as good
Verdict = Literal["yes", "no", "open", ""]


class Estimate(NamedTuple):
    """A number and its 95 % interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


NOTHING = Estimate(NAN, NAN, NAN)


@dataclass(frozen=True)
class TaskComparison:
    """One task.

    Attributes:
        documents: compared. units: independent ones among them (clusters). score, original: in
            percent. difference: in points. guess: score of the best answer without looking.
        rated: whether the task enters OP: the original is clearly above the guess. ratio: score /
            original score; NaN unless rated. p: paired test, uncorrected. flips: what changed.
    """

    documents: int
    units: int
    score: Estimate
    original: Estimate
    difference: Estimate
    guess: float
    rated: bool
    ratio: float
    p: float
    flips: Flips


@dataclass(frozen=True)
class Decision:
    """What the difference of scores says to somebody who has to choose.

    Attributes:
        difference: mean over tasks of score - original, in points; of all tasks, rated or not.
        at_most: what is lost at most, in points, with 95 % confidence (one-sided). as_good: whether
            less than `MARGIN` is lost: yes and no are shown with 95 % confidence each, for one
            setting looked at alone.
        resolves: smallest true difference that these documents would show, 4 times of 5, in points.
        needed: documents, in the same mix, that would show the observed difference as often;
            infinite where none was observed. needed_for_margin: those that would resolve `MARGIN`.
    """

    difference: Estimate
    at_most: float
    as_good: Verdict
    resolves: float
    needed: float
    needed_for_margin: float


@dataclass(frozen=True)
class Comparison:
    """All tasks.

    Attributes:
        tasks: by name; those whose answers have scores. op, ol: OP and loyalty, in percent. og:
            spread of the ratio over rated tasks. p: paired test over all documents, uncorrected.
        decision: from the difference of scores. flips: over all tasks. notes: what could not be
            computed, and why.
    """

    tasks: dict[str, TaskComparison]
    op: Estimate
    ol: Estimate
    og: float
    p: float
    decision: Decision
    flips: Flips
    notes: tuple[str, ...]


def compare(pairs: Mapping[str, Sequence[Pair]], guesses: Mapping[str, float]) -> Comparison:
    """Compare, task by task and over all tasks.

    Args:
        pairs: documents that both were asked, by task.
        guesses: task -> score in [0, 1] of the best
            answer without looking.
    """
    scored = {t: p for t, p in pairs.items() if not any(unscored(r) for pair in p for r in pair)}
    samples, units = samples_of(scored), units_of(scored)
    changes = {t: np.array([score_of(x) - score_of(y) for x, y in p]) for t, p in scored.items()}
    tasks = {
        t: _task(s, scored[t], guesses[t], paired_test({t: changes[t]}, {t: units[t]}))
        for t, s in samples.items()
    }
    every = units_of(pairs)
    agreed = [a for t, p in pairs.items() if (a := agreed_of(p, every[t])) is not None]
    rated = {t: s for t, s in samples.items() if tasks[t].rated}
    decision = _decide([s.change for s in samples.values()], sum(map(len, scored.values())))
    found = Comparison(
        tasks=tasks,
        op=_overall(tasks, rated),
        ol=_percent(intervals.average(agreed), intervals.share(agreed)),
        og=generalization([{t: tasks[t].ratio for t in rated}]) if rated else NAN,
        p=paired_test(changes, units) if changes else NAN,
        decision=decision,
        flips=Flips.sum(x.flips for x in tasks.values()),
        notes=_notes(pairs, tasks),
    )
    itself = all(x is y for p in pairs.values() for x, y in p)
    return _exactly(found) if itself else found


def _percent(value: float, interval: intervals.Interval) -> Estimate:
    return Estimate(100 * value, 100 * interval[0], 100 * interval[1])


def _task(sample: Sample, pairs: Sequence[Pair], guess: float, p: float) -> TaskComparison:
    mine, base, change = [sample.mine], [sample.base], [sample.change]
    rated = intervals.above(sample.base, guess)
    value = intervals.average
    return TaskComparison(
        documents=sample.documents,
        units=len(sample.base.values),
        score=_percent(value(mine), intervals.share(mine)),
        original=_percent(value(base), intervals.share(base)),
        difference=_percent(value(change), intervals.difference(change)),
        guess=100 * guess,
        rated=rated,
        ratio=value(mine) / value(base) if rated else NAN,
        p=p,
        flips=flips(pairs),
    )


def _overall(tasks: Mapping[str, TaskComparison], rated: Mapping[str, Sample]) -> Estimate:
    if not rated:
        return NOTHING
    value = overall(
        {t: tasks[t].score.value for t in rated}, {t: tasks[t].original.value for t in rated}
    )
    low, high = intervals.overall_interval(list(rated.values()))
    return Estimate(value, 100 * low, 100 * high)


def _decide(changes: Sequence[Part], documents: int) -> Decision:
    value, found = 100 * intervals.average(changes), intervals.of_changes(changes)
    low, high = (100 * x for x in intervals.difference(changes, level=0.9))
    resolves = 100 * found.resolution()
    return Decision(
        difference=_percent(value / 100, intervals.difference(changes)),
        at_most=max(0.0, -low) if low == low else NAN,
        as_good=""
        if low != low
        else "yes"
        if low > -MARGIN
        else "no"
        if high < -MARGIN
        else "open",
        resolves=resolves,
        needed=documents * (resolves / abs(value)) ** 2 if value else math.inf,
        needed_for_margin=documents * (resolves / MARGIN) ** 2,
    )


def _exactly(found: Comparison) -> Comparison:
    """The original beside itself: no interval, for nothing is uncertain."""
    whole = Estimate(100.0, 100.0, 100.0)
    none = Estimate(0.0, 0.0, 0.0)
    return replace(
        found,
        tasks={t: replace(x, difference=none) for t, x in found.tasks.items()},
        op=whole if found.op.value == found.op.value else NOTHING,
        ol=whole if found.ol.value == found.ol.value else NOTHING,
        decision=replace(found.decision, difference=none, at_most=0.0, as_good="yes"),
    )


def _notes(
    pairs: Mapping[str, Sequence[Pair]], tasks: Mapping[str, TaskComparison]
) -> tuple[str, ...]:
    out: list[str] = []
    out += _note(
        [t for t in pairs if t not in tasks], "answers without a score are left out of all but OL"
    )
    blind = [
        f"{t} ({x.original.value:.1f} against {x.guess:.1f})"
        for t, x in tasks.items()
        if not x.rated
    ]
    out += _note(
        blind,
        "OP and OG leave out tasks on which the original is not clearly above what can be said"
        " without looking",
    )
    out += _note(
        [t for t, x in tasks.items() if x.units < 2],
        "no interval can be given where all documents of a task share one picture, or it has one",
    )
    odd = [f"{t} ({p[0][0].metric})" for t, p in pairs.items() if unregistered([p[0][0]])]
    out += _note(odd, "metrics that are not registered here are averaged over documents")
    return tuple(out)


def _note(names: Sequence[str], text: str) -> list[str]:
    return [f"{text}: {', '.join(sorted(names))}"] if names else []
