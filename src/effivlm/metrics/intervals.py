"""Bootstrap intervals over documents, paired tests, and Pareto fronts; every draw follows from a
seed.

Intervals are percentile intervals. Bias correction (BCa) was left out on purpose: its jackknife is
undefined where every document scores the same, which is common for short tasks, and OP is paired
with the original, so its bias is small. Percentile intervals over very few documents (below about
20 a task) are too narrow; the tables print the number of documents.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from effivlm.metrics.performance import Aggregate, Array

Rows = Mapping[str, Array]  # task -> [n, c], aligned between settings
Picks = Mapping[str, NDArray[np.intp]]  # task -> [draws, n] indices drawn with replacement
Interval = tuple[float, float]

CHUNK = 2_000_000  # indices held at a time
EXACT = 12  # differing documents up to which all 2^n sign patterns are counted


def bootstrap(
    statistic: Callable[[Picks], Array],
    sizes: Mapping[str, int],
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic; documents are drawn with replacement within each task.

    Args:
        statistic: from picks to one number per draw, [draws]; draws where it is NaN are left out.
        sizes: documents by task.
        draws: how many resamples.
        seed: of the draws.
        level: share of draws inside.

    Returns:
        (low, high), NaN where no draw has a value.
    """
    rng = np.random.default_rng(seed)
    found: list[Array] = []
    step = max(1, CHUNK // max(1, *sizes.values(), 1))
    for start in range(0, draws, step):
        count = min(step, draws - start)
        found.append(statistic({t: rng.integers(0, n, (count, n)) for t, n in sizes.items()}))
    kept = np.concatenate(found)
    kept = kept[~np.isnan(kept)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.percentile(kept, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def bootstrap_overall(
    rows: Rows,
    originals: Rows,
    how: Mapping[str, Aggregate],
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of OP, in percent; a document is drawn with its answer under the original.

    Draws in which the original scores 0 on a task are left out.
    """

    def overall(picks: Picks) -> Array:
        squares: list[Array] = []
        for task, pick in picks.items():
            base = how[task](originals[task][pick])
            squares.append((how[task](rows[task][pick]) / np.where(base == 0, np.nan, base)) ** 2)
        return 100 * np.sqrt(np.mean(squares, axis=0))

    return bootstrap(overall, {t: len(r) for t, r in rows.items()}, draws, seed, level)


def bootstrap_mean(
    numbers: Mapping[str, Array], draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of the mean over tasks of each task's mean; numbers [n] by task.

    Raises:
        ValueError: for numbers of more than one axis, whose last would be averaged instead of the
            documents.
    """
    if bad := {t: n.shape for t, n in numbers.items() if n.ndim != 1}:
        raise ValueError(f"expected one number a document, got {bad}")

    def mean(picks: Picks) -> Array:
        return np.mean([numbers[t][pick].mean(-1) for t, pick in picks.items()], axis=0)

    return bootstrap(mean, {t: len(n) for t, n in numbers.items()}, draws, seed, level)


def paired_test(differences: Mapping[str, Array], draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a sign-flip test on per-document differences of scores, each task
    weighing the same.

    If the setting changed nothing, every difference could as well have had the other sign. All sign
    patterns are counted where at most `EXACT` documents differ, else ``draws`` of them are drawn
    (so p is at least 1 / (draws + 1)).

    Args:
        differences: task -> [n] score under the setting - score under the original.
        draws: how many sign patterns.
        seed: of the draws.

    Returns:
        The p-value; 1 where nothing differs.
    """
    weighted = np.concatenate([np.zeros(0), *(d / len(d) for d in differences.values() if len(d))])
    weighted = weighted[weighted != 0]
    if not len(weighted):
        return 1.0
    observed = abs(weighted.sum()) * (
        1 - 1e-9
    )  # sums of the same numbers in another order are ties
    # equal sizes are flipped together: of n such documents, binomial(n, 1/2) keep their sign
    size, count = np.unique(np.round(np.abs(weighted), 12), return_counts=True)
    if len(weighted) <= EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(weighted))))
        return float((np.abs(signs @ np.abs(weighted)) >= observed).mean())
    rng, extreme = np.random.default_rng(seed), 0
    step = max(1, CHUNK // len(size))
    for start in range(0, draws, step):
        kept = rng.binomial(count, 0.5, (min(step, draws - start), len(size)))
        extreme += int((np.abs((2 * kept - count) @ size) >= observed).sum())
    return (extreme + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: adjusted p-values in the given order."""
    order: list[int] = np.argsort(p_values, kind="stable").tolist()
    out, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = running
    return out


def pareto(costs: Sequence[float], qualities: Sequence[float]) -> list[bool]:
    """Whether each point is on the front: no other point costs at most as much and is at least as
    good, with one strict.

    Equal points are on it together; a point with NaN never is.
    """
    points = list(zip(costs, qualities, strict=True))
    return [
        x == x and y == y and not any((c <= x and q >= y) and (c < x or q > y) for c, q in points)
        for x, y in points
    ]
