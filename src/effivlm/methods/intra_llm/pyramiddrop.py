"""PyramidDrop: redundancy grows with depth, so the sequence is shortened in stages, by the last
token's attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from effivlm.budget import Budget
from effivlm.methods.base import IntraLLM, LayerTokens, Paper, Room, Selection
from effivlm.methods.schedules import preset_or_budget, published, resample, scaled_layers, stages
from effivlm.methods.signals import LastRow, Signal
from effivlm.ops.select import top_k

AT = (8, 16, 24)
COUNTS = (288, 144, 72)  # of 576; 46.9 % of 32 layers' inputs


@dataclass(frozen=True)
class PyramidDrop(IntraLLM):
    """Ranks before each stage with the attention of the layer about to run, computed on its own
    input.

    Attributes:
        layers: cuts happen before these; empty: 8-16-24, moved in proportion for models with 24
            layers or fewer.
        ratio: share that every stage keeps of the one before (the paper's lambda), the shape that
            budgets scale.
        preset: ``paper`` for the published counts, instead of a budget.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[Paper] = Paper(
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy"
        " Reduction",
        "2410.17247",
        "https://github.com/Cooperx521/PyramidDrop @ 6444f30",
        (
            "positions are kept; the official code numbers the survivors anew",
            "query groups are expanded; the official ranking fails on models with grouped queries",
            "every image is ranked and shortened by itself; the official code shortens the first",
            (
                "budgets scale the published ratios; with these layers the mean share cannot go"
                " below a quarter"
            ),
        ),
    )
    budget: ClassVar[str] = "optional"
    presets: ClassVar[tuple[str, ...]] = ("preset=paper",)
    layers: tuple[int, ...] = ()
    ratio: float = 0.5
    preset: str = ""

    def __post_init__(self) -> None:
        """Validate."""
        if not 0 < self.ratio < 1:
            raise ValueError(f"pyramiddrop: ratio={self.ratio} must lie between 0 and 1")
        if self.preset not in ("", "paper"):
            raise ValueError(f"pyramiddrop: preset={self.preset!r}: expected paper")

    @property
    def signals(self) -> frozenset[Signal]:
        """The last prompt token's row in the coming layer."""
        return frozenset({LastRow(of="next")})

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """Stages whose shares fall by ``ratio``, or the published counts."""
        at = scaled_layers(AT, room.layers, self.layers)
        if preset_or_budget(self.name, self.preset, ("paper",), budget):
            return published(self.name, at, resample(COUNTS, len(at)), room)
        ratios = [self.ratio ** (i + 1) for i in range(len(at))]
        return stages(self.name, at, ratios, room, budget)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Highest attention from the last prompt token, mean over query heads."""
        return Selection(top_k(tokens[LastRow(of="next")].mean(0)[tokens.visual], k))
