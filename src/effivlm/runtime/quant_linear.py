"""A linear layer that holds its weight as packed codes, and computes with them.

Few rows go through torch's own int4 product where there is one for the shape and device, many
through the dequantised weight; where one gets faster than the other is measured once a shape.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effivlm.ops.grid import Codes, pack, unpack

BLOCK = 64  # outputs whose packed form is the same permutation of nibbles as that of the next 64
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # at which the two paths are timed
aten: Any = torch.ops.aten


class QuantLinear(nn.Module):
    """The linear layer of quantized weights: one packed copy of them, and the layer's own bias.

    Args:
        codes: of the weight; groups are runs of inputs, scales are representable in bfloat16.
        bias: the original layer's, or None.
        dtype: of ``weight``.
        fast: hold the codes as torch's int4 product wants them, where it takes them (``kernel``).
    """

    packed: Tensor
    scales: Tensor
    zero: Tensor | None

    def __init__(
        self, codes: Codes, bias: nn.Parameter | None, dtype: torch.dtype, fast: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.codes.shape
        self.group, self.bits, self.dtype = codes.group, codes.bits, dtype
        self.bias = bias
        self.kernel = fast and _fits(codes)
        self.switch = 0
        self.halved = self.bits <= 4 and self.in_features % 2 == 0
        if self.kernel:
            self.register_buffer("packed", _for_kernel(codes.codes))
            scale = codes.scale.float()
            offset = (8 - codes.zero.float()) * scale
            both = torch.stack([scale, offset], -1).transpose(0, 1)
            self.register_buffer("scales", both.contiguous().to(torch.bfloat16))
            self.register_buffer("zero", None)
            self.switch = switch_rows(
                codes.codes.device.type, self.out_features, self.in_features, self.group
            )
        else:
            self.register_buffer("packed", pack(codes.codes) if self.halved else codes.codes)
            self.register_buffer("scales", codes.scale.to(torch.bfloat16).contiguous())
            middle = 2 ** (self.bits - 1)
            same = bool((codes.zero == middle).all())
            self.register_buffer("zero", None if same else codes.zero.contiguous())

    @property
    def codes(self) -> Codes:
        """The codes, out of their packed form."""
        if self.kernel:
            scale, offset = self.scales.transpose(0, 1).float().unbind(-1)
            zero = (8 - offset / scale).round().clamp(0, 2**self.bits - 1).to(torch.uint8)
            found = _from_kernel(self.packed, self.out_features, self.in_features)
            return Codes(found, scale, zero, self.group, self.bits)
        found = unpack(self.packed) if self.halved else self.packed
        zero = self.zero
        if zero is None:
            zero = torch.full_like(self.scales, 2 ** (self.bits - 1), dtype=torch.uint8)
        return Codes(found, self.scales.float(), zero, self.group, self.bits)

    @property
    def weight(self) -> Tensor:
        """[O, I] the weight the codes stand for, made anew each time it is read."""
        return self.codes.dequantized(self.dtype)

    @property
    def bytes_held(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(b.untyped_storage().nbytes() for b in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] of x [..., I]."""
        rows = x.numel() // self.in_features
        if self.kernel and rows <= self.switch:
            flat = x.reshape(rows, self.in_features).to(torch.bfloat16)
            out = _product(flat, self.packed, self.group, self.scales).to(x.dtype)
            out = out.reshape(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.codes.dequantized(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Sizes, bits, group, and which product few rows take."""
        how = f"int4 product up to {self.switch} rows" if self.kernel else "dequantised"
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, {self.group}, {how}"


def _fits(codes: Codes) -> bool:
    """Whether torch's int4 product takes a weight."""
    rows, columns = codes.codes.shape
    device = codes.codes.device.type
    known = {"cpu": "_weight_int4pack_mm_for_cpu", "cuda": "_weight_int4pack_mm"}
    return (
        codes.bits <= 4
        and codes.group in (32, 64, 128, 256)
        and columns % 128 == 0
        and rows % BLOCK == 0
        and hasattr(aten, known.get(device, "?"))
    )


def _for_kernel(codes: Tensor) -> Tensor:
    if codes.device.type == "cuda":
        return aten._convert_weight_to_int4pack(pack(codes), 8)
    return aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def _product(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    if x.device.type == "cuda":
        return aten._weight_int4pack_mm(x, packed, group, scales)
    return aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)


def _from_kernel(packed: Tensor, rows: int, columns: int) -> Tensor:
    """[O, I] uint8 codes out of the product's own layout, which is one permutation of nibbles for
    every ``BLOCK`` outputs.
    """
    found = packed.view(torch.uint8).reshape(rows // BLOCK, -1)
    nibbles = torch.cat([found >> 4, found & 15], 1)
    return nibbles[:, _places(columns, packed.device)].reshape(rows, columns)


@functools.cache
def _places(columns: int, device: torch.device) -> Tensor:
    """[BLOCK * I] long: where each code of ``BLOCK`` outputs is among the nibbles of their packed
    form; found by packing the digits of its own number.
    """
    number = torch.arange(BLOCK * columns, device=device).reshape(BLOCK, columns)
    found = torch.zeros(BLOCK * columns, dtype=torch.long, device=device)
    for digit in range(0, (BLOCK * columns - 1).bit_length(), 4):
        packed = _for_kernel((number >> digit & 15).to(torch.uint8)).view(torch.uint8).flatten()
        found |= torch.cat([packed >> 4, packed & 15]).long() << digit
    return found.argsort()


@functools.cache
def switch_rows(device: str, rows: int, columns: int, group: int) -> int:
    """Rows up to which the int4 product is faster than dequantising and multiplying; measured."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8).to(device)
    packed = _for_kernel(codes)
    scale = torch.ones(rows, columns // group, device=device)
    scales = torch.ones(columns // group, rows, 2, device=device, dtype=torch.bfloat16)
    best = 0
    for count in ROWS:
        x = torch.ones(count, columns, device=device, dtype=torch.bfloat16)

        def dequantised(x: Tensor = x) -> Tensor:
            found = _from_kernel(packed, rows, columns)
            whole = Codes(found, scale, scale.to(torch.uint8), group, 4)
            return F.linear(x, whole.dequantized(x.dtype))

        few = _seconds(functools.partial(_product, x, packed, group, scales), device)
        if few > _seconds(dequantised, device):
            break
        best = count
    return best


def _seconds(run: Callable[[], Tensor], device: str) -> float:
    """The least of three."""
    taken: list[float] = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
