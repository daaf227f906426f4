"""What was asked against what is in the tensors; a mismatch is an error, never a table row."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effivlm.errors import EffivlmError
from effivlm.methods.base import Entries, KVCache, Merge, Method
from effivlm.ops.numbers import whole
from effivlm.runtime.account import Account
from effivlm.runtime.packed import PackedLayer, bytes_stored
from effivlm.runtime.promise import Promise
from effivlm.runtime.slots import SlotLayer
from effivlm.runtime.tokens import Prompt
from effivlm.setting import Part


class AuditError(EffivlmError, RuntimeError):
    """The tensors do not hold what the setting promises, or a method broke its contract."""


class Checks:
    """Questions to tensors, gathered on the way and answered in one transfer."""

    def __init__(self) -> None:
        self._asked: list[tuple[Tensor, Callable[[list[int]], None]]] = []

    def ask(self, found: Tensor, judge: Callable[[list[int]], None]) -> None:
        """Have ``judge`` see the whole numbers in ``found`` (flattened) once they are read."""
        self._asked.append((found, judge))

    def settle(self) -> None:
        """Read all answers. Raises what the judges raise."""
        asked, self._asked = self._asked, []
        if not asked:
            return
        device = asked[0][0].device
        values = whole(torch.cat([x.to(device, torch.long).flatten() for x, _ in asked]))
        start = 0
        for found, judge in asked:
            judge(values[start : start + found.numel()])
            start += found.numel()


def audit_prompt(
    prompt: Prompt, promise: Promise, layers: int, cache: Any, checks: Checks
) -> list[Account]:
    """Compare what the tensors hold with the promise, and count the cost of every row; ``checks``
    are settled with it.

    Raises:
        AuditError: on any mismatch.
    """
    rows = range(len(prompt.keys))
    slots = [x for x in (cache.layers if cache is not None else ()) if isinstance(x, SlotLayer)]
    tokens = promise.lengths(prompt, layers)
    found = [_asked(prompt, layers, row, slots, checks) for row in rows]
    checks.settle()
    padding = [prompt.length - prompt.texts[row] - found[row].seen[0] for row in rows]
    widths = [max(tokens[row][i] + padding[row] for row in rows) for i in range(layers)]
    check_layers("tokens", widths, [prompt.lengths[i] for i in range(layers)])
    return [_account(prompt, promise, layers, row, slots, found[row]) for row in rows]


@dataclass
class _Found:
    """What a row's tensors hold: visual tokens of the prompt; [layers] of those entering; [layers]
    entries of every head, or of all alike.
    """

    seen: list[int]
    visual: dict[int, list[int]]
    held: list[list[int]]


def _asked(
    prompt: Prompt, layers: int, row: int, slots: Sequence[SlotLayer], checks: Checks
) -> _Found:
    found, seen = _Found([], {}, [[] for _ in slots]), prompt.visual[row]
    checks.ask(seen.sum(), found.seen.extend)
    for i in range(layers):
        here = prompt.rows(*prompt.kept[i])[row]
        if id(here) not in found.visual:
            found.visual[id(here)] = answer = []
            checks.ask(seen[here.index].sum(), answer.extend)
    for layer, answer in zip(slots, found.held, strict=True):
        counts = _held(prompt, layer, row)
        answer.append(counts) if isinstance(counts, int) else checks.ask(counts, answer.extend)
    return found


def _account(
    prompt: Prompt,
    promise: Promise,
    layers: int,
    row: int,
    slots: Sequence[SlotLayer],
    found: _Found,
) -> Account:
    here = [prompt.rows(*prompt.kept[i])[row] for i in range(layers)]
    visual, tokens = [found.visual[id(x)][0] for x in here], [x.count for x in here]
    check_layers("visual tokens", promise.visual(prompt, row, layers), visual)
    held, size, stored = [], [], []
    for layer, counts in zip(slots, found.held, strict=True):
        held.append(sum(counts) / len(counts))
        of_entries, of_tensors = layer.bytes_of(counts)
        size.append(of_entries)
        stored.append(of_tensors)
    seen = found.seen[0]
    return Account(
        prompt.texts[row] + seen,
        seen,
        tuple(visual),
        tuple(tokens),
        tuple(held),
        tuple(size),
        tuple(stored),
    )


def _held(prompt: Prompt, layer: SlotLayer, row: int) -> Tensor | int:
    """[KV], or one number if all heads hold the same: prompt entries a layer holds for a row,
    counted in its tensors.
    """
    assert layer.index is not None
    stored = layer.stored()[0].shape[-2] - (layer.seen - layer.prompt)
    if layer.index.shape[-1] != stored:
        raise AuditError(
            f"a cache layer holds {stored} prompt entries and indexes {layer.index.shape[-1]}"
        )
    if not (prompt.padded or prompt.past) and layer.valid is None:
        return stored
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


def check_entries(method: KVCache, entries: Entries, k: int, length: int, heads: int) -> None:
    """`ask_entries`, at once. Raises AuditError naming the method and what is wrong."""
    checks = Checks()
    ask_entries(checks, method, entries, k, length, heads, [])
    checks.settle()


def ask_entries(
    checks: Checks,
    method: KVCache,
    entries: Entries,
    k: int,
    length: int,
    heads: int,
    counts: list[int],
    layer: int = 0,
) -> None:
    """Cache entries have the right shape and the promised count: ``k`` a head, or summed over
    heads where the method is `uneven`; ``counts`` are then set to what every head keeps.

    Raises:
        AuditError: at once or when ``checks`` settle, naming the method, the layer, and what is
            wrong.
    """
    keep, name = entries.keep, f"{method.name} at decoder layer {layer}"
    if keep.shape != (heads, length) or keep.dtype != torch.bool:
        raise AuditError(
            f"{name} returned entries {keep.dtype} {tuple(keep.shape)}: expected bool"
            f" {(heads, length)}"
        )

    def judge(found: list[int]) -> None:
        total, promised = sum(found), k * heads
        if total > promised or (method.exact and total != promised):
            raise AuditError(
                f"{name} was asked to keep {promised} entries over {heads} heads and kept {total}"
            )
        if not method.uneven and max(found) != min(found):
            raise AuditError(
                f"{name} kept unequal counts {found} of its heads: a method that does must say so"
                " (`uneven`)"
            )
        if method.uneven:
            counts[:] = found

    checks.ask(keep.sum(1), judge)
    if (m := entries.merged) is not None:
        checks.ask(keep[m.head, m.target].all(), functools.partial(_merges_stand, name))


def _merges_stand(name: str, kept: list[int]) -> None:
    if not kept[0]:
        raise AuditError(f"{name} merges into cache entries it does not keep")


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
