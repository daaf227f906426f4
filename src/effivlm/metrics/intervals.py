"""Intervals over documents, without drawing: Student's t on the pseudo-values of independent units,
smoothed so that they hold for few documents and for scores near 0 and near 1.

What was chosen, and why (how often it covers is in results/cpu/coverage.md; `benchmarks/coverage.py
--others` sets percentile, BCa and t-scaled bootstraps beside it, which has not been run yet):

- Where no document changed, every resample says that nothing ever does, and a bootstrap's interval
  is a point. Two imagined units, one that gained and one that lost, stand beside the real ones (as
  in Bonett and Price's interval for paired proportions; for shares, two of each end, as in Agresti
  and Coull's). They change as much as the largest change seen, and wholly where none was seen.
- Units are the clusters of `metrics.sample`; tasks that share pictures share units.
- OP is taken squared, where it is a mean of tasks, less its bias: noise in a task's ratio adds its
  variance to the mean of squares.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from effivlm.metrics.metric import Array
from effivlm.metrics.sample import Part, Sample, Units
from effivlm.metrics.student import quantile

Interval = tuple[float, float]
NAN = float("nan")
UNKNOWN = (NAN, NAN)
CHUNK = 2_000_000  # indices held at a time


class Spread(NamedTuple):
    """How well a mean over tasks of means over units is known.

    Attributes:
        centre: where the interval lies around. error: standard error. freedom: degrees of freedom;
            all NaN where a task has one unit only, from which no spread can be read.
    """

    centre: float
    error: float
    freedom: float

    def interval(self, level: float = 0.95) -> Interval:
        """Two-sided, unbounded."""
        if self.error != self.error:
            return UNKNOWN
        reach = quantile(0.5 + level / 2, self.freedom) * self.error
        return self.centre - reach, self.centre + reach

    def resolution(self, power: float = 0.8, level: float = 0.95) -> float:
        """The smallest true difference that a two-sided test finds with this probability."""
        if self.error != self.error:
            return NAN
        return self.error * (
            quantile(0.5 + level / 2, self.freedom) + quantile(power, self.freedom)
        )


def average(parts: Sequence[Part]) -> float:
    """Mean over tasks of the means over units; NaN without tasks."""
    return float(np.mean([p.values.mean() for p in parts])) if parts else NAN


def of_changes(parts: Sequence[Part]) -> Spread:
    """The mean over tasks of changes in [-1, 1], 0 where nothing changed."""
    largest = max((float(np.abs(p.values).max()) for p in parts), default=0.0)
    apart = [p.units[np.abs(p.values) > 1e-12] for p in parts]
    changed = len(np.unique(np.concatenate(apart))) if apart else 0
    imagined = largest + max(0.0, 1 - largest) / (changed + 1)
    return _smoothed(parts, (-imagined, imagined))


def of_shares(parts: Sequence[Part]) -> Spread:
    """The mean over tasks of shares in [0, 1]."""
    return _smoothed(parts, (0.0, 0.0, 1.0, 1.0))


def difference(parts: Sequence[Part], level: float = 0.95) -> Interval:
    """Interval of the mean over tasks of changes in [-1, 1]."""
    return _within(of_changes(parts).interval(level), average(parts), -1, 1)


def share(parts: Sequence[Part], level: float = 0.95) -> Interval:
    """Interval of the mean over tasks of shares in [0, 1]."""
    return _within(of_shares(parts).interval(level), average(parts), 0, 1)


def _within(found: Interval, value: float, least: float, most: float) -> Interval:
    """In the possible range, and around what was observed."""
    low, high = found
    if low != low or value != value:
        return UNKNOWN
    return min(value, max(low, least)), max(value, min(high, most))


def _smoothed(parts: Sequence[Part], imagined: Sequence[float]) -> Spread:
    if not parts or min(len(p.values) for p in parts) < 2:
        return Spread(NAN, NAN, NAN)
    sizes, count = np.array([len(p.values) for p in parts]), len(imagined)
    own, shared = _variances([(p.values, p.units) for p in parts])
    variance = (own.sum() + shared) / len(parts) ** 2
    # as many units as would know a mean over equal tasks as well
    units = len(parts) ** 2 / float((1 / sizes).sum())
    distinct = len(np.unique(np.concatenate([p.units for p in parts])))
    units = min(units, distinct)
    value, total = average(parts), units + count
    square = (units * (units * variance + value**2) + float(np.square(imagined).sum())) / total
    centre = (units * value + sum(imagined)) / total
    freedom = float((1 / sizes).sum() ** 2 / (1 / (sizes**2 * (sizes - 1))).sum())
    error = np.sqrt(max(square - centre**2, 0.0) / total)
    return Spread(float(centre), float(error), max(1.0, min(freedom, distinct - 1)))


def _variances(parts: Sequence[tuple[Array, Units]]) -> tuple[Array, float]:
    """Variance of every task's mean [T], and what units that several tasks share add to that of
    their sum.
    """
    shifts = [(v - v.mean()) / np.sqrt(len(v) * (len(v) - 1)) for v, _ in parts]
    own = np.array([float(s @ s) for s in shifts])
    number, member = np.unique(np.concatenate([u for _, u in parts]), return_inverse=True)
    if len(number) == len(member):
        return own, 0.0
    joint = np.bincount(member, weights=np.concatenate(shifts))
    return own, max(0.0, float(joint @ joint) - float(own.sum()))


def overall_interval(samples: Sequence[Sample], level: float = 0.95) -> Interval:
    """Interval of OP, a share of the original; every task's original score is above 0.

    Returns:
        (low, high), NaN without tasks or where a task has one unit only.
    """
    if not samples or min(len(s.mine.values) for s in samples) < 2:
        return UNKNOWN
    count = len(samples)
    base = np.array([s.base.values.mean() for s in samples])
    ratio = np.array([s.mine.values.mean() for s in samples]) / base
    found = [  # what a unit adds to its task's ratio; 0 where it keeps the task's ratio itself
        (s.mine.values - r * s.base.values) / b
        for s, r, b in zip(samples, ratio, base, strict=True)
    ]
    sizes = np.array([len(f) for f in found])
    own, _ = _variances([(f, s.mine.units) for f, s in zip(found, samples, strict=True)])
    largest = max(float(np.abs(f).max()) for f in found)
    changed = sum(int((np.abs(f) > 1e-12).sum()) for f in found)
    imagined = largest + max(0.0, 1 / base.mean() - largest) / (changed + 1)
    smooth = (sizes * own * sizes + 2 * imagined**2 / count) / (sizes + 2 / count) / sizes
    spread = 4 * ratio**2 * smooth + 2 * smooth**2  # variances of the squares
    _, shared = _variances(
        [(2 * r * f, s.mine.units) for f, r, s in zip(found, ratio, samples, strict=True)]
    )
    square = float(np.mean((ratio - _bias(samples, ratio, base)) ** 2 - own))
    freedom = max(1.0, float(spread.sum() ** 2 / (spread**2 / (sizes - 1)).sum()))
    reach = quantile(0.5 + level / 2, freedom) * np.sqrt(spread.sum() + shared) / count
    ends = np.sqrt(np.maximum([square - reach, square + reach], 0))
    value = float(np.sqrt(np.mean(ratio**2)))
    return min(value, float(ends[0])), max(value, float(ends[1]))


def _bias(samples: Sequence[Sample], ratio: Array, base: Array) -> Array:
    """Of a ratio of two estimates, to second order."""
    out: list[float] = []
    for s, r, b in zip(samples, ratio, base, strict=True):
        shift = s.base.values - s.base.values.mean()
        count = len(shift) * (len(shift) - 1)
        out.append(float(shift @ (r * s.base.values - s.mine.values)) / count / b**2)
    return np.array(out)


def above(part: Part, floor: float, level: float = 0.95) -> bool:
    """Whether a score in [0, 1] is clearly above a floor, and known well enough to be divided by:
    the lower end of its one-sided (Wilson) interval lies above the floor and above a third of the
    score.
    """
    count, score = len(part.values), float(part.values.mean())
    if count < 2 or score <= floor:
        return False
    variance = float(part.values.var(ddof=1)) / count
    alike = score * (1 - score) / variance if variance else count  # as many right or wrong answers
    t = quantile(level, count - 1) ** 2 / max(alike, 1e-9)
    low = (score + t / 2 - np.sqrt(max(score * (1 - score) * t + t**2 / 4, 0))) / (1 + t)
    return bool(low > max(floor, score / 3))


def bootstrap(
    statistic: Callable[[Units], Array], count: int, draws: int = 1000, seed: int = 0
) -> Interval:
    """95 % percentile interval of a statistic of ``count`` samples, drawn with replacement.

    Args:
        statistic: from indices [draws, count] to one number per draw.
        count: of samples.
        draws: how many resamples.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    found: list[Array] = []
    step = max(1, CHUNK // max(1, count))
    for start in range(0, draws, step):
        found.append(statistic(rng.integers(0, count, (min(step, draws - start), count))))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
