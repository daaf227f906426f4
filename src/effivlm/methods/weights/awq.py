"""AWQ."""

from dataclasses import dataclass, replace

from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import Paper
from effivlm.methods.linears import TOKENS, Linear, NewWeight, Readers
from effivlm.methods.weights.quantized import Quantizing
from effivlm.ops import awq
from effivlm.ops.grid import rtn


@dataclass(frozen=True)
class AWQ(Quantizing):
    """Scales up the inputs of large activations before rounding, and clips the range of a group.

    Attributes:
        duo_scaling: scales look at the weights too (AutoAWQ); else at activations alone (the
            paper).
        n_grid: scales tried, and steps of the clipping.
        clip: search for the range of every group; queries and keys are left alone.
    """

    duo_scaling: bool = True
    n_grid: int = 20
    clip: bool = True

    name = "awq"
    paper = Paper(
        "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration",
        "2306.00978",
        "mit-han-lab/llm-awq @ d6e797a",
        (
            "scales as AutoAWQ's duo scaling (88e4c76) with no scaling among the candidates;"
            " duo_scaling=false for the paper's",
            "values and outputs are not scaled where heads share them, as in the official code",
            "ranges include 0, and scales are rounded to bfloat16, in which they are stored",
        ),
    )
    statistics = frozenset({TOKENS})
    original_inputs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_grid < 3:
            raise ValueError(f"n_grid={self.n_grid}: expected at least 3")

    def scale(self, readers: Readers) -> Tensor | None:
        """The best of the candidates."""
        first = Linear("matrices that read one tensor", readers.weights[0], 0.0, {})
        grid = self.grid(first)
        duo = awq.w_mean(readers.weights, self.group) if self.duo_scaling else None
        tried = awq.candidates(readers.x_mean, duo, self.n_grid, identity=self.duo_scaling)
        return awq.scale_search(readers.weights, tried, grid, readers.loss).scale

    def compress(self, linear: Linear, budget: Budget | None) -> NewWeight:
        """Codes of the clipped weight."""
        grid, weight = self.grid(linear), linear.weight
        if self.clip and not linear.name.endswith(("q_proj", "k_proj")):
            free = replace(grid, span="free")
            bounds = awq.clip_search(weight, linear.statistics[TOKENS], free, self.n_grid)
            weight = awq.clipped(weight, bounds)
        return NewWeight(codes=rtn(weight, grid))
