"""Regions of an image: dividing tokens among them and a budget over them. Shapes: N tokens, R
regions.
"""

import torch
from torch import Tensor

from effivlm.budget import split
from effivlm.ops.numbers import floats, numbered, whole
from effivlm.ops.select import ranked


def segments(n: int, count: int) -> Tensor:
    """[n] number of the contiguous segment of each token; the first ``n % count`` segments are one
    longer.
    """
    sizes = torch.full((count,), n // count)
    sizes[: n % count] += 1
    return torch.arange(count).repeat_interleave(sizes)


def blocks(place: Tensor, side: int) -> Tensor:
    """[N] number of the block of each token in a ``side`` x ``side`` division of the grid.

    Args:
        place: [N, 2] rows and columns; where they are NaN the sequence is cut into ``side ** 2``
            segments.
        side: blocks along each axis.
    """
    if bool(place.isnan().any()):
        return segments(len(place), side * side).to(place.device)
    at = place.double() - place.double().amin(0)
    cell = (at * side / (at.amax(0) + 1)).floor().long()
    return cell[:, 0] * side + cell[:, 1]


def region_mean(values: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of values [N] over every region present, ascending by number: [R] float64, and the
    regions' sizes [R].
    """
    numbers, where = numbered(region)
    total = torch.zeros(len(numbers), dtype=torch.float64, device=values.device).index_add_(
        0, where, values.double()
    )
    size = torch.bincount(where)
    return total / size, size


def share_out(weight: Tensor, size: Tensor, k: int) -> Tensor:
    """[R] quotas: ``k`` in proportion to weight [R] by largest remainder, never above size [R];
    excess goes to the others.
    """
    return torch.tensor(split(k, floats(weight), whole(size)), device=weight.device)


def best_per_region(score: Tensor, region: Tensor, quota: Tensor) -> Tensor:
    """[sum of quotas] ascending: in every region present the ``quota`` [R] highest scores [N], ties
    by index.
    """
    where = numbered(region)[1]
    size = torch.bincount(where)
    order = ranked(score)
    order = order[torch.argsort(where[order], stable=True)]  # region by region, best first
    place = torch.arange(len(score), device=score.device) - (size.cumsum(0) - size)[where[order]]
    return order[place < quota[where[order]]].sort().values
