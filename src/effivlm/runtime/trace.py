"""What became of every visual token of a prompt: layer by layer, head by head, merge by merge.

A trace is read off what a finished prefill left behind; it costs nothing unless it is asked for.
`PromptTrace.compact` is the form that records and pages hold::

    {"images": [{"tokens": 64, "tiles": 1, "depth": 4, "grid": [8, 8],
                 "layers": [[0, "ff..."], [2, "0f..."]],
                 "cache": [["3c..."], ["3c...", "a1..."]],
                 "merged": [[-1, [5, 5], [6, 7]]]}]}

A digit stands for four tokens. ``layers``: from this layer on; ``cache``: layer by layer, one for
all heads or one a head, absent where the cache is whole; ``merged``: before this layer, into, from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effivlm.runtime.tokens import Image, Prompt

Held = Sequence[tuple[Tensor | None, Tensor | None]]  # per layer: index and valid of a slot layer


@dataclass(frozen=True)
class ImageTrace:
    """One image of one prompt; n placeholders, KV heads.

    Attributes:
        place: [n, 2] row and column in the unit, NaN without. unit: [n] long, tile or mosaic.
        tiles: pieces it was encoded as.
        layers: [layers, n] bool, in play at the entry of every decoder layer.
        cache: [layers, KV or 1, n] bool, held by the cache after the prompt; None without a cache.
        merged: (layer, into [E], from [E]): offsets among the n; layer -1 is before the LLM.
    """

    place: Tensor
    unit: Tensor
    tiles: int
    layers: Tensor
    cache: Tensor | None
    merged: tuple[tuple[int, Tensor, Tensor], ...]

    def compact(self) -> dict[str, Any]:
        """Plain data; see the module."""
        n = len(self.place)
        sizes = {"tokens": n, "tiles": self.tiles, "depth": len(self.layers)}
        out: dict[str, Any] = sizes | self._grid()
        changed = [
            i for i in range(len(self.layers)) if not (i and self._same(self.layers, i, i - 1))
        ]
        out["layers"] = [[i, digits(self.layers[i])] for i in changed]
        if self.cache is not None and not torch.equal(self.cache.all(1), self.layers):
            out["cache"] = [self._heads(heads) for heads in self.cache]
        out["merged"] = [
            [layer, into.tolist(), source.tolist()] for layer, into, source in self.merged
        ]
        return out

    @staticmethod
    def _same(x: Tensor, i: int, j: int) -> bool:
        return torch.equal(x[i], x[j])

    @staticmethod
    def _heads(heads: Tensor) -> list[str]:
        alike = bool((heads == heads[:1]).all())
        return [digits(h) for h in (heads[:1] if alike else heads)]

    def _grid(self) -> dict[str, Any]:
        """``grid`` where the tokens are one raster, else the unit, row and column of each."""
        known = self.place.isfinite().all(1)
        if bool(known.all()) and not bool(self.unit.any()):
            rows, columns = (int(x) + 1 for x in self.place.max(0).values.tolist())
            raster = torch.arange(rows * columns)
            here = self.place[:, 0] * columns + self.place[:, 1]
            if len(here) == len(raster) and torch.equal(here.long(), raster):
                return {"grid": [rows, columns]}
        place = self.place.nan_to_num(-1).long()
        return {"places": torch.cat([self.unit[:, None], place], 1).tolist()}


@dataclass(frozen=True)
class PromptTrace:
    """The images of one prompt, in order."""

    images: tuple[ImageTrace, ...]

    def compact(self) -> dict[str, Any]:
        """Plain data; see the module."""
        return {"images": [image.compact() for image in self.images]}


def digits(mask: Tensor) -> str:
    """A mask [n] as hexadecimal digits, four tokens each, the first the highest bit."""
    packed = np.packbits(mask.numpy().astype(bool)).tobytes().hex()
    return packed[: (len(mask) + 3) // 4]


def traces(prompt: Prompt, held: Held, layers: int) -> list[PromptTrace]:
    """One trace for every row of a finished prompt.

    Args:
        prompt: after its prefill.
        held: what its cache holds, or empty.
        layers: of the decoder.
    """
    rows = range(len(prompt.keys))
    return [
        PromptTrace(tuple(_image(prompt, i, held, layers) for i in prompt.images if i.row == row))
        for row in rows
    ]


def _image(prompt: Prompt, image: Image, held: Held, layers: int) -> ImageTrace:
    row, slots = image.row, image.slots
    seen = [_entered(prompt, row, layer, slots) for layer in range(layers)]
    cache = [_stored(prompt, row, index, valid, slots) for index, valid in held]
    heads = max((len(c) for c in cache), default=1)
    merged = [m for m in prompt.merges if m.row == row and bool(torch.isin(m.target, slots).all())]
    first = int(slots[0])
    offset = torch.full((int(slots[-1]) - first + 1,), -1, device=slots.device)
    offset[slots - first] = torch.arange(len(slots), device=slots.device)
    return ImageTrace(
        image.place.cpu(),
        image.unit.cpu(),
        max(1, len(image.pieces)),
        torch.stack(seen).cpu(),
        torch.stack([c.expand(heads, -1) for c in cache]).cpu() if cache else None,
        tuple(
            (m.layer, offset[m.target - first].cpu(), offset[m.source - first].cpu())
            for m in merged
            if len(m.target)
        ),
    )


def _entered(prompt: Prompt, row: int, layer: int, slots: Tensor) -> Tensor:
    index, valid = prompt.kept[layer]
    here = index[row] if valid is None else index[row][valid[row]]
    return torch.isin(slots, here)


def _stored(
    prompt: Prompt, row: int, index: Tensor | None, valid: Tensor | None, slots: Tensor
) -> Tensor:
    """[KV or 1, n] bool of the entries that a layer holds."""
    assert index is not None
    mine = index[row] - prompt.past
    mine = mine if mine.ndim == 2 else mine[None]
    if valid is None:
        return torch.stack([torch.isin(slots, m) for m in mine])
    ok = valid[row] if valid[row].ndim == 2 else valid[row][None]
    return torch.stack([torch.isin(slots, m[v]) for m, v in zip(mine, ok, strict=True)])
