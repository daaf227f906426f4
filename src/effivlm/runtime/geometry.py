"""Masks and positions: made for the logical prompt and gathered for what a layer holds. The only
place where either is built or narrowed.

*Logical* indices count the uncompressed prompt and what follows it. Whether a key is visible to a
query is a question about their logical indices (causal, within the layer's window, not padding),
whatever slots they are stored in.

Shapes: B batch, L prompt length, M tokens in play (short rows padded on the left), S entries held.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from effivlm.runtime.host import UnsupportedCall
from effivlm.runtime.slots import SlotLayer


# ---------------------------------------------------------------------------------------- gathering
def take(
    x: Shaped[Tensor, "..."], index: Int[Tensor, "_ M"], dim: int, batch: int
) -> Shaped[Tensor, "..."]:
    """Batched gather: ``out[..., b, ..., m, ...] = x[..., b, ..., index[b, m], ...]``; a batch axis
    of 1 broadcasts.
    """
    dim, batch = dim % x.ndim, batch % x.ndim
    shape = [1] * x.ndim
    shape[batch], shape[dim] = index.shape
    return torch.take_along_dim(x, index.view(shape).to(x.device), dim)


def to_index(keep: Bool[Tensor, "B N"]) -> tuple[Int[Tensor, "B M"], Bool[Tensor, "B M"] | None]:
    """Index of what is kept, ascending, short rows padded on the left with dropped tokens;
    validity or None.
    """
    counts = keep.sum(1)
    index = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, -int(counts.max()) :]
    return index, None if bool((counts == counts.max()).all()) else keep.gather(1, index)


def everything(shape: tuple[int, int], device: torch.device) -> Int[Tensor, "B L"]:
    """Every logical index of every row."""
    return torch.arange(shape[1], device=device).expand(*shape)


@dataclass(frozen=True)
class Side:
    """Deep-stack inputs of a text model: ``visual`` [B, L] bool, and of every level a row for each
    True.
    """

    visual: Tensor
    levels: list[Tensor]

    def at(self, index: Tensor) -> "Side":
        """Those of the tokens at ``index`` [B, M]."""
        rank = (self.visual.flatten().long().cumsum(0) - 1).view_as(self.visual)
        mask = self.visual.gather(1, index)
        rows = rank.gather(1, index)[mask]
        return Side(mask, [f[rows] for f in self.levels])


def scattered(
    rows: Float[Tensor, "B M D"],
    index: Int[Tensor, "B M"],
    valid: Bool[Tensor, "B M"] | None,
    length: int,
) -> Float[Tensor, "B {length} D"]:
    """``rows`` at ``index`` and zeros where a token was dropped."""
    if valid is not None:
        rows = rows.masked_fill(~valid[..., None], 0)
    out = rows.new_zeros(rows.shape[0], length, rows.shape[-1])
    return out.scatter_add_(1, index[..., None].expand_as(rows), rows)


# ---------------------------------------------------------------------------------------- positions
def positions(kwargs: dict[str, Any], past: int) -> Int[Tensor, "*axes B L"]:
    """Positions in a text model's arguments; counted on from ``past`` where
    there are none.
    """
    position, embeds = kwargs.get("position_ids"), kwargs["inputs_embeds"]
    if position is not None:
        return position
    return everything((embeds.shape[0], embeds.shape[1]), embeds.device) + past


def repacked(
    position: Int[Tensor, "*axes B L"], index: Int[Tensor, "B M"], counts: Bool[Tensor, "B M"]
) -> tuple[Int[Tensor, "*axes B M"], Int[Tensor, "*axes B 1"]]:
    """Positions 0, 1, ... of the tokens in play, and what decode positions must be reduced by, per
    axis.

    Args:
        position: positions of the uncompressed prompt.
        index: tokens in play.
        counts: False for padding of either kind.

    Returns:
        Positions; delta.
    """
    new = (counts.cumsum(-1) - 1).clamp(min=0)
    delta = position[..., -1:] - new[:, -1:]
    return (new.expand(position.shape[0], *new.shape) if position.ndim == 3 else new), delta


def shifted(
    position: Int[Tensor, "... new"] | None, delta: Int[Tensor, "... 1"], past: int, new: int
) -> Int[Tensor, "... {new}"]:
    """Decode positions under repacking; ``position`` as the model would use it, or None for its
    default.
    """
    if position is None:
        position = past + torch.arange(new, device=delta.device)[None]
    return position - (
        delta[-position.shape[0] :] if position.ndim == 3 and delta.ndim == 3 else delta
    )


# ----------------------------------------------------------------------------------- masks, prefill
BLANK = (1, 1, 1, 1)  # a 4-D mask: text models pass it on to their layers instead of making one


def visible(
    query: Int[Tensor, "*#b Q"], key: Int[Tensor, "*#b S"], window: int | None
) -> Bool[Tensor, "... Q S"]:
    """Which keys, by logical index, a query may see; itself always."""
    apart = query[..., :, None] - key[..., None, :]
    return (apart >= 0) if window is None else (apart >= 0) & (apart < window)


def prefill_mask(
    attention: str,
    query: Int[Tensor, "B M"],
    key: Int[Tensor, "B *KV S"],
    real: Bool[Tensor, "B T"],
    valid: Bool[Tensor, "B *KV S"] | None,
    window: int | None,
    plain: bool,
    dtype: torch.dtype,
) -> Int[Tensor, "B S"] | Bool[Tensor, "B _ M S"] | Float[Tensor, "B _ M S"] | None:
    """The mask a decoder layer is given for the tokens in play.

    Args:
        attention: name of the attention back end.
        query: logical indices of the tokens in play.
        key: of the keys, once or per KV head.
        real: over logical indices, False for the batch's padding.
        valid: False for padding from unequal budgets, or None.
        window: the layer's sliding window, or None.
        plain: keys are the queries and none is padding.
        dtype: of the hidden states.

    Returns:
        None where causal attention by slots is right; [B, S] for flash; else per query, bool or
        (eager) added to the logits.

    Raises:
        UnsupportedCall: where flash attention would need more than a padding mask.
    """
    reached = window is not None and real.shape[1] > window
    counts = real[:, None].expand(-1, key.shape[1], -1) if key.ndim == 3 else real
    counts = counts.gather(-1, key)
    counts = counts if valid is None else counts & valid
    if "flash" in attention:
        if reached or key.ndim == 3:
            raise UnsupportedCall(
                f"{attention} takes no mask of its own for "
                + ("a sliding window over a cut prompt" if reached else "keys that differ per head")
                + ": load the model with attn='sdpa'"
            )
        return None if plain else counts.long()
    if plain and not reached and attention != "eager":
        return None
    heads = (query[:, None], key) if key.ndim == 3 else (query[:, None], key[:, None])
    mask = visible(*heads, window)
    itself = heads[0][..., :, None] == heads[1][..., None, :]  # no softmax row may be empty
    mask = mask & ((counts if key.ndim == 3 else counts[:, None])[..., None, :] | itself)
    return added(mask, dtype) if attention == "eager" else mask


def added(mask: Bool[Tensor, "*s"], dtype: torch.dtype) -> Float[Tensor, "*s"]:
    """A bool mask in the form that is added to logits."""
    floor = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, floor)


def narrowed(
    given: Shaped[Tensor, "_ 1 L T"],
    rows: Int[Tensor, "B M"],
    key: Int[Tensor, "B *KV S"],
    valid: Bool[Tensor, "B *KV S"] | None,
) -> Shaped[Tensor, "B _ M S"]:
    """Rows and columns ``key`` of a mask that the
    model made for the whole prompt; padding sees itself only.
    """
    mask = _columns(take(given, rows, -2, 0), key)
    if valid is None:
        return mask
    itself = torch.eye(rows.shape[1], dtype=torch.bool)
    spared = torch.nn.functional.pad(itself, (key.shape[-1] - rows.shape[1], 0))
    return hidden(mask, valid, spared)


def hidden(
    mask: Shaped[Tensor, "..."],
    valid: Bool[Tensor, "B *KV S"],
    spared: Bool[Tensor, "Q S"] | None = None,
) -> Shaped[Tensor, "..."]:
    """Hide invalid keys; ``spared`` ones stay visible."""
    if mask.ndim == 2:
        return mask * valid.to(mask.dtype)
    out = ~valid[:, None, None, :] if valid.ndim == 2 else ~valid[:, :, None, :]
    out = out if spared is None else out & ~spared.to(out.device)
    if mask.dtype == torch.bool:
        return mask & ~out
    return mask.masked_fill(out, torch.finfo(mask.dtype).min)


# ------------------------------------------------------------------------------------ masks, decode
def decode_mask(
    layer: SlotLayer, mask: Shaped[Tensor, "..."] | None, new: int, heads: int, attention: str
) -> Shaped[Tensor, "..."] | None:
    """Columns of the logical decode mask that a layer physically holds.

    Args:
        layer: the cache layer; what its sliding window can no longer see is dropped first.
        mask: None, [B, L'] (flash) or [B, 1, new, L'] in logical columns.
        new: tokens in this step.
        heads: query heads.
        attention: name of the attention back end.

    Raises:
        UnsupportedCall: where flash attention would need a mask per head.
    """
    flash = "flash" in attention
    if layer.window and new == 1:
        layer.forget()
    if mask is None and layer.valid is None and new == 1:
        return None
    columns = layer.columns(new)
    if flash and columns.ndim == 3 and (mask is not None or layer.valid is not None):
        raise UnsupportedCall(
            "flash attention takes no mask per head: load the model with attn='sdpa' for caches"
            " that differ per head"
        )
    if mask is None and layer.valid is None and flash:
        return None
    mask = _gathered(mask, columns, new, flash)
    if layer.valid is not None:
        extra = columns.shape[-1] - layer.valid.shape[-1]
        seen = torch.cat([layer.valid, layer.valid.new_ones(*layer.valid.shape[:-1], extra)], -1)
        mask = hidden(mask, seen)
    return mask.repeat_interleave(heads // columns.shape[1], 1) if columns.ndim == 3 else mask


def _causal(columns: Tensor, new: int) -> Tensor:
    """[B, 1 or KV, new, S] bool: the last ``new`` columns are the queries themselves."""
    size = columns.shape[-1]
    full = torch.ones(new, size, dtype=torch.bool, device=columns.device).tril(size - new)
    return full.expand(*columns.shape[:2], -1, -1)


def _gathered(mask: Tensor | None, columns: Tensor, new: int, flash: bool) -> Tensor:
    if mask is None:
        if flash:
            return torch.ones_like(columns)
        return _causal(columns[:, None] if columns.ndim == 2 else columns, new)
    return _columns(mask, columns)


def _columns(mask: Tensor, key: Tensor) -> Tensor:
    """Columns ``key`` [B, S] of a mask, or [B, KV, S] of a 4-D one, which then gets a head axis."""
    if key.ndim == 2:
        return take(mask, key, -1, 0)
    b, h = key.shape[:2]
    wide = mask.expand(b, h, -1, -1).flatten(0, 1)
    return take(wide, key.flatten(0, 1), -1, 0).unflatten(0, (b, h))
