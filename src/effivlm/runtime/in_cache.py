"""The cache: which entries of a layer stay, and how many."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effivlm.methods.base import Entries, KVCache, KVFormat, KVMerge, LayerCache
from effivlm.ops.precision import working, working_dtype
from effivlm.runtime.audit import check_entries, check_stored
from effivlm.runtime.before_llm import Notes
from effivlm.runtime.cache import slot_layers
from effivlm.runtime.packed import PackedLayer
from effivlm.runtime.slots import SlotLayer
from effivlm.runtime.tokens import Prompt
from effivlm.setting import Part


@dataclass
class Scored:
    """One cache method's reading of one layer: per row, scores [KV, M] and a statistic."""

    scores: list[Tensor]
    statistics: list[float]


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
    index, valid = prompt.kept[number]
    for row in range(len(index)):
        alive = alive_slots(prompt, index, valid, row)
        keys, values = (_pick(x[row], alive) for x in layer.stored())
        where = index[row, alive]
        image = torch.full_like(where, -1)
        for picture in prompt.images:
            if picture.row == row:
                image[torch.isin(where, picture.slots)] = picture.number
        read = source(row, alive, image) if source is not None else _no_signals
        out.append(
            LayerCache(
                read,
                method.signals,
                hash((prompt.keys[row], number)),
                notes.setdefault((method.name, row), {}),
                keys,
                values,
                image,
                where,
                number,
                layers,
            )
        )
    return out


def waits(part: Part) -> bool:
    """Whether a cache method must see every layer before it can compress the first."""
    return isinstance(part.method, KVCache) and part.method.waits


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


def compress_layer(
    prompt: Prompt,
    layer: SlotLayer,
    number: int,
    part: Part,
    caches: list[LayerCache],
    scored: Scored,
    budgets: list[int],
) -> None:
    """Choose entries and narrow the layer to them; a layer whose rows all keep everything is left
    alone.
    """
    method = part.method
    assert isinstance(method, KVCache)
    chosen = []
    for cache, scores, k in zip(caches, scored.scores, budgets, strict=True):
        heads, length = cache.keys.shape[:2]
        if k >= length:
            chosen.append(
                Entries(torch.ones(heads, length, dtype=torch.bool, device=cache.keys.device))
            )
            continue
        entries = method.choose(cache, scores, k)
        check_entries(method, entries, k, length, heads)
        chosen.append(entries)
    if all(bool(e.keep.all()) for e in chosen):
        return
    index, valid = prompt.kept[number]
    apply_entries(
        layer, [alive_slots(prompt, index, valid, row) for row in range(len(index))], chosen
    )


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


def alive_slots(prompt: Prompt, index: Tensor, valid: Tensor | None, row: int) -> Tensor:
    """[M] long: slots of a row that are neither batch padding nor budget padding."""
    ok = prompt.real[row].gather(0, index[row])
    return (ok if valid is None else ok & valid[row]).nonzero()[:, 0]


def _pick(x: Tensor, slots: Tensor) -> Tensor:
    """X [KV, S, d] at slots; a view where nothing is left out or only a prefix is."""
    if len(slots) and int(slots[-1]) - int(slots[0]) + 1 == len(slots):
        return x[:, int(slots[0]) : int(slots[-1]) + 1]
    return x[:, slots]


def _no_signals(signal: Any) -> Tensor:
    raise RuntimeError(f"{signal!r} was read while choosing entries: read signals in `score`")


def apply_entries(layer: SlotLayer, alive: list[Tensor], chosen: list[Entries]) -> None:
    """Keep the chosen entries of every row.

    Args:
        layer: holds [B, KV, S, d] and index [B, S].
        alive: per row, [M] slots that count (not padding), ascending.
        chosen: per row, entries over those M.
    """
    keys, values = layer.stored()
    if any(e.merged is not None for e in chosen):
        keys, values = _merged(keys, values, alive, chosen)
    counts = [int(e.keep.sum(1).max()) for e in chosen]
    ragged = any(bool((e.keep.sum(1) != max(counts)).any()) for e in chosen)
    shared = not ragged and all(bool((e.keep == e.keep[:1]).all()) for e in chosen)
    slots, valid = _padded(alive, chosen, max(counts), keys.shape[1])
    keys, values = (torch.take_along_dim(x, slots[..., None], 2) for x in (keys, values))
    if ragged:  # what pads short heads is masked, and nothing that 0 times it could be NaN of
        keys, values = (x.masked_fill(~valid[..., None], 0) for x in (keys, values))
    assert layer.index is not None
    index = torch.take_along_dim(layer.index[:, None], slots, 2)
    layer.narrow(keys, values, index[:, 0] if shared else index, valid if ragged else None)


def _padded(
    alive: list[Tensor], chosen: list[Entries], width: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Slots [B, KV, width], short rows padded on the left with their first slot, and which of them
    count.
    """
    slots = alive[0].new_zeros(len(chosen), heads, width)
    valid = torch.zeros(len(chosen), heads, width, dtype=torch.bool, device=slots.device)
    for b, (where, entries) in enumerate(zip(alive, chosen, strict=True)):
        keep = entries.keep.to(where.device)
        counts = keep.sum(1)
        order = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[
            :, -width:
        ]  # kept last, ascending
        if order.shape[1] < width:  # a row with fewer tokens than another row keeps
            order = torch.cat([order.new_zeros(heads, width - order.shape[1]), order], 1)
        slots[b] = where[order]
        valid[b] = torch.arange(width, device=slots.device) >= width - counts[:, None]
    return slots, valid


def _merged(
    keys: Tensor, values: Tensor, alive: list[Tensor], chosen: list[Entries]
) -> tuple[Tensor, Tensor]:
    keys, values = keys.clone(), values.clone()
    for b, (where, entries) in enumerate(zip(alive, chosen, strict=True)):
        if (m := entries.merged) is None or m.target.numel() == 0:
            continue
        for x in (keys[b], values[b]) if m.keys else (values[b],):
            _merge_rows(x, where, m)
    return keys, values


def _merge_rows(x: Tensor, where: Tensor, m: KVMerge) -> None:
    """X [KV, S, d], in place: targets become weighted sums of the original sources, in float32."""
    head, target, source = m.head, where[m.target], where[m.source]
    rows = torch.zeros(x.shape, dtype=working_dtype(x), device=x.device)
    rows.index_put_(
        (head, target), working(m.weight[:, None]) * working(x[head, source]), accumulate=True
    )
    x[head, target] = rows[head, target].to(x.dtype)
