"""G-Prune: tokens pass importance along a graph of similar tokens; those where much gathers on few
edges stay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.ops.numbers import norms
from effivlm.ops.precision import working
from effivlm.ops.select import significant, top_k, unit


@dataclass(frozen=True)
class GPrune(PreLLM):
    """A few steps of a random walk from the tokens' norms, divided by degree.

    Attributes:
        similarity: cosine from which two tokens share an edge.
        temperature: of the softmax over a token's edges.
        steps: steps of the walk.
    """

    similarity: float = 0.5
    temperature: float = 0.03
    steps: int = 5

    name = "gprune"
    paper = Paper(
        "What Kind of Visual Tokens Do We Need? Training-free Visual Token Pruning for Multi-modal"
        " Large Language Models from the Perspective of Graph",
        "2501.02268",
        "jytmelon/G-Prune @ 762c637",
        (
            "vector-matrix products instead of a matrix power: the same numbers in O(steps N^2)",
            (
                "float32 throughout; in float16 weak edges of the official code underflow and"
                " change degrees"
            ),
            "scores that agree to six digits are ties, the lower index wins",
            (
                "the runtime keeps newline tokens within the budget; the official code keeps them"
                " all on top of it"
            ),
        ),
    )

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.steps < 1:
            raise ValueError(
                f"gprune: needs temperature > 0 and steps >= 1, got {self.temperature} and"
                f" {self.steps}"
            )

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Keep where the walk gathers."""
        gathered = walk(tokens.embeds, self.similarity, self.temperature, self.steps)
        return Selection(top_k(significant(gathered), k))


def walk(y: Tensor, similarity: float, temperature: float, steps: int) -> Tensor:
    """[N] importance of tokens y [N, D]: ``(norms^T P^steps) / degree``; a token without neighbours
    keeps its norm.
    """
    rows = unit(y)
    cosine = rows @ rows.T
    edges = (cosine >= similarity) | torch.eye(len(y), dtype=torch.bool, device=y.device)
    transition = (cosine / temperature).masked_fill(~edges, -torch.inf).softmax(1)
    flow = norms(working(y).nan_to_num())
    for _ in range(steps):
        flow = flow @ transition
    return flow / (transition > 0).sum(1)
