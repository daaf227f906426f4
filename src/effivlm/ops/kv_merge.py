"""Merging evicted cache entries into kept ones: who goes where, with what weights. One KV head at a
time; M entries.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from effivlm.ops.numbers import parts
from effivlm.ops.select import unit

Summands = Float[Tensor, "E"]
Weights = Callable[[Summands, Summands], tuple[Summands, Summands]]


def nearest_kept(
    keys: Float[Tensor, "M d"],
    keep: Bool[Tensor, "M"],
    kind: Shaped[Tensor, "M"] | None = None,
    block: int = 1024,
    kept_count: int | None = None,
) -> tuple[Int[Tensor, "E"], Int[Tensor, "E"], Summands]:
    """Every evicted entry's most similar kept key, by cosine, ties by lower index.

    Args:
        keys: one head's.
        keep: which stay.
        kind: an entry only goes to one of its own kind, or nowhere.
        block: evicted entries compared at a time, which bounds memory.
        kept_count: how many are kept, where that is known: then the device is not asked.

    Returns:
        source and target, indices into M, and their cosine; entries with nowhere to
        go are left out.
    """
    x = unit(keys)
    kept, evicted = _apart(keep, kept_count)
    if not len(kept):
        return evicted[:0], evicted[:0], x.new_zeros(0)
    target, cosine = [kept[:0]], [x.new_zeros(0)]
    for rows in parts(evicted, block):
        similar = x[rows] @ x[kept].T
        if kind is not None:
            similar = similar.masked_fill(kind[rows][:, None] != kind[kept], -torch.inf)
        best = similar.max(1).values
        first = (similar == best[:, None]).int().argmax(1)
        target.append(kept[first])
        cosine.append(best)
    to, cos = torch.cat(target), torch.cat(cosine)
    if kind is None:  # all have found one
        return evicted, to, cos
    found = cos > -torch.inf
    return evicted[found], to[found], cos[found]


def _apart(keep: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Indices of kept and of evicted entries, ascending."""
    if count is None:
        return keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
    order = keep.sort(stable=True).indices
    return order[len(keep) - count :], order[: len(keep) - count]


def averaged(members: Summands, cosine: Summands) -> tuple[Summands, Summands]:
    """Weights (own, member) of ``(x_c + sum x_e) / (n + 1)``; ``members``: n of its target."""
    return 1 / (members + 1), 1 / (members + 1)


def pivotal(members: Summands, cosine: Summands) -> tuple[Summands, Summands]:
    """Weights of ``(x_c + sum (x_e + x_c) / 2) / (n + 1)``."""
    return (1 + members / 2) / (members + 1), 0.5 / (members + 1)


def weighted(members: Summands, cosine: Summands) -> tuple[Summands, Summands]:
    """Weights of ``(x_c + sum cos * x_e) / (n + 1)``."""
    return 1 / (members + 1), cosine / (members + 1)


MERGERS: dict[str, Weights] = {"averaged": averaged, "pivotal": pivotal, "weighted": weighted}


def merge_entries(
    keys: Float[Tensor, "M d"],
    keep: Bool[Tensor, "M"],
    how: str,
    kind: Shaped[Tensor, "M"] | None = None,
    kept_count: int | None = None,
) -> tuple[Int[Tensor, "E"], Int[Tensor, "E"], Summands]:
    """(target, source, weight) of one head's linear merge, each target's own contribution included.

    Args:
        keys: one head's.
        keep: which stay.
        how: a name in ``MERGERS``.
        kind: see `nearest_kept`.
        kept_count: likewise; entries that nobody joins then stand as merges of themselves alone.
    """
    source, target, cosine = nearest_kept(keys, keep, kind, kept_count=kept_count)
    count = cosine.new_zeros(len(keep)).index_add_(0, target, torch.ones_like(cosine))
    own, member = MERGERS[how](count[target], cosine)
    used = count.nonzero()[:, 0] if kept_count is None else _apart(keep, kept_count)[0]
    # equal for all members of a target
    share = torch.ones_like(count).index_put_((target,), own)[used]
    return torch.cat([used, target]), torch.cat([used, source]), torch.cat([share, member])
