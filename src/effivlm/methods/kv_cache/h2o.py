"""H2O: keep the heavy hitters, the entries that received the most attention over the whole prompt,
and a recent window.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effivlm.methods.base import LayerCache, Paper
from effivlm.methods.kv_cache.scoring import WindowedKV, protect_recent, recent
from effivlm.methods.signals import ColumnSums, Signal


@dataclass(frozen=True)
class H2O(WindowedKV):
    """Column sums of the attention, without L x L matrices."""

    name: ClassVar[str] = "h2o"
    paper: ClassVar[Paper] = Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        "2306.14048",
        "https://github.com/FMInference/H2O",
        (
            "once, after prefill: no eviction while decoding",
            (
                "the recent window is 10 % of the budget (EffiVLM-Bench); the original gives it"
                " half: window=0.5"
            ),
            "sums in float32; the original sums in the model's dtype and over the batch",
        ),
    )

    @property
    def signals(self) -> frozenset[Signal]:
        """All rows."""
        return frozenset({ColumnSums()})

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Attention received from every row."""
        received = self.folded(cache[ColumnSums()], cache, cache.length)
        return protect_recent(received, recent(k, self.window))
