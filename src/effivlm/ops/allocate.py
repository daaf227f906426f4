"""Spreading a number of cache entries over layers or heads: real-valued wishes first, exact
integers last.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from effivlm.budget import split
from effivlm.ops.numbers import whole
from effivlm.ops.select import top_k_mask


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
    scores: Float[Tensor, "KV P"], base: int, floor: float, normalize: bool = False
) -> list[int]:
    """Entries per head from one competition over all heads of a layer; sums to ``heads * base``
    exactly (AdaKV).

    ``floor`` of the uniform count is safe for every head, the rest follows where the best ``heads *
    base`` scores lie.

    Args:
        scores: of the entries that compete.
        base: mean entries per head.
        floor: in [0, 1].
        normalize: scale each head by the share its best ``base`` scores have of its total, as some
            ports do.
    """
    heads, past = scores.shape
    if normalize:
        best = torch.where(top_k_mask(scores, base), scores, 0).sum(1)
        scores = scores * (best / scores.sum(1).clamp(min=1e-30))[:, None]
    counts = whole(top_k_mask(scores.flatten(), heads * base).view(heads, past).sum(1))
    return split(heads * base, [(1 - floor) * c + floor * base for c in counts], [past] * heads)
