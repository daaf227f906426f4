"""Regions of an image: dividing tokens among them and a budget over them. Shapes: N tokens, R
regions.
"""

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from effivlm.budget import split
from effivlm.ops.numbers import floats, numbered, whole
from effivlm.ops.select import ranked


def segments(n: int, count: int) -> Int[Tensor, "{n}"]:
    """Number of the contiguous segment of each token; the first ``n % count`` segments are one
    longer.
    """
    sizes = torch.full((count,), n // count)
    sizes[: n % count] += 1
    return torch.arange(count).repeat_interleave(sizes)


def blocks(place: Float[Tensor, "N 2"], side: int) -> Int[Tensor, "N"]:
    """Number of the block of each token in a ``side`` x ``side`` division of the grid.

    Args:
        place: rows and columns; where they are NaN the sequence is cut into ``side ** 2``
            segments.
        side: blocks along each axis.
    """
    if bool(place.isnan().any()):
        return segments(len(place), side * side).to(place.device)
    at = place.double() - place.double().amin(0)
    cell = (at * side / (at.amax(0) + 1)).floor().long()
    return cell[:, 0] * side + cell[:, 1]


def region_mean(
    values: Real[Tensor, "N"], region: Int[Tensor, "N"]
) -> tuple[Float[Tensor, "R"], Int[Tensor, "R"]]:
    """Mean of values over every region present, ascending by number, in float64; and the
    regions' sizes.
    """
    numbers, where = numbered(region)
    total = torch.zeros(len(numbers), dtype=torch.float64, device=values.device).index_add_(
        0, where, values.double()
    )
    size = torch.bincount(where)
    return total / size, size


def share_out(weight: Float[Tensor, "R"], size: Int[Tensor, "R"], k: int) -> Int[Tensor, "R"]:
    """Quotas: ``k`` in proportion to weight by largest remainder, never above size;
    excess goes to the others.
    """
    return torch.tensor(split(k, floats(weight), whole(size)), device=weight.device)


def best_per_region(
    score: Real[Tensor, "N"], region: Int[Tensor, "N"], quota: Int[Tensor, "R"]
) -> Int[Tensor, "k"]:
    """Ascending indices: in every region present the ``quota`` highest scores, ties
    by index.
    """
    where = numbered(region)[1]
    size = torch.bincount(where)
    order = ranked(score)
    order = order[torch.argsort(where[order], stable=True)]  # region by region, best first
    place = torch.arange(len(score), device=score.device) - (size.cumsum(0) - size)[where[order]]
    return order[place < quota[where[order]]].sort().values
