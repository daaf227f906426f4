"""Bootstrap intervals over documents, paired tests, and Pareto fronts; every draw follows from a seed."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from effivlm.metrics.performance import Aggregate

Rows = Mapping[str, NDArray[np.float64]]  # task -> [documents, c], aligned between settings


def bootstrap_overall(rows: Rows, originals: Rows, how: Mapping[str, Aggregate], draws: int = 1000, seed: int = 0,
                      level: float = 0.95) -> tuple[float, float]:  # fmt: skip
    """Percentile interval of OP, in percent; documents are drawn with replacement within each task, paired with the original.

    Draws in which the original scores 0 on a task are left out.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        ratios = []
        for task, mine in rows.items():
            pick = rng.integers(0, len(mine), len(mine))
            base = how[task](originals[task][pick])
            ratios.append(how[task](mine[pick]) / base if base else np.nan)
        found.append(100 * np.sqrt(np.mean(np.square(ratios))))
    kept = np.array(found)[~np.isnan(found)]
    if not len(kept):
        return float("nan"), float("nan")
    edge = 50 * (1 - level)
    low, high = np.percentile(kept, [edge, 100 - edge])
    return float(low), float(high)


def paired_test(scores: Sequence[float], originals: Sequence[float], draws: int = 2000, seed: int = 0) -> float:
    """Two-sided p-value of a sign-flip test on paired per-document differences; 1 where nothing differs."""
    difference = np.asarray(scores, float) - np.asarray(originals, float)
    if not difference.any():
        return 1.0
    rng = np.random.default_rng(seed)
    observed = abs(difference.mean())
    signs = rng.choice([-1.0, 1.0], size=(draws, len(difference)))
    extreme = (np.abs((signs * difference).mean(1)) >= observed - 1e-12).sum()
    return float((extreme + 1) / (draws + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: adjusted p-values in the given order."""
    order, out, running = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = running
    return out


def pareto(costs: Sequence[float], qualities: Sequence[float]) -> list[bool]:
    """Whether each point is on the front: no other point costs at most as much and is at least as good, with one strict."""
    points = list(zip(costs, qualities, strict=True))
    return [not any((c <= x and q >= y) and (c < x or q > y) for c, q in points) for x, y in points]
