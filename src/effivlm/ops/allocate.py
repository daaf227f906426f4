"""Spreading a number of cache entries over layers or heads: real-valued wishes first, exact
integers last.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effivlm.budget import split
from effivlm.ops.select import places


def pyramid(mean: float, layers: int, room: int, beta: int) -> list[float]:
    """Entries per layer falling linearly from ``2 * mean - mean / beta`` to ``mean / beta``; their
    mean is ``mean``.

    A first layer that would exceed ``room``, the most that any layer holds, is lowered to it and
    the last one raised by as much (PyramidKV). ``mean`` <= ``room``, so the line never rises.
    """
    low = mean / beta
    high = 2 * mean - low
    if high > room:
        high, low = float(room), 2 * mean - room
    step = (high - low) / max(layers - 1, 1)
    return [high - step * i for i in range(layers)] if layers > 1 else [mean]


def pyramid_floor(cap: int, window: int, length: int, layers: int, beta: int) -> list[int]:
    """Entries per layer, window included, as published codes compute them: the integer step
    overspends the budget.
    """
    mean = cap - window
    if length < cap:
        return [length] * layers
    if length < 2 * mean:
        return [cap] * layers
    low = mean // beta
    high = 2 * mean - low
    if high >= length - window:
        high, low = length - window, 2 * mean - (length - window)
    step = (high - low) // max(layers - 1, 1)
    return [min(length, high - step * i + window) for i in range(layers)]


def bounded(
    total: int, weights: Sequence[float], floors: Sequence[int], caps: Sequence[int]
) -> list[int]:
    """Split ``total`` in proportion to ``weights`` with every part between its floor and its cap;
    sums exactly.

    Parts that fall below their floor are fixed there and the rest is split again, until none does
    (water-filling). Floors that together exceed ``total`` are lowered in proportion.
    """
    floors = [min(f, c) for f, c in zip(floors, caps, strict=True)]
    if sum(floors) > total:
        floors = split(total, floors, floors)
    out = list(floors)
    free: list[int] = list(range(len(weights)))
    while free:
        left = total - sum(out[i] for i in range(len(out)) if i not in free)
        parts = split(left, [weights[i] for i in free], [caps[i] for i in free])
        low = {i for i, x in zip(free, parts, strict=True) if x < floors[i]}
        for i, x in zip(free, parts, strict=True):
            out[i] = floors[i] if low else x
        free = [i for i in free if i not in low] if low else []
    return out


def density_shares(density: Sequence[float], share: float, low: float) -> list[float]:
    """Layer shares ``density / sum * share * layers`` clipped to [low, 1]: VL-Cache as published,
    which misses its total.
    """
    mass = sum(density)
    wish = [d / mass if mass > 0 else 1 / len(density) for d in density]
    return [min(1.0, max(low, w * share * len(density))) for w in wish]


def head_counts(
    scores: Float[Tensor, "KV M"],
    protected: Bool[Tensor, "KV M"],
    base: Tensor,
    floor: float,
    normalize: bool = False,
) -> Int[Tensor, "KV"]:
    """Entries per head from one competition over all heads of a layer; sums to ``heads * base``
    exactly (AdaKV). Stays on the device.

    ``floor`` of the uniform count is safe for every head, the rest follows where the best ``heads *
    base`` scores lie; what rounding leaves over goes by largest remainder, ties to the lower head.

    Args:
        scores: of all entries.
        protected: entries that do not compete; equally many in every head.
        base: [] long, mean entries per head; no more than compete.
        floor: in [0, 1].
        normalize: scale each head by the share its best ``base`` scores have of its total, as some
            ports do.
    """
    heads = len(scores)
    least = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=least, neginf=least)
    if normalize:
        amounts = scores.masked_fill(protected, 0)
        best = places(scores.masked_fill(protected, -torch.inf)) < base
        share = torch.where(best, amounts, 0).sum(1) / amounts.sum(1).clamp(min=1e-30)
        scores = scores * share[:, None]
    competing = scores.masked_fill(protected, -torch.inf).flatten()
    won = (places(competing) < heads * base).view(heads, -1).sum(1)
    wish = (1 - floor) * won.double() + floor * base
    counts = (wish + 1e-9).floor()
    left = heads * base - counts.sum().long()
    full = counts >= (~protected).sum(1)
    short = places((wish - counts).masked_fill(full, -torch.inf))
    return counts.long() + (short < left)
