"""Statistics of a prompt's last rows from one pass over their attention: what every key receives,
and how much of the attention is small.

All rows of a prompt are its last rows too. Where they stand follows from the shapes, so nothing is
asked of the device. Shapes as in `statistics`: q [H, R, d] the last R of L rows, k [KV, L, d].
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from effivlm.ops.numbers import parts
from effivlm.ops.precision import working, working_dtype
from effivlm.ops.statistics import RowMask

BUFFER, SMALL = 2**23, 2**20  # logits in a block, and in one that holds all heads and rows


class Tail(NamedTuple):
    """``sums``: [H, L] attention received from the rows, summed over them. ``small``: [P, H] share
    of their visible entries whose probability lies below p times their row's largest, one line a p.
    """

    sums: Tensor
    small: Tensor


def tail_statistics(
    q: Tensor,
    k: Tensor,
    scaling: float,
    p: tuple[float, ...] = (),
    mask: RowMask = None,
    buffer: int = BUFFER,
) -> Tail:
    """Every row's softmax is complete within its block, so blocks add up exactly; what a block of
    rows cannot see is not computed.

    Args:
        q: [H, R, d].
        k: [KV, L, d].
        scaling: of the logits.
        p: thresholds, compared as logits, which is the same comparison.
        mask: rows -> [r, L] bool, where the model's attention is not plainly causal.
        buffer: logits in a block. All heads go in one where that is small; else one KV head and
            as many rows as fit, up to 256, in a buffer that the next block overwrites.
    """
    (groups, length, _), (heads, rows, _) = k.shape, q.shape
    size = heads // groups
    fits = heads * rows * length <= min(buffer, SMALL)
    # comparing makes temporaries, which have to stay near the processor too
    block = buffer // 8 if p else buffer
    step = rows if fits else max(1, min(rows, 256, block // (size * length)))
    sums: list[Tensor] = []
    above: list[Tensor] = []
    for h in range(1) if fits else range(groups):
        own = (q, k) if fits else (q[h * size : (h + 1) * size], k[h : h + 1])
        received, counted = _group(*own, scaling, p, mask, step)
        sums.append(received)
        above.append(counted)
    received = sums[0] if fits else torch.cat(sums)
    if not p:
        return Tail(received, received[:0])
    seen = _visible(rows, length, mask, q.device)
    small = (seen - torch.cat(above, 1).double()) / seen
    return Tail(received, small.to(working_dtype(q)))


def _group(
    q: Tensor, k: Tensor, scaling: float, p: tuple[float, ...], mask: RowMask, step: int
) -> tuple[Tensor, Tensor]:
    """[h, L] sums and [P, h] entries that are not small, of some query heads with their KV heads,
    ``step`` rows at a time.
    """
    (groups, length, width), (heads, rows, _) = k.shape, q.shape
    keys, first = working(k.detach()).transpose(1, 2), length - rows
    by_group = q.detach().view(groups, -1, rows, width)
    sums = above = q.new_empty(0)
    whole = step >= rows
    room = None if whole else keys.new_empty(heads * step * length)
    for start in range(0, rows, step):
        end = min(start + step, rows)
        part = by_group if whole else by_group[:, :, start:end]
        visible = length if mask is not None else first + end
        some = keys if visible == length else keys[..., :visible]
        part = working(part.reshape(groups, -1, width)) * scaling
        size = heads * (end - start) * visible
        out = None if room is None else room[:size].view(groups, -1, visible)
        logits = torch.bmm(part, some, out=out).view(heads, end - start, visible)
        _hide(logits, first + start, mask)
        counted = _above(logits, p, mask)
        weights = torch.softmax(logits, -1, out=logits)
        if mask is not None:
            weights.nan_to_num_()  # rows that see nothing
        if whole:
            return weights.sum(1), counted
        # a product sums over many rows faster than sum does on CPUs
        received = torch.bmm(weights.new_ones(heads, 1, end - start), weights).squeeze(1)
        sums = sums if start else received.new_zeros(heads, length)
        sums[:, :visible] += received
        above = above + counted if start else counted
    return sums, above


def _hide(logits: Tensor, start: int, mask: RowMask) -> None:
    """What rows from ``start`` on cannot see of logits [h, r, visible], in place."""
    rows, device = logits.shape[1], logits.device
    if mask is not None:
        logits.masked_fill_(~mask(torch.arange(start, start + rows, device=device)), -torch.inf)
    elif rows > 1:  # columns up to the first row's own are visible to every row of the block
        later = torch.ones(rows, rows, dtype=torch.bool, device=device).triu_(1)
        logits[..., start:].masked_fill_(later, -torch.inf)


def _above(logits: Tensor, p: tuple[float, ...], mask: RowMask) -> Tensor:
    """[P, h] visible entries of logits [h, r, visible] that are not small."""
    if not p:
        return logits[:0, 0, 0]
    top = logits.amax(-1, keepdim=True)
    out: list[Tensor] = []
    for share in p:
        large = logits >= top + math.log(share)
        large = large if mask is None else large & (logits > -torch.inf)
        out.append(large.sum((1, 2)))
    return torch.stack(out)


def _visible(rows: int, length: int, mask: RowMask, device: torch.device) -> Tensor | int:
    """Entries that the last ``rows`` rows see, at least 1."""
    if mask is None:
        return rows * (length - rows) + rows * (rows + 1) // 2
    at = torch.arange(length - rows, length, device=device)
    return sum((mask(x).sum() for x in parts(at, 256)), at.new_zeros(())).clamp(min=1)
