"""The integer grid of weight quantization: fitting scale and zero point to groups of a row, codes
and back, and codes packed two in a byte.

A weight is ``w[o, i] = (code[o, i] - zero[o, g]) * scale[o, g]`` with ``g = i // group``; codes are
0 .. 2^bits - 1, and a symmetric grid has ``zero = 2^(bits - 1)``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effivlm.ops.precision import working

Range = Literal["zero", "free"]


@dataclass(frozen=True)
class Grid:
    """How a group of weights becomes codes.

    Attributes:
        bits: of a code, 2 to 8.
        group: consecutive inputs of a row that share scale and zero point; -1: the whole row.
        sym: symmetric: the zero point is fixed in the middle.
        span: ``zero``: the range includes 0 and a symmetric scale is ``absmax / (2^bits - 1) * 2``
            (GPTQ, compressed-tensors); ``free``: it need not, the range is at least 1e-5, and a
            symmetric scale is ``absmax / (2^(bits-1) - 1)`` (AWQ).
        mse: shrink the range to the least p = 2.4 error (GPTQ's ``mse``).
        scale_dtype: scales are rounded to it before anything is encoded; None leaves them.
    """

    bits: int = 4
    group: int = -1
    sym: bool = False
    span: Range = "zero"
    mse: bool = False
    scale_dtype: torch.dtype | None = None

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def width(self, columns: int) -> int:
        """Inputs of one group in a row of ``columns``."""
        return columns if self.group == -1 else self.group


@dataclass(frozen=True)
class Codes:
    """A quantized weight.

    Attributes:
        codes: [O, I] uint8. scale: [O, G] floating. zero: [O, G] uint8.
        group: inputs of one group. bits: of a code.
        index: [I] long, the group of every input where groups are not runs of inputs (GPTQ's
            activation order without static groups); None where they are.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int
    bits: int
    index: Tensor | None = None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, I] the weight these codes stand for, computed in ``dtype``."""
        rows, columns = self.codes.shape
        scale, zero = self.scale.to(dtype), self.zero.to(dtype)
        if self.index is not None:
            return (self.codes.to(dtype) - zero[:, self.index]) * scale[:, self.index]
        grouped = self.codes.reshape(rows, -1, self.group).to(dtype)
        return ((grouped - zero[..., None]) * scale[..., None]).reshape(rows, columns)


def fit(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point [...] of groups [..., g]."""
    low, high = groups.amin(-1), groups.amax(-1)
    if grid.sym:
        most = groups.abs().amax(-1)
        low, high = -most, most
        if grid.span == "free":
            most = most.clamp(min=1e-5) / (2 ** (grid.bits - 1) - 1)
            return _rounded(most, grid), torch.full_like(most, 2 ** (grid.bits - 1))
    if grid.span == "zero":
        low, high = low.clamp(max=0), high.clamp(min=0)
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale, zero = _ends(low, high, grid)
    return _least_error(groups, low, high, grid) if grid.mse else (scale, zero)


def _ends(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range."""
    span = high - low
    scale = _rounded((span.clamp(min=1e-5) if grid.span == "free" else span) / grid.top, grid)
    if grid.sym:
        return scale, torch.full_like(scale, 2 ** (grid.bits - 1))
    return scale, (-(low / scale).round()).clamp(0, grid.top)


def _rounded(scale: Tensor, grid: Grid) -> Tensor:
    return scale if grid.scale_dtype is None else scale.to(grid.scale_dtype).to(scale.dtype)


def _least_error(groups: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Of the ranges shrunk by 0 to 79 hundredths the one of the least sum of |error|^2.4."""
    scale, zero = _ends(low, high, grid)
    best = torch.full_like(scale, float("inf"))
    for step in range(80):
        share = 1 - step / 100
        now = _ends(share * low, share * high, grid)
        codes = encode(groups, now[0][..., None], now[1][..., None], grid)
        error = ((codes - now[1][..., None]) * now[0][..., None] - groups).abs().pow(2.4).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, now[0], scale), torch.where(better, now[1], zero)
    return scale, zero


def encode(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Codes of weights, in the weights' dtype; all arguments of one shape or broadcast to it."""
    return ((weight / scale).round() + zero).clamp(0, grid.top)


def rtn(weight: Tensor, grid: Grid) -> Codes:
    """Round to nearest: every group on the grid fitted to it.

    Args:
        weight: [O, I], any floating dtype.
        grid: ``grid.group`` divides I.
    """
    rows, columns = weight.shape
    groups = working(weight).reshape(rows, -1, grid.width(columns))
    scale, zero = fit(groups, grid)
    codes = encode(groups, scale[..., None], zero[..., None], grid).reshape(rows, columns)
    return Codes(codes.to(torch.uint8), scale, zero.to(torch.uint8), grid.width(columns), grid.bits)


def pack(codes: Tensor) -> Tensor:
    """[O, I / 2] uint8 of codes [O, I] below 16, I even: an even input is in the high nibble."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """[O, I] uint8 codes of `pack`ed ones."""
    return torch.stack([packed >> 4, packed & 15], -1).flatten(1)
