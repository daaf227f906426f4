"""CriticalKV: half the budget by attention, the other half by attention times what each value adds
to the output.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effivlm.methods.base import Entries, LayerCache, Paper
from effivlm.methods.kv_cache.wrapper import Wrapper
from effivlm.methods.signals import Signal, ValueOutputNorms
from effivlm.ops.select import top_k_mask


@dataclass(frozen=True)
class CriticalKV(Wrapper):
    """A wrapper around any scorer of attention that weighs values after the output projection.

    Scores are multiplied, so they must be amounts (>= 0, nothing at 0) and not weighed by values
    already. The official code's scores are those of ``criticalkv(snapkv:rows=64)``.

    Attributes:
        first: part of the budget chosen by the scores alone.
        epsilon: added to scores before weighing; scores are means over observing rows, in [0, 1].
    """

    name: ClassVar[str] = "criticalkv"
    paper: ClassVar[Paper] = Paper(
        "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
        "2502.03805",
        "https://github.com/NVIDIA/kvpress @ 8bb29b9",
        (
            "what the scorer protects stays protected",
            "a scorer with layer budgets of its own (pyramidkv, vl_cache) keeps them",
        ),
    )
    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if not 0 <= self.first <= 1 or self.epsilon < 0:
            raise ValueError(
                f"criticalkv: first={self.first} must be in [0, 1] and epsilon={self.epsilon} >= 0"
            )
        name = self.scorer.name
        self._needs(
            self.scorer.amounts,
            "scores are multiplied by what values add, so they must be amounts of attention (>= 0)"
            f" and {name}'s are not: wrap for example snapkv, h2o or tova",
        )
        self._needs(
            not self.scorer.weighs_values,
            f"values would be weighed twice: write {name}:value_norms=false",
        )

    @property
    def signals(self) -> frozenset[Signal]:
        """Those of the scorer, and the values' weight."""
        return self.scorer.signals | {ValueOutputNorms()}

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """[2, KV, M]: the scorer's, and those weighed; the layer's count decides how they join."""
        plain = self.scorer.score(cache, k)
        weighed = (plain + self.epsilon) * cache[ValueOutputNorms()]
        return torch.stack([plain, torch.where(plain == torch.inf, plain, weighed)])

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """The best by score, then the best of the rest by weighed score."""
        plain, weighed = scores
        first = top_k_mask(plain, int(k * self.first))
        return Entries(top_k_mask(weighed.masked_fill(first, torch.inf), k))
