"""What was asked against what is in the tensors; a mismatch is an error, never a table row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effivlm.errors import EffivlmError
from effivlm.methods.base import Entries, Merge, Method
from effivlm.runtime.account import Account
from effivlm.runtime.packed import PackedLayer, bytes_stored
from effivlm.runtime.slots import SlotLayer
from effivlm.runtime.tokens import Prompt
from effivlm.setting import Part


class AuditError(EffivlmError, RuntimeError):
    """The tensors do not hold what the setting promises, or a method broke its contract."""


@dataclass(frozen=True)
class PlannedCut:
    """One image's cut at a decoder layer: which method cuts which image (index into
    ``Prompt.images``) to how many.
    """

    method: Method
    image: int
    keep: int


@dataclass
class Promise:
    """What a prefill will hold, known from budgets before any layer has run.

    Attributes:
        before: per image, tokens entering the LLM. cuts: layer -> planned cuts.
    """

    before: list[int]
    cuts: dict[int, list[PlannedCut]] = field(default_factory=dict)

    def visual(self, prompt: Prompt, row: int, layer: int) -> int:
        """Visual tokens of a row entering a layer."""
        total = 0
        for number, image in enumerate(prompt.images):
            if image.row == row:
                counts = [self.before[number]]
                counts += [
                    c.keep
                    for at in sorted(self.cuts)
                    if at <= layer
                    for c in self.cuts[at]
                    if c.image == number
                ]
                total += min(counts)
        return total

    def tokens(self, prompt: Prompt, row: int, layer: int) -> int:
        """All tokens of a row entering a layer, padding apart."""
        return prompt.texts[row] + self.visual(prompt, row, layer)


def audit_prompt(prompt: Prompt, promise: Promise, layers: int, cache: Any) -> list[Account]:
    """Compare what the tensors hold with the promise, and count the cost of every row.

    Raises:
        AuditError: on any mismatch.
    """
    rows = range(len(prompt.keys))
    padding = [int((~prompt.real[row]).sum()) for row in rows]
    widths = [
        max(promise.tokens(prompt, row, i) + padding[row] for row in rows) for i in range(layers)
    ]
    check_layers("tokens", widths, [prompt.lengths[i] for i in range(layers)])
    return [_account(prompt, promise, layers, row, cache) for row in rows]


def _account(prompt: Prompt, promise: Promise, layers: int, row: int, cache: Any) -> Account:
    visual, tokens = [], []
    for i in range(layers):
        index, valid = prompt.kept[i]
        ok = prompt.real[row, index[row]]
        ok = ok if valid is None else ok & valid[row]
        visual.append(int((prompt.visual[row, index[row]] & ok).sum()))
        tokens.append(int(ok.sum()))
    check_layers("visual tokens", [promise.visual(prompt, row, i) for i in range(layers)], visual)
    held, size, stored = [], [], []
    slots = cache.layers if cache is not None else ()
    for layer in (x for x in slots if isinstance(x, SlotLayer)):
        counts = _held(prompt, layer, row)
        held.append(float(counts.float().mean()))
        of_entries, of_tensors = layer.bytes_of(counts)
        size.append(of_entries)
        stored.append(of_tensors)
    real, seen = int(prompt.real[row].sum()), int(prompt.visual[row].sum())
    return Account(
        real, seen, tuple(visual), tuple(tokens), tuple(held), tuple(size), tuple(stored)
    )


def _held(prompt: Prompt, layer: SlotLayer, row: int) -> Tensor:
    """[KV], or [] if all heads hold the same: prompt entries a layer holds for a row, counted in
    its tensors.
    """
    assert layer.index is not None
    stored = layer.stored()[0].shape[-2] - (layer.seen - layer.prompt)
    if layer.index.shape[-1] != stored:
        raise AuditError(
            f"a cache layer holds {stored} prompt entries and indexes {layer.index.shape[-1]}"
        )
    place = layer.index[row] - prompt.past
    ok = prompt.real[row][place.clamp(min=0)] & (place >= 0)  # of this turn
    if layer.valid is not None:
        ok = ok & layer.valid[row]
    return ok.sum(-1)


def check_selection(method: Method, keep: Tensor, merged: Merge | None, k: int, n: int) -> None:
    """A selection is ascending, unique, in range, of the promised size; merges stand on kept tokens
    and are finite.

    Raises:
        AuditError: naming the method and what is wrong.
    """
    name, count = method.name, len(keep)
    if keep.dtype != torch.long or keep.ndim != 1:
        raise AuditError(
            f"{name} returned keep of {keep.dtype} {tuple(keep.shape)}: expected 1-D long indices"
        )
    if count and (int(keep.min()) < 0 or int(keep.max()) >= n):
        raise AuditError(
            f"{name} kept indices in [{int(keep.min())}, {int(keep.max())}], but was given {n}"
            " tokens"
        )
    if bool((keep.diff() <= 0).any()):
        raise AuditError(
            f"{name} returned indices that are not strictly ascending: sort them and drop repeats"
        )
    if count > k or (method.exact and count != k):
        raise AuditError(f"{name} was asked to keep {k} of {n} tokens and kept {count}")
    if merged is not None:
        _check_merge(name, merged, keep, n)


def _check_merge(name: str, merged: Merge, keep: Tensor, n: int) -> None:
    if not len(merged.target) == len(merged.source) == len(merged.weight):
        raise AuditError(f"{name} returned a merge of unequal lengths")
    if len(merged.target) and not bool(torch.isin(merged.target, keep).all()):
        raise AuditError(f"{name} merges into tokens it does not keep")
    if len(merged.source) and (int(merged.source.min()) < 0 or int(merged.source.max()) >= n):
        raise AuditError(f"{name} merges tokens outside the {n} it was given")
    if not bool(merged.weight.isfinite().all()):
        raise AuditError(f"{name} returned merge weights that are not finite")


def check_entries(method: Method, entries: Entries, k: int, length: int, heads: int) -> None:
    """Cache entries have the right shape and, summed over heads, the promised count.

    Raises:
        AuditError: naming the method and what is wrong.
    """
    keep = entries.keep
    if keep.shape != (heads, length) or keep.dtype != torch.bool:
        raise AuditError(
            f"{method.name} returned entries {keep.dtype} {tuple(keep.shape)}: expected bool"
            f" {(heads, length)}"
        )
    total, promised = int(keep.sum()), k * heads
    if total > promised or (method.exact and total != promised):
        raise AuditError(
            f"{method.name} was asked to keep {promised} entries over {heads} heads and kept"
            f" {total}"
        )
    if entries.merged is not None:
        m = entries.merged
        if not bool(keep[m.head, m.target].all()):
            raise AuditError(f"{method.name} merges into cache entries it does not keep")


def check_stored(part: Part, layer: PackedLayer, number: int) -> None:
    """The tensors of a layer hold the bytes that its format says, filling included.

    Raises:
        AuditError: naming the layer.
    """
    rows, heads, slots, width = layer.stored()[0].shape
    size = SlotLayer.stored(layer)[0].element_size()
    filled = slots + layer.filling
    promised = rows * heads * bytes_stored(layer.format, filled, width, size)
    if layer.bytes_held() != promised:
        raise AuditError(
            f"layer {number} holds {layer.bytes_held()} bytes, {part} promises {promised} for"
            f" {filled} slots of {rows * heads} heads"
        )


def check_layers(what: str, promised: Sequence[int], found: Sequence[int]) -> None:
    """Per-layer counts in the tensors are those promised.

    Raises:
        AuditError: naming the first layer that differs.
    """
    for layer, (a, b) in enumerate(zip(promised, found, strict=True)):
        if a != b:
            raise AuditError(
                f"layer {layer} holds {b} {what}, the setting promises {a} "
                f"(all layers: promised {list(promised)}, found {list(found)})"
            )
