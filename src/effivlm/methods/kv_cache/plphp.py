"""PLPHP: every layer keeps a share of each image that depends on how much the last token looks at
images there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import Entries, KVCache, LayerCache, Paper, Room
from effivlm.methods.kv_cache.allocators import Hybrid, Proportional, allocated
from effivlm.methods.kv_cache.scoring import best, refuse_idle_fold
from effivlm.methods.signals import LastRow, Signal
from effivlm.ops.precision import working
from effivlm.ops.select import ranked
from effivlm.ops.statistics import fold


def by_image(scores: Tensor, image: Tensor) -> Tensor:
    """[KV, M] order in which entries are kept: text, each image's best entry, then images evenly by
    rank over size.

    The best ``text + sum_j max(1, floor(r * S_j))`` entries are then exactly the best ``max(1,
    floor(r * S_j))`` of every image, whatever r; a smaller count takes from all images alike.
    ``image`` [M], -1 for text.
    """
    text = 3 + working(scores).nan_to_num().clamp(0, 1)
    order = ranked(scores)
    members = image[order]  # best first; stably sorted by image they stand image by image
    kind, by_kind = members.sort(stable=True)
    edge = torch.searchsorted(kind, kind), torch.searchsorted(kind, kind, right=True)
    place = torch.arange(1, len(image) + 1, device=order.device) - edge[0]
    even = 1 - place.to(text.dtype) / (edge[1] - edge[0]) + (place == 1)
    even = torch.empty_like(text).scatter_(1, order.gather(1, by_kind), even)
    return torch.where(image < 0, text, even)


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
    def waits(self) -> bool:
        """A budget scales what the rule keeps over all layers."""
        return True

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """In proportion to what the rule keeps, partly even; scores assume nothing."""
        if room.statistics is None:
            return room.lengths
        return allocated(Hybrid(Proportional(), self.uniform), room, budget)

    def retention(self, attention: Tensor) -> Tensor:
        """[] float64: share of each image kept in a layer whose last token pays this much attention
        to visual tokens.
        """
        step = (attention >= self.alpha).double() - (attention < self.beta).double()
        return self.r + self.dr * step

    def statistic(self, cache: LayerCache) -> Tensor | float:
        """Share of all entries that the rule keeps."""
        if not 2 <= cache.layer < cache.layers - 1:
            return 1.0
        seen = cache.image >= 0
        share = self.retention(working(cache[LastRow()].mean(0)).where(seen, 0).sum())
        kind = cache.image.sort().values
        start, end = torch.searchsorted(kind, kind), torch.searchsorted(kind, kind, right=True)
        first = (start == torch.arange(len(kind), device=kind.device)) & (kind >= 0)
        kept = (share * (end - start) + 1e-9).floor().clamp(min=1)
        return ((~seen).sum() + kept.where(first, 0).sum()) / cache.length

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Text, then every image's entries by attention of the last token."""
        how = "shared" if self.shared else self.fold
        return by_image(fold(cache[LastRow()], cache.keys.shape[0], how), cache.image)

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """The first ``k`` in that order."""
        return best(scores, k, self.shared)
