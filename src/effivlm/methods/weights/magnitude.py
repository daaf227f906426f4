"""Magnitude pruning, the baseline of the pruning methods."""

from dataclasses import dataclass

from effivlm.budget import Budget
from effivlm.methods.base import Paper
from effivlm.methods.linears import Linear, NewWeight, Promise
from effivlm.methods.weights.sparsity import Sparse, read_pattern
from effivlm.ops.pruning import magnitude_mask


@dataclass(frozen=True)
class Magnitude(Sparse):
    """Prunes the smallest weights of every matrix; it needs no calibration."""

    name = "magnitude"
    paper = Paper(
        "(baseline) Magnitude pruning, as in the Wanda repository",
        "2306.11695",
        "locuslab/wanda @ 8e8fc87",
        ("the official threshold is pruned too, one weight more than asked; not here",),
    )

    def compress(self, linear: Linear, budget: Budget | None) -> NewWeight:
        """Mask; what stays is as it was."""
        n, m = self.n_of_m(linear)
        return NewWeight(keep=~magnitude_mask(linear.weight, linear.share, n, m))

    def promise(self, rows: int, columns: int, share: float) -> Promise:
        """A count of the whole matrix, or of every run."""
        if read_pattern(self.pattern)[1]:
            return super().promise(rows, columns, share)
        return Promise(rows * columns - int(rows * columns * share))
