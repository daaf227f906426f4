"""AdaptInfer: text tokens weigh in by their role in text-to-text attention, head by head, and
re-weigh at every stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from effivlm.budget import Budget
from effivlm.methods.base import IntraLLM, LayerTokens, Paper, Room, Selection
from effivlm.methods.schedules import preset_or_budget, published, resample, scaled_layers, stages
from effivlm.methods.signals import MutualTextSums, Signal
from effivlm.ops.select import top_k

AT = (2, 11, 21)
COUNTS = {
    "128": (290, 72, 18),
    "64": (133, 27, 3),
    "48": (80, 24, 2),
    "32": (40, 12, 0),
    "128-13b": (300, 94, 30),
    "64-13b": (148, 40, 5),
}
SHAPE = tuple(k / 576 for k in COUNTS["128"])


@dataclass(frozen=True)
class AdaptInfer(IntraLLM):
    """All text rows are soft raters.

    Attributes:
        layers: cuts happen before these; empty: 2-11-21 (the paper's "after 1, 10, 20"), moved in
            proportion for models with 21 layers or fewer. Layers 1-10-20 are the paper's for
            Qwen2-VL-2B.
        preset: a published list (128, 64, 48, 32, 128-13b, 64-13b) instead of a budget; its true
            mean share is higher than its name says, see `effivlm show adaptinfer`.
    """

    name: ClassVar[str] = "adaptinfer"
    paper: ClassVar[Paper] = Paper(
        "AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text"
        " Guidance",
        "2508.06084",
        "weiczh02/AdaptInfer-base @ 9dac67c, 8f5ae0c",
        (
            (
                "positions are kept, as in the official Qwen2-VL code; the LLaVA code numbers the"
                " survivors anew"
            ),
            "without text after the image the last token rates",
            "budgets scale the shape of the 128 list",
        ),
    )
    budget: ClassVar[str] = "optional"
    presets: ClassVar[tuple[str, ...]] = tuple(f"preset={p}" for p in COUNTS)
    layers: tuple[int, ...] = ()
    preset: str = ""

    def __post_init__(self) -> None:
        """Validate."""
        if self.preset and self.preset not in COUNTS:
            raise ValueError(
                f"adaptinfer: preset={self.preset!r}: expected one of {', '.join(COUNTS)}"
            )
        if any(k < 1 for k in self.layers):
            raise ValueError(
                f"adaptinfer: layers={self.layers} must be 1 or more: it reads the attention of the"
                " layer before"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """Text rows of the layer before, weighed by their role."""
        return frozenset({MutualTextSums()})

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """Three stages, or the published counts."""
        at = scaled_layers(AT, room.layers, self.layers)
        if preset_or_budget(self.name, self.preset, tuple(COUNTS), budget):
            return published(self.name, at, resample(COUNTS[self.preset], len(at)), room)
        return stages(self.name, at, resample(SHAPE, len(at)), room, budget)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Highest score."""
        return Selection(top_k(tokens[MutualTextSums()].sum(0)[tokens.visual], k))
