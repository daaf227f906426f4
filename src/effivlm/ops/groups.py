"""Numbers stored as few bits with a scale and an offset per group, or as 8-bit floats. Shapes: G
members of a group along ``dim``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effivlm.ops.precision import working

FLOAT8 = torch.float8_e4m3fn


class Codes(NamedTuple):
    """Stored numbers: ``packed`` uint8, several codes a byte along the last dimension (or 8-bit
    floats); ``scale`` and ``zero`` with one member along the groups' dimension, None for floats.
    """

    packed: Tensor
    scale: Tensor | None
    zero: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [x for x in self if x is not None]

    @property
    def bytes(self) -> int:
        """Bytes of all that is held."""
        return sum(x.numel() * x.element_size() for x in self.tensors)


def encode(x: Tensor, bits: int, dim: int, counts: Tensor | None = None) -> Codes:
    """Round to ``2 ** bits`` levels between the least and the largest member of every group.

    Scale and offset are rounded to the precision of ``x`` before the codes are chosen, so that
    `decode` reads exactly what is stored.

    Args:
        x: [..., W]; W a multiple of the codes in a byte.
        bits: 2, 4 or 8.
        dim: members of a group lie along it.
        counts: bool, broadcastable to x: members that say where the levels lie; None: all. A group
            without any is stored as zeros.
    """
    low = high = working(x)
    if counts is not None:
        low, high = low.masked_fill(~counts, torch.inf), high.masked_fill(~counts, -torch.inf)
    zero, top = low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)
    empty = zero > top
    zero, top = zero.masked_fill(empty, 0), top.masked_fill(empty, 0)
    zero, scale = zero.to(x.dtype), ((top - zero) / (2**bits - 1)).to(x.dtype)
    steps = (working(x) - working(zero)) / working(scale).clamp(min=1e-30)
    codes = steps.nan_to_num().round().clamp(0, 2**bits - 1).to(torch.uint8)
    return Codes(_packed(codes, bits), scale, zero)


def decode(codes: Codes, bits: int, dtype: torch.dtype) -> Tensor:
    """What `encode` stored, [..., W]."""
    if codes.scale is None or codes.zero is None:
        return codes.packed.to(dtype)
    levels = working(_unpacked(codes.packed, bits).to(codes.scale.dtype))
    return (levels * working(codes.scale) + working(codes.zero)).to(dtype)


def encode_floats(x: Tensor) -> Codes:
    """Round to 8-bit floats (e4m3); what is out of their range is stored as its end."""
    end = torch.finfo(FLOAT8).max
    return Codes(x.clamp(-end, end).to(FLOAT8), None, None)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """[..., W] codes -> [..., W * bits / 8], the first code in the lowest bits."""
    parts = codes.view(*codes.shape[:-1], -1, 8 // bits)
    return (parts * _weights(bits, codes)).sum(-1).to(torch.uint8)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_packed`."""
    return torch.bitwise_and(packed[..., None] // _weights(bits, packed), 2**bits - 1).flatten(-2)


def _weights(bits: int, like: Tensor) -> Tensor:
    """[8 / bits] what a code counts by its place in a byte."""
    return torch.tensor([1 << i for i in range(0, 8, bits)], dtype=torch.uint8, device=like.device)
