"""Knorm: keep the keys with the smallest norms."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effivlm.methods.base import LayerCache, Paper
from effivlm.methods.kv_cache.scoring import ScoredKV, joined
from effivlm.ops.numbers import norms
from effivlm.ops.precision import working


@dataclass(frozen=True)
class Knorm(ScoredKV):
    """Minus the L2 norm of each key, per KV head; keys of small norm tend to be attended most."""

    name: ClassVar[str] = "knorm"
    paper: ClassVar[Paper] = Paper(
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        "2406.11430",
        "https://github.com/alessiodevoto/l2compress",
        (
            (
                "every layer is compressed; the authors leave layers 0 and 1 whole, which no small"
                " budget allows"
            ),
        ),
    )

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Minus the norm."""
        return joined(-norms(working(cache.keys)), self.shared)
