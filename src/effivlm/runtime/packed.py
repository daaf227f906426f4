"""A cache layer whose older entries are stored in a format of few bits, and read back as stored.

Slots are counted from the end of the prompt: the last ``residual`` stay as they are, those before
are stored in whole groups, and every ``group`` new tokens the oldest group of the residual follows.
The oldest slots may be filling, which no reader sees. So what a row holds does not depend on what
else is in its batch.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from effivlm.methods.base import Format
from effivlm.ops.groups import Codes, decode, encode, encode_floats
from effivlm.runtime.host import UnsupportedCall
from effivlm.runtime.slots import SlotLayer


class PackedLayer(SlotLayer):
    """A slot layer in a `Format`; ``keys`` and ``values`` are those of the residual.

    Attributes:
        format: how it is stored. codes: of keys [B, KV, groups, G, d] and of values
            [B, KV, groups * G, d / width, width], or None before the first group.
        live: [B, KV or 1, residual] bool: slots of the residual that are no filling and no padding.
        filling: slots in front that hold nothing.
    """

    format: Format
    codes: tuple[Codes, Codes] | None = None
    live: Tensor
    filling: int = 0

    def __init__(self, layer: SlotLayer, form: Format, counts: Tensor) -> None:
        """A prefilled layer's entries in a format.

        Args:
            layer: holds [B, KV, S, d]; it stays as it is.
            form: how to store them.
            counts: [B, S] or [B, KV, S] bool, entries that are no padding of any kind.

        Raises:
            UnsupportedCall: for heads whose width the groups do not divide.
        """
        keys, values = layer.stored()
        check_width(form, keys.shape[-1])
        super().__init__()
        vars(self).update(vars(layer))
        stored = max(0, keys.shape[-2] - form.residual)
        self.format = form
        self.filling = -stored % form.group + max(0, form.residual - keys.shape[-2])
        front = (self.filling, 0)
        self.keys, self.values = (
            torch.nn.functional.pad(x, (0, 0, *front)) for x in (keys, values)
        )
        counts = counts[:, None] if counts.ndim == 2 else counts
        self.live = torch.nn.functional.pad(counts, front)
        self._store()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append entries; the step that brings them still reads them, and the group they complete,
        as they were, as in the authors' code.
        """
        super().update(key_states, value_states)
        new = self.live.new_ones(*self.live.shape[:2], key_states.shape[-2])
        self.live = torch.cat([self.live, new], -1)
        read = self.stored()
        self._store()
        return read

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, KV, S, d], read from the codes, filling left out."""
        keys, values = super().stored()
        if self.codes is not None:
            old = decode(self.codes[0], self.format.bits, keys.dtype).flatten(2, 3)
            keys = torch.cat([old, keys], 2)
            old = decode(self.codes[1], self.format.bits, values.dtype).flatten(3, 4)
            values = torch.cat([old, values], 2)
        return keys[:, :, self.filling :], values[:, :, self.filling :]

    def _store(self) -> None:
        """Move whole groups of the residual's oldest slots to the codes."""
        keys, values = super().stored()
        slots = max(0, keys.shape[-2] - self.format.residual)
        slots -= slots % self.format.group
        if slots == 0:
            return
        new = self._encoded(keys[:, :, :slots], values[:, :, :slots], self.live[..., :slots])
        self.codes = new if self.codes is None else _joined(self.codes, new)
        self.keys, self.values = keys[:, :, slots:], values[:, :, slots:]
        self.live = self.live[..., slots:]

    def _encoded(self, keys: Tensor, values: Tensor, live: Tensor) -> tuple[Codes, Codes]:
        form = self.format
        by_entry = keys.unflatten(2, (-1, form.group))  # [B, KV, groups, G, d]
        by_channel = values.unflatten(3, (-1, width_of(form, values.shape[-1])))
        if form.floats:
            return encode_floats(by_entry), encode_floats(by_channel)
        counts = live.unflatten(2, (-1, form.group))[..., None]
        return encode(by_entry, form.bits, 3, counts), encode(by_channel, form.bits, 4)

    # ------------------------------------------------------------------------------- whole batches
    def stacked(self, layers: "Sequence[PackedLayer]", index: Tensor, valid: Tensor | None) -> Self:
        """One layer whose batch holds those of ``layers``, stored alike; ``index`` and ``valid`` of
        all their slots, padded on the left.
        """
        out = copy.copy(self)
        out._hold(layers, index, valid)
        return out

    def _hold(self, layers: "Sequence[PackedLayer]", index: Tensor, valid: Tensor | None) -> None:
        groups = max(x.groups for x in layers)
        fillings = [x.filling + (groups - x.groups) * self.format.group for x in layers]
        heads = max(x.live.shape[1] for x in layers)
        parts = [SlotLayer.stored(x) for x in layers]
        self.codes = _beside([x.grown(groups) for x in layers]) if groups else None
        self.filling = min(fillings)
        self.live = torch.cat([x.live.expand(-1, heads, -1) for x in layers])
        self.keys, self.values = (torch.cat(x) for x in zip(*parts, strict=True))
        self.index, self.valid = index, valid

    @property
    def groups(self) -> int:
        """Groups stored as codes."""
        return 0 if self.codes is None else self.codes[0].packed.shape[2]

    def grown(self, groups: int) -> tuple[Codes, Codes]:
        """Its codes behind empty ones, ``groups`` groups in all."""
        keys, values = super().stored()
        lack = (groups - self.groups) * self.format.group
        blank = [x.new_zeros(*x.shape[:2], lack, x.shape[-1]) for x in (keys, values)]
        live = self.live.new_zeros(*self.live.shape[:2], lack)
        if self.codes is None:
            return self._encoded(blank[0], blank[1], live)
        return _joined(self._encoded(blank[0], blank[1], live), self.codes) if lack else self.codes

    def _rows(self, chosen: Callable[[Tensor], Tensor]) -> None:
        super()._rows(chosen)
        self.live = chosen(self.live)
        if self.codes is not None:
            self.codes = _mapped(chosen, *self.codes)

    # -------------------------------------------------------------------------------------- limits
    def crop(self, tokens_to_remove: int) -> None:
        """Refused: rounded entries cannot be taken back.

        Raises:
            UnsupportedCall: always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise UnsupportedCall(
                "this cache stores rounded groups and cannot give back the tokens an assistant"
                " proposed in vain: generate without an assistant"
            )

    def forget(self) -> None:
        """Nothing: a window's mask hides what it cannot see, and groups stay whole."""

    def bytes_held(self) -> int:
        """Bytes of codes, scales, offsets and residual, filling included."""
        rest = sum(x.numel() * x.element_size() for x in SlotLayer.stored(self))
        return rest + sum(c.bytes for c in self.codes or ())

    def bytes_of(self, counts: Sequence[int]) -> tuple[int, int]:
        """Bytes of the prompt entries of one row (``counts``: of every head, or of all heads
        alike), and of the tensors they are stored in.
        """
        keys = SlotLayer.stored(self)[0]
        heads, width, size = keys.shape[1], keys.shape[-1], keys.element_size()
        per_head = [*counts] * (heads // len(counts))
        held = bytes_stored(self.format, max(counts), width, size)
        return sum(bytes_stored(self.format, n, width, size) for n in per_head), heads * held


def width_of(form: Format, width: int) -> int:
    """Channels of a value that share a scale: a group, or the whole head where that is less."""
    return min(form.group, width) if not form.floats else width


def check_width(form: Format, width: int) -> None:
    """Raise UnsupportedCall for heads of ``width`` that groups do not divide."""
    part = width_of(form, width)
    if width % part or (width * form.bits) % 8 or (part * form.bits) % 8:
        raise UnsupportedCall(
            f"groups of {form.group} channels in {form.bits} bits do not divide heads of width"
            f" {width}: choose group={max(g for g in (8, 16, 32, 64) if width % g == 0 or g == 8)}"
        )


def bytes_stored(form: Format, entries: int, width: int, size: int) -> int:
    """Bytes of keys and values of one head.

    Args:
        form: how they are stored.
        entries: of the head.
        width: of the head.
        size: bytes of a number of the model.
    """
    rounded = max(0, entries - form.residual)
    groups = -(-rounded // form.group)
    left = (entries - rounded) * width * size * 2
    codes = groups * form.group * width * form.bits // 8 * 2
    if form.floats:
        return codes + left
    scales = groups * width + groups * form.group * (width // width_of(form, width))
    return codes + left + 2 * scales * size


def _joined(old: tuple[Codes, Codes], new: tuple[Codes, Codes]) -> tuple[Codes, Codes]:
    """Codes of more groups after those held: both lie along the third dimension."""
    return _zipped(lambda a, b: torch.cat([a, b], 2), old, new)


def _beside(parts: Sequence[tuple[Codes, Codes]]) -> tuple[Codes, Codes]:
    return _zipped(lambda *x: torch.cat(x, 0), *parts)


def _zipped(join: Callable[..., Tensor], *parts: tuple[Codes, Codes]) -> tuple[Codes, Codes]:
    return _codes(join, [p[0] for p in parts]), _codes(join, [p[1] for p in parts])


def _mapped(change: Callable[[Tensor], Tensor], *codes: Codes) -> tuple[Codes, Codes]:
    return _zipped(change, (codes[0], codes[1]))


def _codes(join: Callable[..., Tensor], parts: Sequence[Codes]) -> Codes:
    fields = [None if x[0] is None else join(*x) for x in zip(*parts, strict=True)]
    assert fields[0] is not None
    return Codes(fields[0], fields[1], fields[2])
