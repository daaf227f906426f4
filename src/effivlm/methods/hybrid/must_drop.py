"""MustDrop: merge uniform image windows in the encoder, drop what no text row looks at in the LLM,
then trim early caches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effivlm.budget import Budget, BudgetError
from effivlm.methods.base import (
    BlockTokens,
    EncoderReducer,
    Entries,
    ImageTokens,
    IntraLLM,
    KVCache,
    LayerCache,
    LayerTokens,
    Merge,
    Paper,
    PreLLM,
    Room,
    Selection,
)
from effivlm.methods.schedules import falling, geometric, scaled_layers
from effivlm.methods.signals import Saliency, Signal, TextPeaks, TextSums
from effivlm.ops.merge import mean_into
from effivlm.ops.numbers import floats, numbered, whole
from effivlm.ops.precision import working
from effivlm.ops.select import others, ranked, top_k, unit

AT = (3, 7, 11, 15)


@dataclass(frozen=True)
class MustDropStage1(EncoderReducer):
    """MustDrop's encoder stage by itself: the most uniform windows become one token each, until the
    budget is met.

    Attributes:
        window: side of the windows, in LLM tokens; the smallest feasible share is about 1 /
            window^2.
    """

    name: ClassVar[str] = "mustdrop_stage1"
    paper: ClassVar[Paper] = Paper(
        "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
        "2411.10803",
        "https://github.com/liuting20/MustDrop @ 909afa5",
        (
            "a budget replaces the threshold on similarity (0.8)",
            (
                "merged windows stand in their middle, in raster order; the official code puts them"
                " first"
            ),
            "the last window merged may merge partly, to hit the count",
        ),
    )
    window: int = 3

    def __post_init__(self) -> None:
        """Validate."""
        if self.window < 2:
            raise ValueError(f"{self.name}: window={self.window} must be at least 2")

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """One cut, after the first block."""
        assert budget is not None
        return falling((1,), (budget.count(room.n),), room)

    def reduce_block(self, tokens: BlockTokens, k: int) -> Selection:
        """The most uniform windows become one token each.

        Raises:
            BudgetError: if there are more windows than ``k``.
        """
        number = windows(tokens.place, self.window)
        if (fewest := int(number.max()) + 1) > k:
            raise BudgetError(
                f"{self.name}: {len(number)} tokens lie in {fewest} windows of side {self.window},"
                " and each leaves a token, so the smallest feasible share is"
                f" {fewest / len(number):.4f}; ask for more, or for larger windows"
            )
        dropped: list[Tensor] = []
        heir: list[Tensor] = []
        left = len(number) - k
        for w in whole(ranked(uniformity(tokens.states, number))):
            members = (number == w).nonzero()[:, 0]
            middle = members[len(members) // 2]
            merged = members[members != middle][:left]
            dropped.append(merged)
            heir.append(middle.expand(len(merged)))
            left -= len(merged)
            if left == 0:
                break
        gone = torch.cat(dropped)
        return Selection(
            others(gone, len(number)), Merge(*mean_into(torch.cat(heir), gone, tokens.sizes))
        )


@dataclass(frozen=True)
class MustDrop(MustDropStage1, PreLLM, IntraLLM, KVCache):
    """Three stages under one budget: it is the share of visual tokens after the last cut (or,
    visual_mean, on average).

    Attributes:
        window: side of the encoder's windows, in LLM tokens. spatial: share of an image's tokens
            that leave the encoder.
        key_share: tokens with the highest attention in the encoder's last block that are never
            dropped, as a share.
        global_threshold, individual_threshold: the published thresholds; here they weigh the two
        criteria.
        layers: cuts happen before these; empty: 3-7-11-15 (the paper's "after 2, 6, 10, 14"), moved
            in proportion for models with 15 layers or fewer.
    """

    name: ClassVar[str] = "mustdrop"
    paper: ClassVar[Paper] = Paper(
        MustDropStage1.paper.title,
        MustDropStage1.paper.arxiv,
        MustDropStage1.paper.code,
        (
            (
                "a budget replaces the thresholds: the most uniform windows merge until `spatial`"
                " is reached, and tokens are ranked by max(global / (threshold * sum), individual /"
                " threshold), equal factors per cut"
            ),
            "without enough budget for the key set its most salient tokens are kept",
            *MustDropStage1.paper.deviations[1:],
            (
                "positions are kept; the official code renumbers and then decodes at positions"
                " before most of its keys"
            ),
        ),
    )
    observes: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = ("visual", "visual_mean")
    spatial: float = 0.8
    key_share: float = 0.08
    global_threshold: float = 0.001
    individual_threshold: float = 0.001
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if not 0.5 <= self.spatial <= 1:
            raise ValueError(
                f"mustdrop: spatial={self.spatial} must lie between 0.5 (windows may hold two"
                " tokens) and 1"
            )
        if (
            not 0 <= self.key_share < 1
            or self.global_threshold <= 0
            or self.individual_threshold <= 0
        ):
            raise ValueError(
                "mustdrop: key_share must lie in [0, 1) and thresholds must be positive"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """Encoder saliency for the key set, what text rows look at for the cuts."""
        return frozenset({Saliency(at="last"), TextSums(), TextPeaks()})

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """In the encoder the ``spatial`` share, or the budget where that is more; nothing between
        encoder and LLM; four cuts with equal factors inside; then, in the caches from the layer
        before the first cut on, what the last layer holds.
        """
        assert budget is not None
        if room.stage is EncoderReducer:
            share = math.ceil(self.spatial * room.n - 1e-9)
            return falling((1,), (max(budget.count(room.n), share),), room)
        at = scaled_layers(AT, room.layers, self.layers)
        if room.stage is IntraLLM:
            return geometric(self.name, at, room, budget)
        if room.stage is KVCache and room.statistics is not None:
            return [m if i < at[0] - 1 else room.lengths[-1] for i, m in enumerate(room.lengths)]
        return room.lengths

    # ----------------------------------------------------------------------------- stage 1: encoder
    def observe_image(self, tokens: ImageTokens) -> None:
        """Remember every patch's saliency by its position in the prompt."""
        saliency = floats(working(tokens[Saliency(at="last")]))
        pairs = zip(whole(tokens.position), saliency, strict=True)
        tokens.notes.setdefault("saliency", {}).update(pairs)

    # --------------------------------------------------------------------------------- stage 2: LLM
    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """The key set first, then whatever any text row, or all of them, look at."""
        total = tokens[TextSums()].mean(0)[tokens.visual]
        peak = tokens[TextPeaks()][tokens.visual]
        place = tokens.position[tokens.visual]
        known = tokens.notes.get("saliency", {})
        saliency = torch.tensor([known.get(p, -1.0) for p in whole(place)], device=place.device)
        protected = tokens.notes.setdefault("protected", {})
        if tokens.image not in protected:
            count = math.ceil(self.key_share * tokens.original - 1e-9)
            protected[tokens.image] = place[top_k(saliency, count)]
        keys = torch.isin(place, protected[tokens.image])
        keep = dual_filter(
            total, peak, keys, saliency, k, self.global_threshold, self.individual_threshold
        )
        tokens.notes.setdefault("final", {})[tokens.image] = place[keep]
        return Selection(keep)

    # ------------------------------------------------------------------------------- stage 3: cache
    @property
    def waits(self) -> bool:
        """The final set is known only after the last cut."""
        return True

    def statistic(self, cache: LayerCache) -> float:
        """None is needed; the counts only wait."""
        return 0.0

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Nothing to read here."""
        return torch.zeros(cache.keys.shape[:2], device=cache.keys.device)

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """Text, and the visual tokens that the last layer holds."""
        keep = torch.ones(cache.length, dtype=torch.bool, device=cache.keys.device)
        for image, final in cache.notes.get("final", {}).items():
            keep &= (cache.image != image) | torch.isin(cache.position, final.to(keep.device))
        keep[-1] = True  # the row that predicts, where a prompt ends in an image
        return Entries(keep.expand(len(scores), -1))


def windows(place: Tensor, side: int) -> Tensor:
    """[N] window number of every token of a grid cut into ``side`` x ``side`` windows, raster
    order; edges may be smaller.

    Args:
        place: [N, 2] rows and columns.
        side: of a window.
    """
    at = (place.double() - place.double().amin(0)).div(side).floor().long()
    return numbered(at[:, 0] * (at[:, 1].max() + 1) + at[:, 1])[1]


def uniformity(states: Tensor, number: Tensor) -> Tensor:
    """[W] mean pairwise cosine within each window, a token with itself excluded; -inf for windows
    of one token.

    Args:
        states: [N, C].
        number: [N] window of every token.
    """
    x = unit(states)
    size = torch.bincount(number).to(x.dtype)
    total = x.new_zeros(len(size), x.shape[1]).index_add_(0, number, x)
    own = x.new_zeros(len(size)).index_add_(0, number, (x * x).sum(1))
    mean = ((total * total).sum(1) - own) / (size * (size - 1)).clamp(min=1)
    return mean.masked_fill(size < 2, -torch.inf)


def dual_filter(
    total: Tensor,
    peak: Tensor,
    protected: Tensor,
    saliency: Tensor,
    k: int,
    share: float,
    single: float,
) -> Tensor:
    """[k] ascending: protected tokens (by saliency, if they are too many), then by the larger of
    two relative criteria.

    Args:
        total: [N] attention from all text rows together, head mean.
        peak: [N] the largest from any of them, head mean.
        protected: [N] bool.
        saliency: [N].
        k: tokens to keep.
        share: threshold on a token's share of all attention.
        single: threshold on its largest entry.
    """
    total, peak = working(total), working(peak)
    score = torch.maximum(total / (share * total.sum()).clamp(min=1e-30), peak / single)
    count = min(k, int(protected.sum()))
    chosen = top_k(torch.where(protected, saliency, -torch.inf), count)
    return (
        torch.cat([chosen, top_k(score.masked_fill(protected, -torch.inf), k - count)])
        .sort()
        .values
    )
