"""Pareto fronts."""

from collections.abc import Sequence

import numpy as np

from effivlm.metrics.metric import Array

ROUNDING = 1e-9  # relative; a share summed in another order differs by less


def pareto(costs: Sequence[float], qualities: Sequence[float]) -> list[bool]:
    """Whether each point is on the front: no other point costs at most as much and is at least as
    good, with one strict. Numbers that are equal within rounding are equal.

    Equal points are on it together; a point with NaN never is.
    """
    cost, quality = np.array(costs, dtype=np.float64), np.array(qualities, dtype=np.float64)
    known = ~(np.isnan(cost) | np.isnan(quality))
    c, q = cost[known], quality[known]
    return [bool(k) and not _beaten(x, y, c, q) for x, y, k in zip(cost, quality, known)]


def _beaten(cost: float, quality: float, costs: Array, qualities: Array) -> bool:
    near_cost = ROUNDING * np.maximum(abs(cost), np.abs(costs))
    near_quality = ROUNDING * np.maximum(abs(quality), np.abs(qualities))
    cheaper, better = costs < cost - near_cost, qualities > quality + near_quality
    as_cheap, as_good = costs <= cost + near_cost, qualities >= quality - near_quality
    return bool((as_cheap & as_good & (cheaper | better)).any())
