"""A cache layer that knows its logical length and its slots; append, narrow, crop, forget.

*Logical* indices address the uncompressed prompt (0..L-1) and then the generated tokens (L, L+1,
...). A layer stores fewer entries (its *slots*) but reports the logical length, so positions, rope
deltas, continuation and mask sizes stay those of the uncompressed run; the decode hook gathers the
mask columns that a layer physically holds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from effivlm.runtime.host import UnsupportedCall


class Lease:
    """Whether the session that follows a cache is open."""

    def __init__(self) -> None:
        self.open = True

    def end(self) -> None:
        """The session has closed."""
        self.open = False

    def __deepcopy__(self, memo: Any) -> "Lease":
        """Copies of a cache are followed by the same session."""
        return self


class SlotLayer(DynamicLayer):
    """A dynamic layer whose reported length is independent of how many entries it stores.

    Attributes:
        seen: logical length so far. prompt: logical length of the prompt. gone: generated entries a
            window forgot.
        index: logical index of every prompt entry held. valid: False for
            padding that makes unequal counts rectangular; None when every entry counts.
        window: sliding window in tokens, or None. forgot: entries left its window.
        lease: of the session that follows it. delta: what decode positions are reduced by where
            positions were repacked (in a cache's first layer).
    """

    seen: int = 0
    prompt: int = 0
    gone: int = 0
    index: Int[Tensor, "B *KV M"] | None = None
    valid: Bool[Tensor, "B *KV M"] | None = None
    window: int | None = None
    forgot: bool = False
    lease: Lease | None = None
    delta: Int[Tensor, "*axes B 1"] | None = None
    record_past: bool = False

    def update(
        self,
        key_states: Float[Tensor, "B KV n d"],
        value_states: Float[Tensor, "B KV n d"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B KV S d"], Float[Tensor, "B KV S d"]]:
        """Append entries; grows by concatenation, so a fork never sees another fork's tokens.

        Raises:
            UnsupportedCall: for a compressed layer outside any session, where nothing would choose
                the mask columns it holds.
        """
        if not self.whole and not (self.lease is not None and self.lease.open):
            raise UnsupportedCall(
                "this cache was compressed under a compress() session that has ended, and without"
                " one the model would read its entries at wrong places: continue inside the with"
                " block (or inside another session on the same model)"
            )
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

    @property
    def whole(self) -> bool:
        """Whether every token seen is stored, in order."""
        if self.index is None:
            return True
        full = self.index.ndim == 2 and self.index.shape[-1] == self.prompt
        return full and self.valid is None and not self.forgot

    def follow(self, lease: Lease) -> None:
        """From now on the session with this lease chooses the layer's mask columns."""
        self.lease = lease

    def repack(self, delta: Int[Tensor, "*axes B 1"] | None) -> None:
        """Reduce decode positions by ``delta``; None: they are given."""
        self.delta = delta

    def activate_past_recording(self) -> None:
        """Forget nothing from now on (assisted decoding gives tokens back)."""
        self.record_past = True

    def take_in(
        self,
        index: Int[Tensor, "B M"],
        valid: Bool[Tensor, "B M"] | None,
        length: int,
        window: int | None,
    ) -> None:
        """A prompt has been stored.

        Args:
            index: its entries, as logical indices of the prompt.
            valid: see `SlotLayer`.
            length: logical length of the prompt.
            window: the layer's sliding window.
        """
        self.window, earlier = window, self.seen - index.shape[-1]
        self.seen = earlier
        self.index, self.valid = self.joined(index + earlier if earlier else index, valid)
        self.seen, self.gone = earlier + length, 0
        self.prompt = self.seen

    def joined(
        self, index: Int[Tensor, "B M"], valid: Bool[Tensor, "B M"] | None
    ) -> tuple[Int[Tensor, "B *KV S"], Bool[Tensor, "B *KV S"] | None]:
        """Logical indices of new entries, and which count, after those that are held."""
        if self.index is None:
            return index, valid
        old = self.columns(0)
        if self.valid is None and valid is None:
            was = ok = None
        else:
            was = torch.ones_like(old, dtype=torch.bool)
            if self.valid is not None:
                was[..., : self.valid.shape[-1]] = self.valid
            ok = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        if old.ndim == 3:
            index = index[:, None].expand(-1, old.shape[1], -1)
            ok = None if ok is None else ok[:, None].expand(-1, old.shape[1], -1)
        both = None if was is None or ok is None else torch.cat([was, ok], -1)
        return torch.cat([old, index], -1), both

    def narrow(
        self,
        keys: Float[Tensor, "B KV M d"],
        values: Float[Tensor, "B KV M d"],
        index: Int[Tensor, "B ... M"],
        valid: Bool[Tensor, "B ... M"] | None,
    ) -> None:
        """Hold these entries of the prompt from now on; see the class."""
        self.keys, self.values, self.index, self.valid = keys, values, index, valid

    def crop(self, tokens_to_remove: int) -> None:
        """Give back the last ``-tokens_to_remove`` tokens (assisted decoding).

        Raises:
            UnsupportedCall: where the heads or rows hold unequal shares of those tokens, or a
                sliding window has moved on.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove, not {tokens_to_remove}"
            )
        if tokens_to_remove == 0:
            return
        length = self.seen + tokens_to_remove
        held = (self.columns(0) >= length).sum(-1)
        drop = int(held.max())
        if self.forgot or bool((held != drop).any()):
            raise UnsupportedCall(
                "this cache cannot give back the tokens an assistant proposed in vain"
                + (
                    " past a sliding window"
                    if self.forgot
                    else ": its heads or rows hold unequal shares of them"
                )
                + ": generate without an assistant"
            )
        assert self.index is not None
        kept = self.stored()[0].shape[-2] - drop
        self.keys, self.values = (x[..., :kept, :] for x in self.stored())
        self.index = self.index[..., :kept]
        self.valid = None if self.valid is None else self.valid[..., :kept]
        self.seen, self.prompt = length, min(self.prompt, length)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Beam search: the slots' indices move with the entries."""
        super().reorder_cache(beam_idx)
        self._rows(lambda x: x[beam_idx.to(x.device)])

    def batch_select_indices(self, indices: Shaped[Tensor, "_"]) -> None:
        """Some rows of the batch."""
        super().batch_select_indices(indices)
        self._rows(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch several times."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def _rows(self, chosen: Callable[[Tensor], Tensor]) -> None:
        self.index = None if self.index is None else chosen(self.index)
        self.valid = None if self.valid is None else chosen(self.valid)
        if self.delta is not None:  # the batch is the axis before the last
            self.delta = chosen(self.delta.transpose(0, -2)).transpose(0, -2)

    def stored(self) -> tuple[Float[Tensor, "B KV S d"], Float[Tensor, "B KV S d"]]:
        """Keys and values, which a layer has once it has seen a prompt."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def columns(self, new: int) -> Int[Tensor, "B *KV S"]:
        """Logical index of every entry once ``new`` tokens are added."""
        assert self.index is not None
        tail = torch.arange(self.prompt + self.gone, self.seen + new, device=self.index.device)
        return torch.cat([self.index, tail.expand(*self.index.shape[:-1], -1)], -1)

    def forget(self) -> None:
        """Drop what a sliding window can no longer see (entries ascend, so it is a slice)."""
        assert self.index is not None and self.window is not None
        if self.record_past:
            return
        old = int((self.columns(0) <= self.seen - self.window).sum(-1).min())
        if old > 0:
            self.forgot = True
            self.keys, self.values = (x[..., old:, :] for x in self.stored())
            self.gone += max(0, old - self.index.shape[-1])
            self.index = self.index[..., old:]
            self.valid = None if self.valid is None else self.valid[..., old:]

    def bytes_of(self, counts: Sequence[int]) -> tuple[int, int]:
        """Bytes of the prompt entries of one row (``counts``: held by every head, or by all heads
        alike), and of the tensors they are stored in, which pad heads to the longest.
        """
        keys = self.stored()[0]
        one = keys.shape[1] * 2 * keys.shape[-1] * keys.element_size()
        return round(sum(counts) / len(counts) * one), max(counts) * one

    def bytes_held(self) -> int:
        """Bytes of the stored keys and values, padding included."""
        return sum(x.numel() * x.element_size() for x in self.stored())
