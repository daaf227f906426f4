"""What the quantizing methods share: bits, groups and symmetry, and their check against a layer."""

from dataclasses import dataclass

import torch

from effivlm.methods.base import Weights
from effivlm.methods.linears import Linear, Promise, WeightsError
from effivlm.ops.grid import Grid


@dataclass(frozen=True)
class Quantizing(Weights):
    """A method whose weights become codes.

    Attributes:
        bits: of a code. group: inputs of a row that share a scale; -1: the whole row.
        sym: symmetric codes, without a zero point.
    """

    bits: int = 4
    group: int = 128
    sym: bool = False

    budget = "none"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: expected 2 to 8")
        if self.group != -1 and self.group < 2:
            raise ValueError(
                f"group={self.group}: expected inputs that share a scale, such as 128, or -1 for a"
                " whole row"
            )

    def grid(self, linear: Linear) -> Grid:
        """The grid of one layer; its scales are stored, and so rounded, in bfloat16.

        Raises:
            WeightsError: for a group that does not divide the layer's width.
        """
        columns = linear.weight.shape[1]
        if self.group != -1 and columns % self.group:
            fits = [g for g in (64, 32, 16, 8, 4) if g < self.group and columns % g == 0]
            raise WeightsError(
                f"{linear.name} has {columns} inputs, which group={self.group} does not divide:"
                f" write for example {self.name}:group={fits[0] if fits else -1}"
            )
        return Grid(self.bits, self.group, self.sym, scale_dtype=torch.bfloat16)

    def promise(self, rows: int, columns: int, share: float) -> Promise:
        """Bits."""
        return Promise(bits=self.bits)
