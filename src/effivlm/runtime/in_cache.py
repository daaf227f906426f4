"""The cache: which entries of a layer stay, and how many.

How many is known before the first layer runs, so no layer waits for the device: what is in the
tensors is asked at the end, of all layers at once (`Checks`). Methods whose counts follow from the
tensors choose at the end too (`at_the_end`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effivlm.methods.base import KVCache, KVFormat, KVMerge, LayerCache
from effivlm.ops.numbers import floats
from effivlm.ops.precision import working, working_dtype
from effivlm.runtime.audit import Checks, ask_entries, check_stored
from effivlm.runtime.before_llm import Notes
from effivlm.runtime.cache import slot_layers
from effivlm.runtime.packed import PackedLayer
from effivlm.runtime.rows import Row
from effivlm.runtime.slots import SlotLayer
from effivlm.runtime.tokens import Prompt
from effivlm.setting import Part


@dataclass
class Scored:
    """One cache method's reading of one layer: per row, scores [KV, M] and a statistic."""

    scores: list[Tensor]
    statistics: list[Tensor | float]


@dataclass
class Choice:
    """What one row of a layer keeps.

    Attributes:
        keep: [KV, M] bool, or [1, M] where all heads keep the same; None for everything.
        merged: or None. counts: entries of every head, or of all heads alike ([k]).
    """

    keep: Tensor | None
    merged: KVMerge | None
    counts: list[int]


def layer_caches(
    prompt: Prompt,
    layer: SlotLayer,
    number: int,
    layers: int,
    part: Part,
    notes: Notes,
    source: Any = None,
) -> list[LayerCache]:
    """One context per row; padding of either kind is left out."""
    method, out = part.method, []
    stored = layer.stored()
    for b, row in enumerate(prompt.rows(*prompt.kept[number])):
        keys, values = (row.pick(x[b]) for x in stored)
        out.append(
            LayerCache(
                source(b, row) if source is not None else _no_signals,
                method.signals,
                hash((prompt.keys[b], number)),
                notes.setdefault((method.name, b), {}),
                keys,
                values,
                row.image,
                row.index,
                number,
                layers,
            )
        )
    return out


def at_the_end(part: Part) -> bool:
    """Whether no layer is compressed before the last has run: the counts need every layer's
    statistic, or are in the tensors, where asking layer by layer would stop the device each time.
    """
    method = part.method
    return isinstance(method, KVCache) and (method.waits or method.uneven)


def score_layer(part: Part, caches: list[LayerCache], counts: list[int]) -> Scored:
    """Ask a cache method for its scores while the layer's queries are at hand; ``counts``: entries
    per KV head, row by row, as far as they are known.
    """
    method = part.method
    assert isinstance(method, KVCache)
    return Scored(
        [method.score(c, k) for c, k in zip(caches, counts, strict=True)],
        [method.statistic(c) if method.waits else 0.0 for c in caches],
    )


def known_statistics(part: Part, scored: Sequence[Scored]) -> list[tuple[float, ...]] | None:
    """[rows][layers] statistics of a method that waits for them, those in tensors read in one
    transfer; None of another.
    """
    if not (isinstance(part.method, KVCache) and part.method.waits):
        return None
    flat = [x for layer in scored for x in layer.statistics]
    tensors = [x for x in flat if isinstance(x, Tensor)]
    first = [x.to(tensors[0].device, torch.float64) for x in tensors]
    read = iter(floats(torch.stack(first)) if first else [])
    known = [next(read) if isinstance(x, Tensor) else float(x) for x in flat]
    rows = len(scored[0].statistics)
    return [tuple(known[row::rows]) for row in range(rows)]


def choose(
    part: Part, caches: list[LayerCache], scored: Scored, budgets: list[int], checks: Checks
) -> list[Choice]:
    """What every row of a layer keeps: ``budgets`` entries per KV head. Where heads share an
    uneven budget, how many each keeps is known once ``checks`` are settled.
    """
    method, out = part.method, []
    assert isinstance(method, KVCache)
    for cache, scores, k in zip(caches, scored.scores, budgets, strict=True):
        heads, length = cache.keys.shape[:2]
        if k >= length:
            out.append(Choice(None, None, [length]))
            continue
        entries = method.choose(cache, scores, k)
        choice = Choice(_distinct(entries.keep), entries.merged, [k])
        ask_entries(checks, method, entries, k, length, heads, choice.counts, cache.layer)
        out.append(choice)
    return out


def store(prompt: Prompt, cache: Any, part: Part) -> None:
    """Store a prefilled cache (or a fork of it) in a part's format, layer by layer, in place.

    Raises:
        AuditError: if the tensors hold other bytes than the format says.
    """
    method = part.method
    assert isinstance(method, KVFormat)
    for i, layer in enumerate(slot_layers(cache)):
        assert layer.index is not None
        real, place = prompt.real, layer.index - prompt.past
        if place.ndim == 3:
            real = real[:, None].expand(-1, place.shape[1], -1)
        counts = real.gather(-1, place)
        counts = counts if layer.valid is None else counts & layer.valid
        cache.layers[i] = packed = PackedLayer(layer, method.format, counts)
        check_stored(part, packed, i)


def compress_all(
    prompt: Prompt,
    slots: Sequence[SlotLayer],
    part: Part,
    scored: Sequence[Scored],
    counts: list[list[int]],
    notes: Notes,
) -> None:
    """Compress every layer of a prefilled cache to ``counts`` [layers][rows], in place."""
    chosen, checks = [], Checks()
    for i, layer in enumerate(slots):
        caches = layer_caches(prompt, layer, i, len(slots), part, notes)
        chosen.append(choose(part, caches, scored[i], counts[i], checks))
    checks.settle()
    for i, (layer, choices) in enumerate(zip(slots, chosen, strict=True)):
        apply_choices(layer, prompt.rows(*prompt.kept[i]), choices)


def _distinct(keep: Tensor) -> Tensor:
    """[1, M] of [KV, M] whose heads are one stored row."""
    return keep if keep.stride(0) else keep[:1]


def _no_signals(signal: Any) -> Tensor:
    raise RuntimeError(f"{signal!r} was read while choosing entries: read signals in `score`")


def apply_choices(layer: SlotLayer, rows: list[Row], choices: list[Choice]) -> None:
    """Keep the chosen entries of every row; a layer whose rows all keep everything is left alone.

    Args:
        layer: holds [B, KV, S, d] and index [B, S].
        rows: the tokens that count among those S.
        choices: per row, entries over those tokens.
    """
    if all(c.keep is None for c in choices):
        return
    keys, values = layer.stored()
    if any(c.merged is not None for c in choices):
        keys, values = _merged(keys, values, rows, choices)
    counts = [n for c in choices for n in c.counts]
    width, ragged = max(counts), min(counts) < max(counts)
    heads = max(1 if c.keep is None else len(c.keep) for c in choices)
    chosen = [_slots(r, c, width, heads) for r, c in zip(rows, choices, strict=True)]
    slots = chosen[0][None] if len(chosen) == 1 else torch.stack(chosen)
    where = slots[..., None].expand(-1, keys.shape[1], -1, keys.shape[-1])
    keys, values = keys.gather(2, where), values.gather(2, where)
    index, valid = _index(layer, slots), None
    if ragged:  # what pads short heads is masked, and nothing that 0 times it could be NaN of
        valid = _counted(choices, width, heads, slots.device)
        keys, values = (x.masked_fill(~valid[..., None], 0) for x in (keys, values))
    if heads == 1:
        index, valid = index[:, 0], None if valid is None else valid[:, 0]
    layer.narrow(keys, values, index, valid)


def _slots(row: Row, choice: Choice, width: int, heads: int) -> Tensor:
    """[heads, width] slots, ascending; short heads padded on the left with what they do not
    keep, short rows with their first slot.
    """
    if choice.keep is None:
        slots = row.slots.expand(heads, -1)
    else:  # kept last, ascending
        order = choice.keep.sort(dim=1, stable=True).indices[:, -width:]
        whole = row.start == 0
        slots = (order if whole else row.slots[order]).expand(heads, -1)
    if slots.shape[1] == width:
        return slots
    first = row.slots[:1].expand(heads, width - slots.shape[1])
    return torch.cat([first, slots], 1)


def _counted(choices: list[Choice], width: int, heads: int, device: torch.device) -> Tensor:
    """[B, heads, width] bool: which of the slots count."""
    counts = torch.tensor(
        [c.counts if len(c.counts) == heads else c.counts * heads for c in choices], device=device
    )
    return torch.arange(width, device=device) >= width - counts[..., None]


def _index(layer: SlotLayer, slots: Tensor) -> Tensor:
    """[B, heads, width] logical indices of the entries at ``slots``."""
    assert layer.index is not None
    if layer.whole:
        return slots
    return layer.index[:, None].expand(-1, slots.shape[1], -1).gather(2, slots)


def _merged(
    keys: Tensor, values: Tensor, rows: list[Row], choices: list[Choice]
) -> tuple[Tensor, Tensor]:
    keys, values = keys.clone(), values.clone()
    for b, (row, choice) in enumerate(zip(rows, choices, strict=True)):
        if (m := choice.merged) is None or m.target.numel() == 0:
            continue
        for x in (keys[b], values[b]) if m.keys else (values[b],):
            _merge_rows(x, row.slots, m)
    return keys, values


def _merge_rows(x: Tensor, where: Tensor, m: KVMerge) -> None:
    """X [KV, S, d], in place: targets become weighted sums of the original sources, in float32."""
    head, target, source = m.head, where[m.target], where[m.source]
    rows = torch.zeros(x.shape, dtype=working_dtype(x), device=x.device)
    rows.index_put_(
        (head, target), working(m.weight[:, None]) * working(x[head, source]), accumulate=True
    )
    x[head, target] = rows[head, target].to(x.dtype)
