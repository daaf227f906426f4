"""TOVA: keep what the last token attends to."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from effivlm.methods.base import LayerCache, Paper
from effivlm.methods.kv_cache.scoring import ScoredKV, refuse_idle_fold
from effivlm.methods.signals import LastRow, Signal
from effivlm.ops.statistics import fold


@dataclass(frozen=True)
class Tova(ScoredKV):
    """Attention of the last prompt token; no window and no sinks are protected.

    Attributes:
        shared: one choice for all heads, as published; False chooses per KV head.
        fold: how query heads of one KV head are joined where ``shared`` is False, ``mean`` or
            ``max``.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[Paper] = Paper(
        "Transformers are Multi-State RNNs",
        "2401.06104",
        "https://github.com/schwartz-lab-NLP/TOVA @ 9c7d09b",
        ("once, after prefill: no eviction while decoding",),
    )
    amounts: ClassVar[bool] = True
    shared: bool = True
    fold: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        """Validate."""
        refuse_idle_fold(self.name, self.fold, self.shared)

    @property
    def signals(self) -> frozenset[Signal]:
        """The last row."""
        return frozenset({LastRow()})

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Mean over heads."""
        return fold(cache[LastRow()], cache.keys.shape[0], "shared" if self.shared else self.fold)
