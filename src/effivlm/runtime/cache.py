"""A cache layer that knows its logical length and its slots; fork, narrow, merge, bytes held.

*Logical* indices address the uncompressed prompt (0..L-1) and then the generated tokens (L, L+1,
...). A layer stores fewer entries (its *slots*) but reports the logical length, so positions, rope
deltas, continuation and mask sizes stay those of the uncompressed run; the decode hook gathers the
mask columns that a layer physically holds.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from effivlm.methods.base import Entries, KVMerge
from effivlm.ops.precision import working, working_dtype

# transformers 5.24 renamed the argument and the output field `past_key_values`
CACHE = (
    "cache"
    if any(f.name == "cache" for f in fields(BaseModelOutputWithPast))
    else "past_key_values"
)


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a call, by its name of today or, from a caller, of
    before.
    """
    return call.get(CACHE, call.get("past_key_values"))


class SlotLayer(DynamicLayer):
    """A dynamic layer whose reported length is independent of how many entries it stores.

    Attributes:
        seen: logical length so far. prompt: logical length of the prompt. gone: generated entries a
            window forgot.
        index: [B, M] or [B, KV, M] logical index of every prompt entry held. valid: same shape,
            False for padding that makes unequal counts rectangular; None when every entry counts.
        window: sliding window in tokens, or None.
    """

    seen: int = 0
    prompt: int = 0
    gone: int = 0
    index: Tensor | None = None
    valid: Tensor | None = None
    window: int | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append entries; grows by concatenation, so a fork never sees another fork's tokens."""
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states)

    def get_seq_length(self, *args: Any) -> int:
        """The logical length."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Logical mask width; transformers before 5.4 passes a tensor of positions."""
        return (
            self.seen + (query_length if isinstance(query_length, int) else query_length.shape[0]),
            0,
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a compressed layer cannot give entries back."""
        raise NotImplementedError(
            "a compressed cache cannot be cropped (assisted decoding): generate without an"
            " assistant"
        )

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: the slots' indices move with the entries."""
        super().reorder_cache(beam_idx)
        self.index = None if self.index is None else self.index[beam_idx]
        self.valid = None if self.valid is None else self.valid[beam_idx]

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, KV, S, d], which a layer has once it has seen a prompt."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def columns(self, new: int) -> Tensor:
        """Logical index of every entry once ``new`` tokens are added: [B, S] or [B, KV, S]."""
        assert self.index is not None
        tail = torch.arange(self.prompt + self.gone, self.seen + new, device=self.index.device)
        return torch.cat([self.index, tail.expand(*self.index.shape[:-1], -1)], -1)

    def forget(self) -> None:
        """Drop what a sliding window can no longer see (entries ascend, so it is a slice)."""
        assert self.index is not None and self.window is not None
        old = int((self.columns(0) <= self.seen - self.window).sum(-1).min())
        if old > 0:
            self.keys, self.values = (x[..., old:, :] for x in self.stored())
            self.gone += max(0, old - self.index.shape[-1])
            self.index = self.index[..., old:]
            self.valid = None if self.valid is None else self.valid[..., old:]

    def bytes_held(self) -> int:
        """Bytes of the stored keys and values, padding included."""
        return sum(x.numel() * x.element_size() for x in self.stored())


def slotted(cache: Cache) -> None:
    """Turn an empty dynamic cache into slot layers, in place.

    Raises:
        NotImplementedError: for caches whose layers must all have one length.
    """
    if type(cache).__name__ in ("StaticCache", "QuantizedCache", "EncoderDecoderCache"):
        raise NotImplementedError(
            f"{type(cache).__name__} cannot hold layers of different lengths: use a DynamicCache"
        )
    cache.layers[:] = [SlotLayer() for _ in cache.layers]
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = SlotLayer


def slot_layers(cache: Cache) -> list[SlotLayer]:
    """The layers of a cache that has been `slotted`."""
    layers = [layer for layer in cache.layers if isinstance(layer, SlotLayer)]
    assert len(layers) == len(cache.layers), "this cache was not made under a session"
    return layers


def fork(cache: Cache) -> Cache:
    """An independent continuation that shares every tensor: `update` concatenates and never writes
    in place.
    """
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def stack(caches: list[Cache]) -> Cache:
    """One cache whose batch holds all of ``caches``, which have one logical length; unequal slots
    are padded on the left.
    """
    if len(caches) == 1:
        return caches[0]
    new = fork(caches[0])
    new.layers[:] = [_stacked(layers) for layers in zip(*map(slot_layers, caches), strict=True)]
    return new


def _stacked(layers: Sequence[SlotLayer]) -> SlotLayer:
    out = copy.copy(layers[0])
    keys, values = zip(*(x.stored() for x in layers), strict=True)
    width, heads = max(k.shape[-2] for k in keys), keys[0].shape[1]
    assert len({(x.seen, x.prompt, x.gone) for x in layers}) == 1, (
        "stacked caches must have one logical length and no past window"
    )
    per_head = any(x.index is not None and x.index.ndim == 3 for x in layers)
    pad = [width - k.shape[-2] for k in keys]
    equal = not any(pad) and all(x.valid is None for x in layers)
    fill = torch.nn.functional.pad
    out.keys = torch.cat([fill(k, (0, 0, p, 0)) for k, p in zip(keys, pad, strict=True)])
    out.values = torch.cat([fill(v, (0, 0, p, 0)) for v, p in zip(values, pad, strict=True)])
    index, valid = [], []
    for x, p in zip(layers, pad, strict=True):
        assert x.index is not None
        rows, ok = (
            x.index,
            torch.ones_like(x.index, dtype=torch.bool) if x.valid is None else x.valid,
        )
        if per_head and rows.ndim == 2:
            rows, ok = (t[:, None].expand(-1, heads, -1) for t in (rows, ok))
        index.append(fill(rows, (p, 0)))
        valid.append(fill(ok, (p, 0)))
    out.index, out.valid = torch.cat(index), None if equal else torch.cat(valid)
    return out


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
    layer.keys = torch.take_along_dim(keys, slots[..., None], 2)
    layer.values = torch.take_along_dim(values, slots[..., None], 2)
    if (
        ragged
    ):  # what pads short heads is dropped: masked, and nothing that 0 times it could be NaN of
        layer.keys, layer.values = (
            x.masked_fill(~valid[..., None], 0) for x in (layer.keys, layer.values)
        )
    assert layer.index is not None
    index = torch.take_along_dim(layer.index[:, None], slots, 2)
    layer.index, layer.valid = (index[:, 0], None) if shared else (index, valid if ragged else None)


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


def bytes_held(cache: Cache) -> int:
    """Bytes of all stored keys and values."""
    return sum(layer.bytes_held() for layer in slot_layers(cache))
