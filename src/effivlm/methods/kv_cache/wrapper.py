"""What methods around a scorer share: the scorer they hold, and what they may ask of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import Entries, KVCache, LayerCache, Room
from effivlm.methods.kv_cache.scoring import ScoredKV
from effivlm.methods.kv_cache.snapkv import SnapKV
from effivlm.methods.signals import Signal

SNAPKV = SnapKV()  # what a wrapper holds unless told otherwise


def _scores(held: object) -> bool:
    return isinstance(held, ScoredKV)


@dataclass(frozen=True)
class Wrapper(KVCache):
    """Base of methods around a scorer, any with its own parameters: ``adakv(snapkv:rows=32)@0.2``.

    Scores, signals and layer budgets are the scorer's; a wrapper changes one of the steps and says
    in ``__post_init__`` what it needs for that (`ScoredKV.amounts`).

    Attributes:
        scorer: the method that scores.
    """

    scorer: ScoredKV = SNAPKV

    def __post_init__(self) -> None:
        """Refuse what is no scorer, and one that merges: a wrapper's choice only drops."""
        if not _scores(self.scorer):
            raise ValueError(
                f"{self.name}: {self.scorer!r} is not a scorer such as snapkv, h2o or tova"
            )
        self._needs(
            not self.scorer.merges_cache,
            f"entries are dropped, not merged: write {self.scorer.name}:merge=none",
        )

    def _needs(self, met: bool, why: str) -> None:
        """Raise a ValueError that says what is wrong with the scorer, unless ``met``."""
        if not met:
            raise ValueError(f"{self.name}({self.scorer.name}): {why}")

    @property
    def signals(self) -> frozenset[Signal]:
        """Those of the scorer."""
        return self.scorer.signals

    @property
    def spreads(self) -> bool:
        """As the scorer."""
        return self.scorer.spreads

    @property
    def waits(self) -> bool:
        """As the scorer."""
        return self.scorer.waits

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """The scorer's."""
        return self.scorer.counts(room, budget)

    def statistic(self, cache: LayerCache) -> Tensor | float:
        """The scorer's."""
        return self.scorer.statistic(cache)

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """The scorer's."""
        return self.scorer.score(cache, k)

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """The scorer's."""
        return self.scorer.choose(cache, scores, k)
