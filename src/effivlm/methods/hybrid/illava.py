"""iLLaVA: in a few encoder blocks and before one LLM layer, the least attended tokens collapse into
one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import (
    BlockTokens,
    EncoderReducer,
    IntraLLM,
    LayerTokens,
    Merge,
    Paper,
    Room,
    Selection,
)
from effivlm.methods.schedules import falling, scaled_layers, single_cut
from effivlm.methods.signals import LastRow, Signal
from effivlm.ops.precision import working
from effivlm.ops.select import ranked

BLOCKS = (5, 6, 7, 8)
AT = (8,)


@dataclass(frozen=True)
class ILLaVA(EncoderReducer, IntraLLM):
    """Two stages under one budget, the share of visual tokens after the LLM's cut.

    Attributes:
        encoder: part of the reduction (of its logarithm) that the encoder does; 729 -> 361 and
            0.70, as published, give 0.66.
        layer: the LLM's cut happens before it; -1: 8, moved in proportion for models with 8 layers
            or fewer.
        variant: ``official`` weighs the collapsed tokens in reverse, the least attended most; else
            by their attention.
    """

    name: ClassVar[str] = "illava"
    paper: ClassVar[Paper] = Paper(
        "iLLaVA: An Image is Worth Fewer Than 1/3 Input Tokens in Large Multimodal Models",
        "2412.06263",
        "https://github.com/hulianyuyy/iLLaVA @ 4068149",
        (
            (
                "the collapsed token weighs its members by attention; the official weights run the"
                " other way (variant=official)"
            ),
            (
                "where 2x2 patches become one LLM token whole groups collapse; the official merger"
                " groups four consecutive survivors"
            ),
            (
                "reduces between blocks, with the attention of the block before, instead of inside"
                " a block"
            ),
            (
                "the encoder's 4 cuts are equal; they follow the budget, fewer where the encoder is"
                " shallow"
            ),
            "survivors keep their places; the official code treats them as a smaller square image",
            "text between images is kept; the official Qwen2-VL code loses it",
        ),
    )
    units: ClassVar[tuple[str, ...]] = ("visual", "visual_mean")
    encoder: float = 0.66
    layer: int = -1
    variant: Literal["", "official"] = ""

    def __post_init__(self) -> None:
        """Validate."""
        if not 0 <= self.encoder <= 1:
            raise ValueError(
                f"illava: encoder={self.encoder} is a part and must lie between 0 and 1"
            )
        if self.layer < 1 and self.layer != -1:
            raise ValueError(
                f"illava: layer={self.layer} must be at least 1 (or -1 for the published one)"
            )
        if self.variant not in ("", "official"):
            raise ValueError(f"illava: variant={self.variant!r}: expected official or nothing")

    @property
    def signals(self) -> frozenset[Signal]:
        """The last prompt token's row; block statistics come unasked."""
        return frozenset({LastRow()})

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """The encoder's part of the reduction in equal steps before four blocks, then one cut in
        the LLM.
        """
        assert budget is not None
        if room.stage is EncoderReducer:
            n, k = room.n, budget.count(room.n)
            k = min(n, max(k, math.ceil(n * (k / n) ** self.encoder - 1e-9)))
            at = sorted({min(b, len(room.lengths) - 1) for b in BLOCKS})
            return falling(at, [n - (n - k) * (i + 1) // len(at) for i in range(len(at))], room)
        (at,) = scaled_layers(AT, room.layers, () if self.layer == -1 else (self.layer,))
        return single_cut(self.name, at, room, budget)

    def reduce_block(self, tokens: BlockTokens, k: int) -> Selection:
        """The least attended collapse into the most attended of them."""
        return collapse(tokens.received, k, self.variant == "official")

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """As in the encoder, by the last prompt token's attention."""
        return collapse(tokens[LastRow()].mean(0)[tokens.visual], k, self.variant == "official")


def collapse(score: Tensor, k: int, reverse: bool) -> Selection:
    """Keep the ``k`` highest; the lowest of them becomes the weighted mean of itself and all that
    are dropped.

    Args:
        score: [N], not negative.
        k: tokens to keep, the collapsed one among them.
        reverse: weights 1, 2, ... by descending score, instead of the scores.
    """
    order = ranked(score)
    if k == 0:
        return Selection(order[:0])
    members = order[k - 1 :]
    ranks = working(torch.arange(1, len(members) + 1, device=score.device))
    weight = ranks if reverse else working(score[members]).clamp(min=1e-12)
    return Selection(
        order[:k].sort().values,
        Merge(members[:1].expand(len(members)), members, weight / weight.sum()),
    )
