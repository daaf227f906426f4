"""AdaKV: the heads of a layer compete for one budget, so heads with spread attention keep more
entries.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from effivlm.methods.base import Entries, KVCache, LayerCache, Paper
from effivlm.methods.kv_cache.scorers import scorer
from effivlm.methods.signals import Signal
from effivlm.ops.allocate import head_counts
from effivlm.ops.select import ranked


@dataclass(frozen=True)
class AdaKV(KVCache):
    """A wrapper around any scorer: ``KV * k`` entries per layer, unevenly over KV heads; the cache
    is padded to the longest.

    Attributes:
        base: the scorer. floor: part of the even budget every head is sure of.
        normalize: compare heads after scaling each by how concentrated its scores are, as some
            ports do.
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
            "a scorer that is shared by all heads as published (tova) is read per KV head",
        ),
    )
    base: str = "snapkv"
    floor: float = 0.2
    normalize: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        scorer(self.name, self.base)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"adakv: floor={self.floor} must be in [0, 1]")

    @property
    def wrapped(self) -> KVCache:
        """The scorer, with scores of its own for every KV head."""
        found: Any = scorer(self.name, self.base)
        return replace(found, shared=False) if found.shared else found

    @property
    def signals(self) -> frozenset[Signal]:
        """Those of the scorer."""
        return self.wrapped.signals

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """The scorer's."""
        return self.wrapped.score(cache, k)

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """Protected entries, and each head's best within its own count."""
        protected = int((scores[0] == torch.inf).sum())  # equal in every head
        order = ranked(scores)
        competing = scores.gather(1, order[:, protected:])
        counts = head_counts(competing, max(0, k - protected), self.floor, self.normalize)
        keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        for h, count in enumerate(counts):
            keep[h, order[h, : min(protected, k) + count]] = True
        return Entries(keep)
