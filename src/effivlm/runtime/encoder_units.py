"""What attends to itself in the encoder, which of its groups are in play, and how full grids come
back.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from effivlm.budget import BudgetError
from effivlm.families.base import Piece
from effivlm.methods.base import Merge
from effivlm.methods.signals import Signal
from effivlm.runtime.counts import in_blocks
from effivlm.runtime.tokens import merge_rows
from effivlm.setting import Part


class Unit:
    """One tile or image in the encoder.

    Attributes:
        groups: [g] long, original groups in play. sizes: [g] float32. owner: [G] long, index into
            ``groups`` of the group that stands for each original one.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.groups = torch.arange(count, device=device)
        self.sizes = torch.ones(count, device=device)
        self.owner = torch.arange(count, device=device)

    def cut(self, keep: Tensor, merge: Merge | None, place: Tensor) -> None:
        """Narrow to ``keep``; what was dropped is owned by its merge target, or by the nearest
        group kept.
        """
        near = torch.cdist(place, place[keep]).argmin(1)
        heir = near.clone()
        new_sizes = self.sizes.clone()
        if merge is not None:
            rank = torch.full_like(self.groups, -1)
            rank[keep] = torch.arange(len(keep), device=keep.device)
            heir[merge.source] = rank[merge.target]
            new_sizes = torch.zeros_like(self.sizes).index_add_(
                0, merge.target, self.sizes[merge.source]
            )
            untouched = torch.ones_like(self.groups, dtype=torch.bool)
            untouched[merge.target] = False
            new_sizes = torch.where(untouched, self.sizes, new_sizes)
        heir[keep] = torch.arange(len(keep), device=keep.device)
        self.owner, self.groups, self.sizes = heir[self.owner], self.groups[keep], new_sizes[keep]


def planned_cuts(
    part: Part, blocks: int, layers: int, counts: list[int], images: int
) -> dict[int, list[int]]:
    """Block -> what every unit keeps before it, for the blocks where some unit is cut.

    Args:
        part: an encoder reducer with its budget.
        blocks: encoder blocks that matter.
        layers: decoder layers.
        counts: groups of every unit.
        images: how many images the units are.

    Raises:
        BudgetError: for budgets in tokens where units are tiles, and counts that do not fit.
    """
    method, budget = part.method, part.budget
    if budget is not None and budget.tokens is not None and len(counts) != images:
        raise BudgetError(
            f"{method.name}@{budget.text} counts tokens per image, but this family encodes tiles:"
            " give a share"
        )
    held = [in_blocks(part, blocks, layers, n) for n in counts]
    return {
        b: [unit[b] for unit in held]
        for b in range(1, blocks)
        if any(unit[b] < unit[b - 1] for unit in held)
    }


def places(units: list[Unit], number: int, pieces: list[Piece] | None) -> Tensor:
    """[G, 2] place of every group of a unit: of its piece in a packed encoder (``pieces``), else
    from its position in encoder order.
    """
    unit = units[number]
    device = unit.owner.device
    if pieces is not None:
        piece = pieces[number]
        out = torch.zeros(len(unit.owner), 2, device=device)
        first = sum(len(u.owner) for u in units[:number])
        out[piece.source.to(device) - first] = piece.place.to(device)
        return out
    side = round(len(unit.owner) ** 0.5)
    index = torch.arange(len(unit.owner), device=device)
    return torch.stack([index // side, index % side], -1).float()


def survivors(units: list[Unit], pieces: list[Piece], limit: Callable[[int], int]) -> list[Tensor]:
    """Per piece, [n] bool: the first slot of every group still in play, at most ``limit(n)``."""
    counts = [len(u.owner) for u in units]
    offsets = [sum(counts[:i]) for i in range(len(counts))]
    alive = torch.cat([u.groups.cpu() + o for u, o in zip(units, offsets, strict=True)])
    sizes = torch.zeros(sum(counts)).index_put_((alive,), torch.cat([u.sizes.cpu() for u in units]))
    out = []
    for piece in pieces:
        source = torch.where(torch.isin(piece.source.cpu(), alive), piece.source.cpu(), -1)
        keep = first_of_each(source)
        most = limit(len(source))
        slots = keep.nonzero()[:, 0]
        if len(slots) > most:  # padding was cut away: what is left exceeds the budget of it
            order = torch.argsort(sizes[source[slots]], descending=True, stable=True)[most:]
            keep[slots[order]] = False
        out.append(keep)
    return out


def first_of_each(owner: Tensor) -> Tensor:
    """[n] bool: True at the first position of every distinct value that is not negative."""
    seen = torch.zeros_like(owner, dtype=torch.bool)
    values, order = torch.sort(owner, stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    seen[order[first & (values >= 0)]] = True
    return seen


def full_sequence(hidden: Tensor, owners: list[Tensor], members: int) -> Tensor:
    """Packed [S', C] -> [S, C]: every group has the states of its owner."""
    out, start = [], 0
    for owner in owners:
        size = int(owner.max()) + 1
        rows = hidden[start : start + size * members].view(size, -1)
        out.append(rows[owner].view(len(owner) * members, -1))
        start += size * members
    return torch.cat(out)


def full_tiles(
    hidden: Tensor, owners: list[Tensor], prefix: int, members: int, order: Tensor | None
) -> Tensor:
    """Tower [B', prefix + P', C] -> [B', prefix + P, C], patches back in raster order."""
    rows = []
    for x, owner in zip(hidden[:, prefix:], owners, strict=True):
        full = x.reshape(-1, members * x.shape[-1])[owner].reshape(len(owner) * members, -1)
        if order is not None:
            full = torch.empty_like(full).index_copy_(0, order.to(full.device), full)
        rows.append(full)
    return torch.cat([hidden[:, :prefix], torch.stack(rows)], 1)


def merged_groups(rows: Tensor, merge: Merge) -> Tensor:
    """A copy of rows [g, C] with a merge written."""
    return merge_rows(rows, torch.arange(len(rows), device=rows.device), merge)


def refuse(signal: Signal) -> Tensor:
    """The source of a context without signals."""
    raise KeyError(f"{signal!r}: an encoder reducer reads the fields of BlockTokens, not signals")


def size_bias(units: list[Unit], members: int, prefix: int, bounds: Tensor | None) -> list[Tensor]:
    """log(size) of every key, one tensor [B, 1, 1, P] per attention call of a block (packed: one
    between each two of ``bounds``).
    """
    logs = [u.sizes.log().repeat_interleave(members) for u in units]
    if bounds is None:
        return [torch.nn.functional.pad(torch.stack(logs), (prefix, 0))[:, None, None]]
    flat = torch.cat(logs)
    return [flat[a:b][None, None, None] for a, b in pairwise(bounds.tolist())]
