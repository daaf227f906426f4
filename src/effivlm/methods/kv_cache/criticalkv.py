"""CriticalKV: half the budget by attention, the other half by attention times what each value adds
to the output.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from effivlm.methods.base import KVCache, LayerCache, Paper
from effivlm.methods.kv_cache.expected_attention import ExpectedAttention
from effivlm.methods.kv_cache.scorers import SCORERS, scorer
from effivlm.methods.kv_cache.scoring import ScoredKV
from effivlm.methods.signals import Signal, ValueOutputNorms
from effivlm.ops.select import top_k_mask

BARE = {
    ExpectedAttention.name: replace(ExpectedAttention(), value_norms=False)
}  # values must not be counted twice


def critical_scores(scores: Tensor, norms: Tensor, first: int, epsilon: float) -> Tensor:
    """[KV, M]: the ``first`` best of a head at +inf, the others ``(score + epsilon) * norm``."""
    return torch.where(top_k_mask(scores, first), torch.inf, (scores + epsilon) * norms)


@dataclass(frozen=True)
class CriticalKV(ScoredKV):
    """A wrapper around any scorer that weighs values after the output projection.

    Attributes:
        base: the scorer. first: part of the budget chosen by its scores alone. epsilon: added to
            scores before weighing.
    """

    name: ClassVar[str] = "criticalkv"
    paper: ClassVar[Paper] = Paper(
        "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
        "2502.03805",
        "https://github.com/NVIDIA/kvpress @ 8bb29b9",
        (
            "expected_attention is wrapped without its own value norms",
            "what the scorer protects stays protected",
        ),
    )
    base: str = "snapkv"
    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        """Validate."""
        scorer(self.name, self.base)
        if not 0 <= self.first <= 1:
            raise ValueError(f"criticalkv: first={self.first} must be in [0, 1]")

    @property
    def wrapped(self) -> KVCache:
        """The scorer."""
        return BARE.get(self.base, SCORERS[self.base])

    @property
    def signals(self) -> frozenset[Signal]:
        """Those of the scorer, and the values' weight."""
        return self.wrapped.signals | {ValueOutputNorms()}

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Two stages in one order."""
        return critical_scores(
            self.wrapped.score(cache, k),
            cache[ValueOutputNorms()],
            int(k * self.first),
            self.epsilon,
        )
