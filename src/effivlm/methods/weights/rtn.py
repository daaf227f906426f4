"""Round to nearest, the baseline of the quantizing methods."""

from dataclasses import dataclass

from effivlm.budget import Budget
from effivlm.methods.base import Paper
from effivlm.methods.linears import Linear, NewWeight
from effivlm.methods.weights.quantized import Quantizing
from effivlm.ops.grid import rtn


@dataclass(frozen=True)
class RoundToNearest(Quantizing):
    """Every weight to the nearest code of its group; it needs no calibration."""

    name = "rtn"
    paper = Paper("(baseline) Round to nearest, group by group", "", "")

    def compress(self, linear: Linear, budget: Budget | None) -> NewWeight:
        """Codes."""
        return NewWeight(codes=rtn(linear.weight, self.grid(linear)))
