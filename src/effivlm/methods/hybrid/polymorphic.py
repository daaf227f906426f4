"""Polymorphic: keep what the encoder attends to, cluster the rest; inside the LLM drop by match
with the text and re-cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import (
    ImageTokens,
    IntraLLM,
    LayerTokens,
    Merge,
    Paper,
    PreLLM,
    Room,
    Selection,
)
from effivlm.methods.schedules import geometric, most_entering, scaled_layers
from effivlm.methods.signals import Saliency, Signal
from effivlm.ops.precision import working
from effivlm.ops.recycle import cluster_means
from effivlm.ops.select import others, top_k

AT = (3, 7, 16)


@dataclass(frozen=True)
class PolymorphicStage1(PreLLM):
    """Polymorphic without its cuts inside the LLM: the most attended tokens, and density-peak
    clusters of the others.

    Attributes:
        ratio: tokens kept as they are, per cluster (the paper's 5.4 : 1).
    """

    name: ClassVar[str] = "polymorphic_stage1"
    paper: ClassVar[Paper] = Paper(
        "Polymorphic: Plug-and-Play Visual Token Compression for Scalable VLMs (ICLR 2026"
        " submission, openreview Px0UrEUcFQ)",
        "",
        "",
        (
            "no code exists: the text leaves open where these choices were made",
            (
                "attention is that of the block whose output the projector takes, clusters are of"
                " projected tokens"
            ),
            (
                "clusters use as many neighbours as there are clusters, and stand at their centres;"
                " positions are kept"
            ),
        ),
    )
    ratio: float = 5.4

    def __post_init__(self) -> None:
        """Validate."""
        if self.ratio <= 0:
            raise ValueError(f"{self.name}: ratio={self.ratio} must be positive")

    @property
    def signals(self) -> frozenset[Signal]:
        """[CLS] attention, or attention received."""
        return frozenset({Saliency()})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Dominant tokens by saliency, the others as clusters."""
        return keep_and_cluster(tokens.embeds, tokens[Saliency()], k, self.ratio)


@dataclass(frozen=True)
class Polymorphic(PolymorphicStage1, IntraLLM):
    """Two stages; the budget is the average over layers by default, as in the paper.

    Attributes:
        ratio: as before the LLM, at every cut.
        multiple: tokens entering the LLM, as a multiple of the budget (the paper's K).
        layers: cuts happen before these; empty: 3-7-16, moved in proportion for models with 16
            layers or fewer; the paper uses 3-7-13 on Qwen2-VL.
        normed: match hidden states scaled to unit mean square, so that massive activations do not
            decide.
    """

    name: ClassVar[str] = "polymorphic"
    paper: ClassVar[Paper] = Paper(
        PolymorphicStage1.paper.title,
        "",
        "",
        (
            *PolymorphicStage1.paper.deviations,
            "hidden states are the inputs of the layer a cut precedes",
            "every cut keeps the same share of what it finds, solved for the budget",
            (
                "the match is averaged over text tokens above the mean (the paper's index is a"
                " typo); all of them if none is"
            ),
        ),
    )
    units: ClassVar[tuple[str, ...]] = ("visual_mean", "visual")
    multiple: float = 2.0
    layers: tuple[int, ...] = ()
    normed: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.multiple < 1:
            raise ValueError(f"polymorphic: multiple={self.multiple} must be at least 1")

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """``multiple`` times the budget enters the LLM, less where the first cut would come too
        late for it; then equal factors at three layers.
        """
        assert budget is not None
        at = scaled_layers(AT, room.layers, self.layers)
        if room.stage is IntraLLM:
            return geometric(self.name, at, room, budget)
        k = budget.count(room.n)
        entering = int(self.multiple * k + 1e-9)
        if budget.unit == "visual_mean":
            entering = min(entering, most_entering(k, at[0], room.layers))
        return [min(room.n, max(k, entering))]

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Best match with the text that matches the image, the others as clusters."""
        x = tokens.hidden[tokens.visual]
        score = matches(x, tokens.hidden[tokens.text], self.normed)
        if k == 0:
            return Selection(torch.empty(0, dtype=torch.long, device=x.device))
        return keep_and_cluster(x, score, k, self.ratio)


def keep_and_cluster(x: Tensor, score: Tensor, k: int, ratio: float) -> Selection:
    """Keep the best by score [N], cluster all others of x [N, D]; ``k`` rows in all, ``ratio`` kept
    ones per cluster.
    """
    clusters = min(max(1, int(k / (ratio + 1) + 1e-9)), k - 1)
    kept = top_k(score, k - clusters)
    if clusters == 0:
        return Selection(kept)
    centres, merge = cluster_means(x, others(kept, len(x)), clusters)
    return Selection(torch.cat([kept, centres]).sort().values, Merge(*merge))


def matches(visual: Tensor, text: Tensor, normed: bool = False) -> Tensor:
    """[N] mean match of visual [N, D] with the text tokens [T, D] that match the image more than
    the mean.

    A match is the softmax over text of dot products over sqrt(D).
    """
    v, t = working(visual), working(text)
    if normed:
        v, t = (x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6) for x in (v, t))
    match = (v @ t.T / v.shape[1] ** 0.5).softmax(1)
    weight = match.mean(0)
    raters = weight > weight.mean()
    return match[:, raters].mean(1) if bool(raters.any()) else match.mean(1)
