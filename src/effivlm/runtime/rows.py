"""One prompt's tokens in play, found once for all layers that hold the same.

Shapes: L prompt length, M tokens in play (short rows padded on the left), m of them that count.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Row:
    """A batch row's tokens that are padding of neither kind.

    Attributes:
        slots: [m] long, their places among the M in play, ascending.
        start: the first slot, where slots are consecutive; None where they are not.
        index: [m] long, their logical indices.
        image: [m] long, the image each belongs to, -1 for text.
    """

    slots: Tensor
    start: int | None
    index: Tensor
    image: Tensor

    @property
    def count(self) -> int:
        """The m."""
        return len(self.slots)

    def pick(self, x: Tensor) -> Tensor:
        """[..., m, d] of x [..., M, d]; a view where slots are consecutive."""
        if self.start is None:
            return x[..., self.slots, :]
        whole = self.count == x.shape[-2]
        return x if whole else x[..., self.start : self.start + self.count, :]

    @functools.cached_property
    def visual(self) -> Tensor:
        """[n] long: which of the m are visual."""
        return (self.image >= 0).nonzero()[:, 0]

    @functools.cached_property
    def after_vision(self) -> int:
        """The first of the m behind the last visual one; without such, 32 from the end."""
        behind = int(self.visual[-1]) + 1 if len(self.visual) else 0
        return behind if 0 < behind < self.count else max(0, self.count - 32)


def row_of(index: Tensor, counts: Tensor | None, pictures: Tensor) -> Row:
    """A batch row's tokens that count.

    Args:
        index: [M] long, logical indices of the tokens in play.
        counts: [M] bool, or None where all do.
        pictures: [L] long, the image each token of the prompt belongs to, -1 for text.
    """
    if counts is None:
        slots = torch.arange(len(index), device=index.device)
        return Row(slots, 0, index, pictures[index])
    slots = counts.nonzero()[:, 0]
    first, last = slots[[0, -1]].tolist() if len(slots) else (0, -1)
    start = first if last - first + 1 == len(slots) else None
    return Row(slots, start, index[slots], pictures[index[slots]])
