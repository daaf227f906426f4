"""What cache methods share: the recent window, folds over query heads, and shared or head-adaptive
selection.

Entries that must stay carry the score +inf, so a choice is always the best ``k`` and wrappers need
not know why.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.methods.base import Entries, KVCache, LayerCache
from effivlm.ops.select import top_k_mask
from effivlm.ops.statistics import fold


def recent(k: int, share: float) -> int:
    """Entries of the recent window: ``max(1, floor(share * k))``, at most k."""
    return min(k, max(1, int(share * k + 1e-9)))


def protect_recent(scores: Tensor, window: int) -> Tensor:
    """Scores [KV, M] with the last ``window`` entries at +inf."""
    last = torch.arange(scores.shape[1], device=scores.device) >= scores.shape[1] - window
    return scores.masked_fill(last, torch.inf)


def window_and_top(scores: Tensor, k: int, window: int, shared: bool = False) -> Entries:
    """The last ``window`` entries and the best of the rest by scores [KV, M], ``k`` per head."""
    return best(protect_recent(scores, min(window, k)), k, shared)


def best(scores: Tensor, k: int, shared: bool = False) -> Entries:
    """The ``k`` highest scores [KV, M] of every head, equal scores by lower index; of the first
    head for all if the choice is ``shared`` (one stored row, so that the cache keeps one index).
    """
    keep = top_k_mask(scores[:1] if shared else scores, k)
    return Entries(keep.expand(len(scores), -1))


def joined(scores: Tensor, shared: bool) -> Tensor:
    """Scores [KV, M] of KV heads, all equal to their mean if the choice is ``shared``."""
    return fold(scores, len(scores), "shared") if shared else scores


def refuse_idle_fold(method: str, how: str, shared: bool) -> None:
    """A choice shared by all heads takes the mean of all: how a group is joined has no effect.

    Raises:
        ValueError: for ``fold=max`` with ``shared=true``.
    """
    if shared and how != "mean":
        raise ValueError(
            f"{method}: fold={how} has no effect with shared=true, which takes the mean of all"
            " query heads: write shared=false or leave fold out"
        )


@dataclass(frozen=True)
class ScoredKV(KVCache):
    """Base of methods that keep the ``k`` best-scored entries of every KV head; wrappers can hold
    them (`wrapper.Wrapper`).

    Attributes:
        amounts: whether scores (besides +inf) are amounts of attention: >= 0 and nothing at 0, so
            that they can be added and multiplied. Otherwise only their order means something, in a
            head and between heads.
        shared: one choice for all heads, by the mean of their scores, instead of one per KV head
            (EffiVLM-Bench 5.2 without head adaptation).
    """

    amounts: ClassVar[bool] = False

    shared: bool = False

    @property
    def merges_cache(self) -> bool:
        """Whether kept entries change their values."""
        return False

    @property
    def weighs_values(self) -> bool:
        """Whether scores are weighed by values."""
        return False

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """The highest scores."""
        return best(scores, k, self.shared)


@dataclass(frozen=True)
class WindowedKV(ScoredKV):
    """Base of methods that keep a recent window and the best-scored rest.

    Attributes:
        window: recent entries as a share of the budget (EffiVLM-Bench: 0.1).
        fold: how query heads of one KV head are joined, ``mean`` or ``max``.
    """

    amounts: ClassVar[bool] = True
    window: float = 0.1
    fold: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        """Validate."""
        if not 0 <= self.window <= 1:
            raise ValueError(
                f"{self.name}: window={self.window} must be a share of the budget in [0, 1]"
            )
        refuse_idle_fold(self.name, self.fold, self.shared)

    def folded(self, sums: Tensor, cache: LayerCache, rows: int | None = None) -> Tensor:
        """[H, M] attention received, summed over rows -> [KV, M] its mean over those rows and the
        group. Without ``rows`` they are counted: a row's attention sums to 1 over the keys.
        """
        count = sums.sum(-1).mean().clamp(min=1) if rows is None else max(1, rows)
        return fold(sums / count, cache.keys.shape[0], "shared" if self.shared else self.fold)
