"""VisPruner: half of the budget by [CLS] attention, the other half by removing near-duplicates from
the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.methods.signals import EncoderFeatures, Saliency, Signal
from effivlm.ops.select import ranked, unit


@dataclass(frozen=True)
class VisPruner(PreLLM):
    """Important tokens by attention, diverse tokens by bipartite removal in rounds.

    Attributes:
        important_ratio: share of the budget that goes to attention.
        step: tokens removed per round at most.
    """

    important_ratio: float = 0.5
    step: int = 8

    name = "vispruner"
    paper = Paper(
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
        "2412.01818",
        "Theia-4869/VisPruner @ aefa01a",
        (
            (
                "an odd residual list gives its extra token to the side that loses tokens, and a"
                " round never empties that side; the official code stops with an index error in"
                " both cases"
            ),
            "without a [CLS]: attention received from all patches",
        ),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.important_ratio <= 1:
            raise ValueError(
                "vispruner: important_ratio is a share of the budget in [0, 1], got"
                f" {self.important_ratio}"
            )
        if self.step < 1:
            raise ValueError(f"vispruner: step must be at least 1 token per round, got {self.step}")

    @property
    def signals(self) -> frozenset[Signal]:
        """[CLS] attention and features of the feature block."""
        return frozenset({Saliency(), EncoderFeatures()})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Important tokens, then diverse ones of the rest."""
        order = ranked(tokens[Saliency()])
        important = int(k * self.important_ratio + 1e-9)
        diverse = thin_out(tokens[EncoderFeatures()], order[important:], k - important, self.step)
        return Selection(torch.cat([order[:important], diverse]).sort().values)


def thin_out(features: Tensor, rest: Tensor, k: int, step: int) -> Tensor:
    """[k] of the tokens ``rest`` [R]: rounds in which the even positions most similar to any odd
    position are dropped.

    Survivors of the even positions come first, by descending similarity, then the odd positions:
    this order defines the next round's partition, so it is part of the method.
    """
    if k == 0:
        return rest[:0]
    similarity = unit(features)
    similarity = similarity @ similarity.T
    while len(rest) > k:
        even, odd = rest[::2], rest[1::2]
        drop = min(step, len(rest) - k, max(1, len(even) - 1))
        closest = similarity.index_select(0, odd).amax(0)[
            even
        ]  # whole rows: several times faster than a gather
        rest = torch.cat([even[ranked(closest)[drop:]], odd])
    return rest
