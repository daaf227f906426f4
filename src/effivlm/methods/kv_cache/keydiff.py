"""KeyDiff: keep the keys least like the average key."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effivlm.methods.base import LayerCache, Paper
from effivlm.methods.kv_cache.scoring import ScoredKV, joined
from effivlm.ops.select import unit


@dataclass(frozen=True)
class KeyDiff(ScoredKV):
    """Minus the cosine of each key with the mean direction of its head's keys."""

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[Paper] = Paper(
        "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in"
        " Resource-Constrained Environments",
        "2504.15364",
        "https://github.com/NVIDIA/kvpress @ 8bb29b9",
        ("once, after prefill; the paper evicts block by block while it reads the prompt",),
    )

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Minus the cosine; a zero key counts as orthogonal."""
        direction = unit(cache.keys)
        return joined(-(direction @ unit(direction.mean(1))[..., None])[..., 0], self.shared)
