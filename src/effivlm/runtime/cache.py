"""Caches of slot layers: made, forked, stacked, counted."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from effivlm.runtime.packed import PackedLayer
from effivlm.runtime.slots import SlotLayer

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


def fits(cache: Cache) -> bool:
    """Whether a cache's layers may have different lengths (static and quantized ones may not)."""
    return all(isinstance(layer, DynamicLayer) for layer in cache.layers) and type(
        cache
    ).__name__ not in ("StaticCache", "QuantizedCache", "EncoderDecoderCache")


def slotted(cache: Cache) -> None:
    """Turn an empty dynamic cache into slot layers, in place."""
    recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
    cache.layers[:] = [SlotLayer() for _ in cache.layers]
    for layer in slot_layers(cache) if recording else ():
        layer.activate_past_recording()
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
    keys, values = zip(*(x.stored() for x in layers), strict=True)
    width, heads = max(k.shape[-2] for k in keys), keys[0].shape[1]
    assert len({(x.seen, x.prompt, x.gone) for x in layers}) == 1, (
        "stacked caches must have one logical length and no past window"
    )
    per_head = any(x.index is not None and x.index.ndim == 3 for x in layers)
    pad = [width - k.shape[-2] for k in keys]
    equal = not any(pad) and all(x.valid is None for x in layers)
    fill = torch.nn.functional.pad
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
    both_index, both_valid = torch.cat(index), None if equal else torch.cat(valid)
    packed = [x for x in layers if isinstance(x, PackedLayer)]
    if packed:
        alike = len(packed) == len(layers) and len({(x.format, x.live.shape[-1]) for x in packed})
        assert alike == 1, "stacked caches must be stored alike"
        return packed[0].stacked(packed, both_index, both_valid)
    both_keys = torch.cat([fill(k, (0, 0, p, 0)) for k, p in zip(keys, pad, strict=True)])
    both_values = torch.cat([fill(v, (0, 0, p, 0)) for v, p in zip(values, pad, strict=True)])
    out = copy.copy(layers[0])
    out.narrow(both_keys, both_values, both_index, both_valid)
    return out


def bytes_held(cache: Cache) -> int:
    """Bytes of all stored keys and values."""
    return sum(layer.bytes_held() for layer in slot_layers(cache))
