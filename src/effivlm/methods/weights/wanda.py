"""Wanda."""

from dataclasses import dataclass

from effivlm.budget import Budget
from effivlm.methods.base import Paper
from effivlm.methods.linears import SQUARES, Linear, NewWeight
from effivlm.methods.weights.sparsity import Sparse
from effivlm.ops.pruning import wanda_mask


@dataclass(frozen=True)
class Wanda(Sparse):
    """Prunes the weights of every row whose size times the norm of their input is smallest.

    ``wanda@0.5`` keeps half of every row; ``wanda:pattern=2of4`` two of every four inputs.
    """

    name = "wanda"
    paper = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models",
        "2306.11695",
        "locuslab/wanda @ 8e8fc87",
    )
    statistics = frozenset({SQUARES})

    def compress(self, linear: Linear, budget: Budget | None) -> NewWeight:
        """Mask; what stays is as it was."""
        n, m = self.n_of_m(linear)
        keep = ~wanda_mask(linear.weight, linear.statistics[SQUARES], linear.share, n, m)
        return NewWeight(keep=keep)
