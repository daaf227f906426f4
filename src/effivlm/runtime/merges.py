"""Which tokens went into which, as a prompt remembers it."""

from collections.abc import Sequence
from typing import NamedTuple, Self

from torch import Tensor

from effivlm.methods.base import Merge

BEFORE_LLM = -1


class Merged(NamedTuple):
    """One merge of one image.

    Attributes:
        layer: decoder layer before which it happened, `BEFORE_LLM` for none. row: of the batch.
        target, source: [E] long, logical indices: the token at ``target[e]`` took in the one at
            ``source[e]``.
    """

    layer: int
    row: int
    target: Tensor
    source: Tensor

    @classmethod
    def at(cls, layer: int, row: int, slots: Tensor, merge: Merge) -> Self:
        """A merge among the tokens at ``slots`` [n]."""
        target, source = (x.to(slots.device) for x in (merge.target, merge.source))
        return cls(layer, row, slots[target], slots[source])


def merged_before(merges: Sequence[Merged]) -> list[Merged]:
    """Those that happened before the LLM."""
    return [m for m in merges if m.layer == BEFORE_LLM]
