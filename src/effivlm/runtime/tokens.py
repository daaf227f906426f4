"""Which tokens exist, which are visual, where they came from, and which are in play.

Shapes: B batch, L prompt length, M tokens in play (short rows padded on the left), D width.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effivlm.families.base import Piece
from effivlm.methods.base import Merge, Selection
from effivlm.ops.merge import apply
from effivlm.ops.precision import working
from effivlm.runtime.geometry import Side, scattered, to_index
from effivlm.runtime.merges import BEFORE_LLM, Merged
from effivlm.runtime.rows import Row, row_of


def merge_rows(
    x: Float[Tensor, "S D"], where: Int[Tensor, "n"], merge: Merge
) -> Float[Tensor, "S D"]:
    """A copy of x in which row ``where[target]`` is the weighted sum of rows
    ``where[source]``, in float32.
    """
    target, source = where[merge.target.to(x.device)], where[merge.source.to(x.device)]
    return apply(x, (target, source, working(merge.weight.to(x.device)))).to(x.dtype)


class Decisions:
    """What methods chose for a prompt, by place; a prompt that is fed again from its start (no
    cache) takes the same choices.
    """

    def __init__(self, before: "Decisions | None" = None) -> None:
        self._log: dict[Hashable, Selection] = {} if before is None else before._log

    def of(self, place: Hashable, ask: Callable[[], Selection]) -> Selection:
        """The choice made at a place, or a new one."""
        if place not in self._log:
            self._log[place] = ask()
        return self._log[place]


# --------------------------------------------------------------------------------------- the prompt
@dataclass
class Image:
    """One image of one prompt.

    Attributes:
        row: batch row. number: 0, 1, ... within the row. slots: logical places of its tokens.
        source: group in encoder order, -1 for tokens without one. place: row and column, or NaN.
        unit: pruning unit (tile, base, mosaic). newline: tokens that show no part of the image.
        pieces: what it was encoded as. last: its last placeholder is the last token of the prompt.
        entered: method -> tokens its first stage was given (methods with several stages).
    """

    row: int
    number: int
    slots: Int[Tensor, "n"]
    source: Int[Tensor, "n"]
    place: Float[Tensor, "n 2"]
    unit: Int[Tensor, "n"]
    newline: Bool[Tensor, "n"]
    entered: dict[str, int] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()
    last: bool = False


@dataclass
class Prompt:
    """State of one prefill; all indices are logical unless said otherwise.

    Attributes:
        real: False for the batch's own padding. images: all images, row by row.
        keys: per row, an integer that identifies the prompt.
        embeds: what would enter the LLM. side: sequence-aligned inputs of the text model
            (deep stack).
        index: tokens in play. valid: False for padding from unequal budgets, or None.
        rel: the same tokens as rows of the text model's input, or None: all of them.
        kept: layer -> (index, valid) of the tokens that entered it. lengths: layer -> tokens
            entering, read off tensors.
        decisions: what methods chose.
        cut: some token was dropped. padded: some token of the batch is padding.
        past: tokens of earlier turns. markers: see `Family`.
        written: merges inside the LLM: layer, row, logical indices [t] of the targets, their states
            [t, D]. merges: all of them. found: what `rows` found, by the indices asked for.
    """

    visual: Bool[Tensor, "B L"]
    real: Bool[Tensor, "B L"]
    images: list[Image]
    keys: list[int]
    embeds: Float[Tensor, "B L D"]
    side: Side | None
    index: Int[Tensor, "B M"]
    valid: Bool[Tensor, "B M"] | None = None
    rel: Int[Tensor, "B M"] | None = None
    kept: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    decisions: Decisions = field(default_factory=Decisions)
    cut: bool = False
    padded: bool = False
    past: int = 0
    markers: tuple[int, int] = (0, 0)
    written: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list)
    merges: list[Merged] = field(default_factory=list)
    found: dict[int, tuple[Tensor, list[Row]]] = field(default_factory=dict)

    @functools.cached_property
    def texts(self) -> list[int]:
        """Per row, tokens that are neither visual nor padding."""
        return (self.real & ~self.visual).sum(1).tolist()

    @functools.cached_property
    def pictures(self) -> Tensor:
        """[B, L] long: the image every token belongs to, -1 for text."""
        out = torch.full_like(self.visual, -1, dtype=torch.long)
        for image in self.images:
            out[image.row, image.slots] = image.number
        return out

    @property
    def counts(self) -> Bool[Tensor, "B M"]:
        """Tokens in play that are neither padding of one kind nor the other."""
        ok = self.real.gather(1, self.index)
        return ok if self.valid is None else ok & self.valid

    @property
    def length(self) -> int:
        """L, tokens of the uncompressed prompt."""
        return self.visual.shape[1]

    def row(self, row: int) -> Row:
        """The tokens in play of a batch row."""
        return self.rows(self.index, self.valid)[row]

    def rows(self, index: Tensor, valid: Tensor | None) -> list[Row]:
        """Every batch row's tokens, of those that are or were in play (`kept`)."""
        seen, rows = self.found.get(id(index), (None, []))
        if seen is not index:
            counts = self.real.gather(1, index) if self.padded else None
            if valid is not None:
                counts = valid if counts is None else counts & valid
            each = [None] * len(index) if counts is None else [*counts]
            rows = [row_of(*x) for x in zip(index, each, self.pictures, strict=True)]
            self.found[id(index)] = index, rows
        return rows

    def full(self, rows: Float[Tensor, "B M D"]) -> Float[Tensor, "B L D"]:
        """The last layer's output over the whole prompt: zeros for tokens that were dropped."""
        return scattered(rows, self.index, self.valid, self.length) if self.cut else rows

    def dropped(self) -> Bool[Tensor, "B L"]:
        """Tokens without an output."""
        gone = torch.ones_like(self.visual)
        return gone.scatter_(1, self.index, ~self.counts) & self.real

    def merge(self, row: int, slots: Int[Tensor, "n"], merge: Merge) -> None:
        """Write a merge of the tokens at ``slots`` into what will enter the LLM, deep-stack
        features included.
        """
        self.merges.append(Merged.at(BEFORE_LLM, row, slots, merge))
        embeds = self.embeds.clone()
        embeds[row] = merge_rows(self.embeds[row], slots, merge)
        self.embeds = embeds
        if self.side is not None:
            rank = (self.visual.flatten().long().cumsum(0) - 1).view_as(self.visual)[row, slots]
            levels = [merge_rows(f, rank, merge) for f in self.side.levels]
            self.side = replace(self.side, levels=levels)

    def narrow_inside(self, keep: Bool[Tensor, "B M"]) -> Int[Tensor, "B k"]:
        """`narrow` behind the text model's entry: ``rel`` follows."""
        sub = self.narrow(keep)
        self.rel = sub if self.rel is None else self.rel.gather(1, sub)
        return sub

    def narrow(self, keep: Bool[Tensor, "B M"]) -> Int[Tensor, "B k"]:
        """Keep ``keep`` of the tokens in play; returns the chosen positions among them."""
        sub, valid = to_index(keep)
        self.cut = True
        self.index = self.index.gather(1, sub)
        if self.valid is not None:
            valid = self.valid.gather(1, sub) & (True if valid is None else valid)
        self.valid = valid
        return sub
