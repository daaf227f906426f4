"""SparseGPT."""

from dataclasses import dataclass

from effivlm.budget import Budget
from effivlm.methods.base import Paper
from effivlm.methods.linears import HESSIAN, Linear, NewWeight, Promise, WeightsError
from effivlm.methods.weights.sparsity import Sparse, read_pattern
from effivlm.ops.pruning import inverse_factor, sparsegpt


@dataclass(frozen=True)
class SparseGPT(Sparse):
    """Prunes block by block of inputs and corrects the weights that come after.

    Attributes:
        blocksize: inputs whose mask is chosen together, by one threshold over all rows.
        percdamp: damping of the Hessian, of its mean diagonal.
    """

    blocksize: int = 128
    percdamp: float = 0.01

    name = "sparsegpt"
    paper = Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "2301.00774",
        "IST-DASLab/sparsegpt @ 147d215",
        ("a Hessian that is not positive definite is an error that names the layer",),
    )
    statistics = frozenset({HESSIAN})

    def __post_init__(self) -> None:
        super().__post_init__()
        m = read_pattern(self.pattern)[1]
        if self.blocksize < 1 or (m and self.blocksize % m):
            raise ValueError(f"blocksize={self.blocksize}: expected a multiple of {max(m, 1)}")
        if self.percdamp <= 0:
            raise ValueError(f"percdamp={self.percdamp}: expected a positive share such as 0.01")

    def compress(self, linear: Linear, budget: Budget | None) -> NewWeight:
        """Weights that are left, corrected."""
        n, m = self.n_of_m(linear)
        try:
            factor = inverse_factor(linear.statistics[HESSIAN], self.percdamp)
        except ArithmeticError:
            raise WeightsError(
                f"{linear.name}: the Hessian of its inputs is not positive definite with"
                f" percdamp={self.percdamp}: raise percdamp, or calibrate with more samples"
            ) from None
        swept = sparsegpt(linear.weight, factor, linear.share, n, m, self.blocksize)
        return NewWeight(weight=swept.weight, keep=~swept.pruned)

    def promise(self, rows: int, columns: int, share: float) -> Promise:
        """A count over all rows of every block: its threshold goes too."""
        if read_pattern(self.pattern)[1]:
            return super().promise(rows, columns, share)
        sizes = [rows * min(self.blocksize, columns - a) for a in range(0, columns, self.blocksize)]
        return Promise(sum(n - int(n * share) - 1 for n in sizes))
