"""Regions of an image: dividing tokens among them and a budget over them. Shapes: N tokens, R regions."""

import torch
from torch import Tensor

from effivlm.budget import split
from effivlm.ops.select import ranked


def segments(n: int, count: int) -> Tensor:
    """[n] number of the contiguous segment of each token; the first ``n % count`` segments are one longer."""
    sizes = torch.full((count,), n // count)
    sizes[: n % count] += 1
    return torch.arange(count).repeat_interleave(sizes)


def blocks(place: Tensor, side: int) -> Tensor:
    """[N] number of the block of each token in a ``side`` x ``side`` division of the grid.

    Args:
        place: [N, 2] rows and columns; where they are NaN the sequence is cut into ``side ** 2`` segments.
        side: blocks along each axis.
    """
    if bool(place.isnan().any()):
        return segments(len(place), side * side).to(place.device)
    at = place.double() - place.double().amin(0)
    cell = (at * side / (at.amax(0) + 1)).floor().long()
    return cell[:, 0] * side + cell[:, 1]


def per_region(score: Tensor, region: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """[k] ascending: a quota for every region, and the highest scores inside it (ties by index).

    Quotas are shared out by largest remainder; what a region cannot take goes to the others.

    Args:
        score: [N].
        region: [N] long.
        k: tokens kept.
        weight: [R] of the regions present, ascending by number, not negative; None: the
            mean score, which must not be negative then.
    """
    numbers, where = region.unique(return_inverse=True)
    size = torch.bincount(where)
    if weight is None:
        weight = torch.zeros(len(numbers), dtype=torch.float64, device=score.device).index_add_(0, where, score.double()) / size
    quota = torch.tensor(split(k, weight.tolist(), size.tolist()), device=score.device)
    order = ranked(score)
    order = order[torch.argsort(where[order], stable=True)]  # region by region, best first
    rank = torch.arange(len(score), device=score.device) - (size.cumsum(0) - size)[where[order]]
    return order[rank < quota[where[order]]].sort().values
