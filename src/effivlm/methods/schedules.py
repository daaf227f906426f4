"""Schedules of intra-LLM methods: from a budget to the cuts that meet it."""

import math
from collections.abc import Sequence

from effivlm.budget import Budget, BudgetError, solve_mean
from effivlm.methods.base import Cut


def single_cut(name: str, layer: int, layers: int, n: int, budget: Budget | None) -> tuple[Cut, ...]:
    """One cut before ``layer``: ``visual`` keeps the budget there; ``visual_mean`` averages to it over all layers.

    Raises:
        BudgetError: if the layer is outside the model or the mean is infeasible.
    """
    return stages(name, (layer,), (1.0,), layers, n, budget)


def stages(name: str, at: Sequence[int], ratios: Sequence[float], layers: int, n: int, budget: Budget | None) -> tuple[Cut, ...]:
    """Cuts before the layers ``at`` whose retained shares follow ``ratios``, scaled to the budget.

    ``visual``: the share after the last cut is the budget; earlier cuts lie between 1 and it in the proportion (of
    logarithms) that ``ratios`` have. ``visual_mean``: one multiplier for all ratios makes the average over all layers'
    inputs the budget; counts are rounded down, so the mean never exceeds it.

    Raises:
        BudgetError: if a layer is outside the model or the budget is infeasible; names the smallest feasible one.
    """
    assert budget is not None
    if n == 0:
        return ()
    if not all(0 <= a < b for a, b in zip(at, [*at[1:], layers], strict=True)):
        raise BudgetError(f"{name} cuts before layers {list(at)}, which do not fit a model of {layers} decoder layers: choose others")
    if budget.unit == "visual_mean":
        return _mean(name, at, ratios, layers, n, budget)
    final = budget.count(n)
    logs = [math.log(r) for r in ratios]
    low = logs[-1] or -1.0
    counts = [max(final, math.floor(n * (final / n) ** min(1.0, v / low if logs[-1] else 1.0) + 1e-9)) for v in logs]
    counts[-1] = final
    return tuple(Cut(a, k) for a, k in zip(at, counts, strict=True) if k < n)


def _mean(name: str, at: Sequence[int], ratios: Sequence[float], layers: int, n: int, budget: Budget) -> tuple[Cut, ...]:
    share = budget.as_share(n)
    floor = (at[0] * n + (layers - at[0])) / (layers * n)  # everything before the first cut, then one token
    if share < floor:
        raise BudgetError(f"{name}: visual_mean budget {share:g} is infeasible with the first cut before layer {at[0]} of {layers} and {n} tokens: "
                          f"the smallest feasible share is {floor:.4f}; cut earlier or ask for more")  # fmt: skip
    m = solve_mean(share, layers, list(zip(at, ratios, strict=True)))
    counts, previous = [], n
    for r in ratios:
        previous = min(previous, max(1, math.floor(m * r * n + 1e-9)))
        counts.append(previous)
    return tuple(Cut(a, k) for a, k in zip(at, counts, strict=True) if k < n)
