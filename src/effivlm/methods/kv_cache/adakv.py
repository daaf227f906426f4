"""AdaKV: the heads of a layer compete for one budget, so heads with spread attention keep more
entries.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effivlm.methods.base import Entries, LayerCache, Paper
from effivlm.methods.kv_cache.wrapper import Wrapper
from effivlm.ops.allocate import head_counts
from effivlm.ops.select import places


@dataclass(frozen=True)
class AdaKV(Wrapper):
    """A wrapper around any scorer: ``KV * k`` entries per layer, unevenly over KV heads; the cache
    is padded to the longest.

    Every head must have scores of its own. The published scores are
    those of ``adakv(snapkv:rows=32,kernel=7,pooling=max)``.

    Attributes:
        floor: part of the even budget every head is sure of.
        normalize: compare heads after scaling each by how concentrated its scores are, as some
            ports do; the scores must be amounts (>= 0).
    """

    name: ClassVar[str] = "adakv"
    paper: ClassVar[Paper] = Paper(
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM"
        " Inference",
        "2407.11550",
        "https://github.com/FFY0/AdaKV @ efe4e2e",
        (
            (
                "head budgets sum to the layer's exactly (largest remainder); the official code"
                " rounds each"
            ),
            "a scorer with layer budgets of its own (pyramidkv, vl_cache) keeps them",
        ),
    )
    floor: float = 0.2
    normalize: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"adakv: floor={self.floor} must be in [0, 1]")
        name = self.scorer.name
        self._needs(
            not self.scorer.shared,
            f"heads compete, so each needs scores of its own: write {name}:shared=false",
        )
        self._needs(
            self.scorer.amounts or not self.normalize,
            "normalize=true takes shares of scores, so they must be amounts of attention (>= 0) and"
            f" {name}'s are not: leave normalize out",
        )

    @property
    def uneven(self) -> bool:
        """Heads keep what they win."""
        return True

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """Protected entries, and each head's best within its own count."""
        protected = scores == torch.inf  # equally many in every head
        base = (k - protected[0].sum()).clamp(min=0)
        counts = head_counts(scores, protected, base, self.floor, self.normalize)
        best = places(scores) < (k - base + counts)[:, None]
        return Entries(best)
