"""What cache methods share: the recent window, folds over query heads, and shared or head-adaptive selection."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effivlm.methods.base import Entries, KVCache, LayerCache
from effivlm.ops.select import ranked
from effivlm.ops.statistics import fold


def recent(k: int, share: float) -> int:
    """Entries of the recent window: ``max(1, floor(share * k))``, at most k."""
    return min(k, max(1, int(share * k + 1e-9)))


def window_and_top(scores: Tensor, k: int, window: int) -> Entries:
    """The last ``window`` entries and the best of the rest by scores [KV, M], ``k`` per head."""
    length, window = scores.shape[1], min(window, k)
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    keep[:, length - window :] = True
    return Entries(keep.scatter_(1, ranked(scores[:, : length - window])[:, : k - window], True))


@dataclass(frozen=True)
class WindowedKV(KVCache):
    """Base of methods that keep a recent window and the best-scored rest.

    Attributes:
        window: recent entries as a share of the budget (EffiVLM-Bench: 0.1).
        fold: how query heads of one KV head are joined, ``mean`` or ``max``.
        shared: one choice for all heads instead of one per KV head (EffiVLM-Bench 5.2 without head adaptation).
    """

    window: float = 0.1
    fold: Literal["mean", "max"] = "mean"
    shared: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        if not 0 <= self.window <= 1:
            raise ValueError(f"{self.name}: window={self.window} must be a share of the budget in [0, 1]")

    def folded(self, per_query_head: Tensor, cache: LayerCache) -> Tensor:
        """[H, M] -> [KV, M]."""
        return fold(per_query_head, cache.keys.shape[0], "shared" if self.shared else self.fold)

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """Recent window and the highest scores."""
        return window_and_top(scores, k, recent(k, self.window))
