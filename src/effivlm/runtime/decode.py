"""What a decode step needs under a compressed cache: the mask columns a layer holds, and shifted
positions.
"""

from typing import Any

import torch
from torch import Tensor

from effivlm.runtime.cache import SlotLayer
from effivlm.runtime.tokens import Prompt, hide, take


def repacked(prompt: Prompt, position: Tensor) -> tuple[Tensor, Tensor]:
    """Positions 0, 1, ... of the tokens in play, and what decode positions must be reduced by, per
    axis.

    Args:
        prompt: which of its L tokens are in play, [B, M].
        position: [B, L] or [axes, B, L] positions of the uncompressed prompt.

    Returns:
        Positions [B, M] or [axes, B, M]; delta [B, 1] or [axes, B, 1].
    """
    here = prompt.real.gather(1, prompt.index)
    here = here if prompt.valid is None else here & prompt.valid
    new = (here.cumsum(-1) - 1).clamp(min=0)
    delta = position[..., -1:] - new[:, -1:]
    return (new.expand(position.shape[0], *new.shape) if position.ndim == 3 else new), delta


def shifted(position: Tensor | None, delta: Tensor, past: int, new: int) -> Tensor:
    """Decode positions under repacking; ``position`` as the model would use it, or None for its
    default.
    """
    if position is None:
        position = past + torch.arange(new, device=delta.device)[None]
    return position - (
        delta[-position.shape[0] :] if position.ndim == 3 and delta.ndim == 3 else delta
    )


def decode_mask(layer: SlotLayer, mask: Any, new: int, heads: int, flash: bool) -> Any:
    """Columns of the logical decode mask that a layer physically holds.

    Args:
        layer: the cache layer; what its sliding window can no longer see is dropped first.
        mask: None, [B, L'] (flash) or [B, 1, new, L'] in logical columns.
        new: tokens in this step.
        heads: query heads.
        flash: whether the attention takes 2-D masks only.

    Raises:
        NotImplementedError: where flash attention would need a mask per head.
    """
    if layer.window:
        layer.forget()
    if mask is None and layer.valid is None and new == 1:
        return None
    columns = layer.columns(new)
    if flash and columns.ndim == 3 and (mask is not None or layer.valid is not None):
        raise NotImplementedError(
            "flash attention takes no mask per head: load the model with attn='sdpa' for caches"
            " that differ per head"
        )
    if mask is None and layer.valid is None:
        if flash:
            return None
        size = columns.shape[-1]
        mask = torch.ones(len(columns), 1, new, size, dtype=torch.bool, device=columns.device).tril(
            size - new
        )
        return mask
    mask = _gathered(mask, columns, new, flash)
    if layer.valid is not None:
        extra = columns.shape[-1] - layer.valid.shape[-1]
        mask = hide(
            mask,
            torch.cat([layer.valid, layer.valid.new_ones(*layer.valid.shape[:-1], extra)], -1),
            diagonal=False,
        )
    if columns.ndim == 3:
        mask = mask.repeat_interleave(heads // columns.shape[1], 1)
    return mask


def _gathered(mask: Any, columns: Tensor, new: int, flash: bool) -> Tensor:
    if mask is None:
        if flash:
            return torch.ones_like(columns)
        size = columns.shape[-1]
        full = torch.ones(len(columns), 1, new, size, dtype=torch.bool, device=columns.device).tril(
            size - new
        )
        return full if columns.ndim == 2 else full.expand(-1, columns.shape[1], -1, -1)
    if columns.ndim == 2:
        return take(mask, columns, -1, 0)
    b, h = columns.shape[:2]  # entries differ per key/value head: the mask gets a head axis
    return take(mask.expand(b, h, -1, -1).flatten(0, 1), columns.flatten(0, 1), -1, 0).unflatten(
        0, (b, h)
    )
