"""Schedules of intra-LLM methods: from a budget to the counts over decoder layers that meet it."""

import math
from collections.abc import Sequence
from typing import TypeVar

from effivlm.budget import Budget, BudgetError, solve_mean
from effivlm.methods.base import Room

T = TypeVar("T")

DEPTH = 32  # decoder layers of the models that published cut layers and token counts are for
TOKENS = 576


def single_cut(name: str, layer: int, room: Room, budget: Budget | None) -> list[int]:
    """One cut before ``layer``: ``visual`` keeps the budget there; ``visual_mean`` averages to it
    over all layers.

    Raises:
        BudgetError: if the layer is outside the model or the mean is infeasible.
    """
    return stages(name, (layer,), (1.0,), room, budget)


def stages(
    name: str, at: Sequence[int], ratios: Sequence[float], room: Room, budget: Budget | None
) -> list[int]:
    """Cuts before the layers ``at`` whose retained shares follow ``ratios``, scaled to the budget.

    ``visual``: the share after the last cut is the budget; earlier cuts lie between 1 and it in the
    proportion (of logarithms) that ``ratios`` have. ``visual_mean``: one multiplier for all ratios
    makes the average over all layers' inputs the budget; counts are rounded down, so the mean never
    exceeds it.

    Raises:
        BudgetError: if a layer is outside the model or the budget is infeasible; names the smallest
            feasible one.
    """
    if not (budget := _checked(name, at, room, budget)):
        return list(room.lengths)
    if budget.unit == "visual_mean":
        share = budget.as_share(room.n)
        m = solve_mean(share, room.layers, list(zip(at, ratios, strict=True)))
        return _within(at, [m * r for r in ratios], room, budget)
    return _down_to(at, [math.log(r) for r in ratios], room, budget)


def geometric(name: str, at: Sequence[int], room: Room, budget: Budget | None) -> list[int]:
    """Cuts before the layers ``at``, each keeping the same share of what it finds: that share is
    solved for the budget.

    Raises:
        BudgetError: as `stages`.
    """
    if not (budget := _checked(name, at, room, budget)):
        return list(room.lengths)
    steps = range(1, len(at) + 1)
    if budget.unit == "visual_mean":
        factor = equal_factor(budget.as_share(room.n), room.layers, at)
        return _within(at, [factor**i for i in steps], room, budget)
    return _down_to(at, [-float(i) for i in steps], room, budget)


def equal_factor(share: float, layers: int, at: Sequence[int]) -> float:
    """The factor f for which cuts to f, f^2, ... before the layers ``at`` retain ``share`` on
    average over layer inputs.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = (
            sum(
                middle**i * (b - a)
                for i, (a, b) in enumerate(zip([0, *at], [*at, layers], strict=True))
            )
            / layers
        )
        low, high = (middle, high) if mean <= share else (low, middle)
    return low


def published(name: str, at: Sequence[int], counts: Sequence[int], room: Room) -> list[int]:
    """A published list of counts for 576 tokens, in proportion for other lengths; at least 1 unless
    the list says 0.

    Raises:
        BudgetError: if a layer is outside the model.
    """
    _check_layers(name, at, room.layers)
    n = room.n
    return falling(at, [min(n, max(min(k, 1), k * n // TOKENS)) for k in counts], room)


def most_entering(mean: int, first: int, layers: int) -> int:
    """Tokens that may enter the LLM at most, if the first cut before layer ``first`` leaves one,
    for an average of ``mean``.
    """
    return (mean * layers - (layers - first)) // first


def mean_share(counts: Sequence[int], n: int) -> float:
    """Average share of ``n`` tokens that the layers of a model process: what a preset truly
    costs.
    """
    return sum(counts) / (len(counts) * n)


def falling(at: Sequence[int], counts: Sequence[int], room: Room) -> list[int]:
    """[steps] what every step holds if there are ``counts`` left from the steps ``at`` (ascending)
    on; a count above the one before is that one.
    """
    out = list(room.lengths)
    for step, k in zip(at, counts, strict=True):
        out[step:] = [min(k, held) for held in out[step:]]
    return out


def scaled_layers(at: Sequence[int], layers: int, given: Sequence[int] = ()) -> tuple[int, ...]:
    """``given``, or the published layers ``at``, moved in proportion to depth where the model is
    too shallow for them.
    """
    if given:
        return tuple(given)
    if max(at) < layers:
        return tuple(at)
    return tuple(sorted({min(layers - 1, max(1, round(a * layers / DEPTH))) for a in at}))


def resample(values: Sequence[T], count: int) -> tuple[T, ...]:
    """The last ``count`` of the values of a schedule whose first cuts fell on the layer of a later
    one.
    """
    return tuple(values[-count:])


def preset_or_budget(name: str, preset: str, known: Sequence[str], budget: Budget | None) -> bool:
    """Whether a method follows its preset.

    Raises:
        BudgetError: if it has both a preset and a budget, or neither.
    """
    if bool(preset) == (budget is not None):
        got = "both" if preset else "neither"
        raise BudgetError(
            f"{name} takes either a budget ({name}@0.2) or a published list"
            f" ({name}:preset={known[0]}), got {got}; lists: {', '.join(known)}"
        )
    return bool(preset)


def _check_layers(name: str, at: Sequence[int], layers: int) -> None:
    if not all(0 <= a < b for a, b in zip(at, [*at[1:], layers], strict=True)):
        raise BudgetError(
            f"{name} cuts before layers {list(at)}, which do not fit a model of {layers} decoder"
            " layers: choose others"
        )


def _checked(name: str, at: Sequence[int], room: Room, budget: Budget | None) -> Budget | None:
    """The budget, or None where there is nothing to cut."""
    assert budget is not None
    n, layers = room.n, room.layers
    _check_layers(name, at, layers)
    if n == 0 or budget.as_share(n) >= 1.0:
        return None
    floor = (at[0] * n + (layers - at[0])) / (
        layers * n
    )  # everything before the first cut, then one token
    share = budget.as_share(n)
    if budget.unit == "visual_mean" and share < floor - 1e-12:
        raise BudgetError(
            f"{name}: visual_mean budget {share:g} is infeasible with the first cut before layer"
            f" {at[0]} of {layers}: the smallest feasible share is"
            f" {math.ceil(floor * 1e4) / 1e4:.4f}; cut earlier or ask for more"
        )
    return budget


def _down_to(at: Sequence[int], logs: Sequence[float], room: Room, budget: Budget) -> list[int]:
    """Counts that end at the budget, with logarithms in the proportion of ``logs``."""
    n = room.n
    final = budget.count(n)
    parts = [min(1.0, v / logs[-1]) if logs[-1] else 1.0 for v in logs]
    counts = [max(final, math.floor(n * (final / n) ** p + 1e-9)) for p in parts]
    counts[-1] = final
    return falling(at, counts, room)


def _within(at: Sequence[int], shares: Sequence[float], room: Room, budget: Budget) -> list[int]:
    """Floored counts, at least 1, whose sum over layers is the most that fits the mean budget in
    this shape.
    """
    n, layers = room.n, room.layers
    limit = math.floor(budget.as_share(n) * n * layers + 1e-6)
    counts = [min(n, max(1, math.floor(s * n + 1e-9))) for s in shares]
    spans = [b - a for a, b in zip(at, [*at[1:], layers], strict=True)]
    total = at[0] * n + sum(k * s for k, s in zip(counts, spans, strict=True))
    while total > limit:  # stages below one token were raised to one
        i = max(i for i, k in enumerate(counts) if k == max(counts))
        counts[i] -= 1
        total -= spans[i]
    return falling(at, counts, room)
