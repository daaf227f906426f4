"""LOOK-M: text first, then the most attended visual entries; what is evicted is merged into what
stays.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.methods.base import Entries, KVMerge, LayerCache, Paper
from effivlm.methods.kv_cache.scoring import WindowedKV, best, protect_recent, recent
from effivlm.methods.signals import ColumnSums, Signal
from effivlm.ops.kv_merge import merge_entries


def text_first(scores: Tensor, text: Tensor) -> Tensor:
    """[KV, M] float64 scores in [0, 1] with 2 added for text; ``text`` [M] bool.

    Text stands before all visual entries, whose scores keep their resolution, and heads can still
    be compared.
    """
    return scores.double() + 2 * text


@dataclass(frozen=True)
class LookM(WindowedKV):
    """Column sums with a text prior; evicted keys and values join their most similar kept key.

    Attributes:
        merge: how: ``averaged``, ``pivotal``, ``weighted``, or ``none`` to drop evicted entries.
        modality: visual entries merge into visual ones only and text into text (EffiVLM-Bench 5.4);
            others are dropped.
    """

    name: ClassVar[str] = "look_m"
    paper: ClassVar[Paper] = Paper(
        "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context"
        " Inference",
        "2406.18139",
        "https://github.com/SUSTechBruce/LOOK-M @ ecf0f51",
        (
            (
                "the budget holds for text too: the official code keeps all text, whatever was"
                " asked, and its half-precision penalty makes all visual scores equal"
            ),
            (
                "every evicted entry takes part in a merge; the official averaged merge filters"
                " entries and misaligns their targets"
            ),
            "cosine 0 for zero keys, merges in float32",
        ),
    )
    amounts: ClassVar[bool] = False  # text is set apart by an offset
    merge: Literal["none", "averaged", "pivotal", "weighted"] = "pivotal"
    modality: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.modality and self.merge == "none":
            raise ValueError(
                "look_m: modality=true has no effect with merge=none: leave one of them out"
            )

    @property
    def merges_cache(self) -> bool:
        """Whether kept entries change their values."""
        return self.merge != "none"

    @property
    def signals(self) -> frozenset[Signal]:
        """All rows."""
        return frozenset({ColumnSums()})

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Order by modality and attention received."""
        order = text_first(self.folded(cache[ColumnSums()], cache, cache.length), cache.image < 0)
        return protect_recent(order, recent(k, self.window))

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """The best, and where the others go."""
        entries = best(scores, k, self.shared)
        if self.merge == "none":
            return entries
        keep = entries.keep
        kind = (cache.image < 0) if self.modality else None
        pairs = zip(cache.keys, keep, strict=True)
        parts = [merge_entries(x, kept, self.merge, kind, k) for x, kept in pairs]
        target, source, weight = (torch.cat(x) for x in zip(*parts, strict=True))
        head = torch.cat([torch.full_like(p[0], h) for h, p in enumerate(parts)])
        return Entries(keep, KVMerge(head, target, source, weight))
