"""PLPHP: every layer keeps a share of each image that depends on how much the last token looks at
images there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import Entries, KVCache, LayerCache, Paper, Room
from effivlm.methods.kv_cache.allocators import Hybrid, Proportional, allocated
from effivlm.methods.kv_cache.scoring import refuse_idle_fold
from effivlm.methods.signals import LastRow, Signal
from effivlm.ops.numbers import distinct, occurrences, whole
from effivlm.ops.precision import working
from effivlm.ops.select import ranked, top_k_mask
from effivlm.ops.statistics import fold


def by_image(scores: Tensor, image: Tensor) -> Tensor:
    """[KV, M] order in which entries are kept: text, each image's best entry, then images evenly by
    rank over size.

    The best ``text + sum_j max(1, floor(r * S_j))`` entries are then exactly the best ``max(1,
    floor(r * S_j))`` of every image, whatever r; a smaller count takes from all images alike.
    ``image`` [M], -1 for text.
    """
    out = 3 + working(scores).nan_to_num().clamp(0, 1)
    for number in whole(distinct(image[image >= 0])):
        members = (image == number).nonzero()[:, 0]
        order = ranked(scores[:, members])
        places = torch.arange(1, len(members) + 1, device=order.device).expand_as(order)
        place = torch.empty_like(order).scatter_(1, order, places)
        out[:, members] = 1 - place.to(out.dtype) / len(members) + (place == 1)
    return out


@dataclass(frozen=True)
class PLPHP(KVCache):
    """Three classes of layers by attention to images: attentive ones keep ``r + dr`` of each image,
    indifferent ones ``r - dr``.

    Text is always kept, and so are the first two layers and the last. A budget scales what the rule
    keeps in each layer to the asked total, protected layers and text included.

    Attributes:
        r: share kept in balanced layers. dr: step between classes.
        alpha: attention to visual tokens from which a layer is attentive. beta: attention below
            which it is indifferent.
        uniform: part of a budget spread evenly over layers: 0.4 and 0.8 are EffiVLM-Bench's U-40
            and U-80.
        fold: how query heads of one KV head are joined, ``mean`` or ``max``. shared: one choice for
            all heads.
    """

    name: ClassVar[str] = "plphp"
    budget: ClassVar[str] = "optional"
    paper: ClassVar[Paper] = Paper(
        "PLPHP: Per-Layer Per-Head Vision Token Pruning for Efficient Large Vision-Language Models",
        "2502.14504",
        "",
        (
            "heads are KV heads (group mean), since a cache holds one entry per KV head",
            (
                "max(1, floor(share * size)) entries of each image; the paper does not say how it"
                " rounds"
            ),
            "the form with a budget is ours",
        ),
    )
    r: float = 0.4
    dr: float = 0.3
    alpha: float = 0.25
    beta: float = 0.1
    uniform: float = 0.0
    fold: Literal["mean", "max"] = "mean"
    shared: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        if not (0 <= self.dr <= self.r <= 1 - self.dr and self.beta <= self.alpha):
            got = f"r={self.r}, dr={self.dr}, alpha={self.alpha}, beta={self.beta}"
            raise ValueError(f"plphp: {got} must satisfy 0 <= dr <= r <= 1 - dr and beta <= alpha")
        if not 0 <= self.uniform <= 1:
            raise ValueError(f"plphp: uniform={self.uniform} must be in [0, 1]")
        refuse_idle_fold(self.name, self.fold, self.shared)

    @property
    def signals(self) -> frozenset[Signal]:
        """The last row."""
        return frozenset({LastRow()})

    @property
    def spreads(self) -> bool:
        """By attention to images."""
        return True

    @property
    def waits(self) -> bool:
        """A budget scales what the rule keeps over all layers."""
        return True

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """In proportion to what the rule keeps, partly even; scores assume nothing."""
        if room.statistics is None:
            return room.lengths
        return allocated(Hybrid(Proportional(), self.uniform), room, budget)

    def retention(self, attention: float) -> float:
        """Share of each image kept in a layer whose last token pays this much attention to visual
        tokens.
        """
        return self.r + (
            self.dr if attention >= self.alpha else -self.dr if attention < self.beta else 0.0
        )

    def statistic(self, cache: LayerCache) -> float:
        """Share of all entries that the rule keeps."""
        if not 2 <= cache.layer < cache.layers - 1:
            return 1.0
        seen = cache.image >= 0
        share = self.retention(float(cache[LastRow()].mean(0)[seen].sum()))
        sizes = occurrences(cache.image[seen])
        return (
            int((~seen).sum()) + sum(max(1, math.floor(share * s + 1e-9)) for s in sizes)
        ) / cache.length

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Text, then every image's entries by attention of the last token."""
        how = "shared" if self.shared else self.fold
        return by_image(fold(cache[LastRow()], cache.keys.shape[0], how), cache.image)

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """The first ``k`` in that order."""
        return Entries(top_k_mask(scores, k))
