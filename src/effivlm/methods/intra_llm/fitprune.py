"""FitPrune: delete at every layer the tokens that matter least both to the text and to other visual
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from effivlm.budget import Budget
from effivlm.methods.base import IntraLLM, LayerTokens, Paper, Room, Selection
from effivlm.methods.schedules import TOKENS, preset_or_budget, published, stages
from effivlm.methods.signals import HeadMaxSums, Signal
from effivlm.ops.select import top_k

# tokens left of 576 after these layers of 32, by published reduction of FLOPs
KNOTS = (0, 2, 4, 8, 13, 19, 31)
LEFT = {
    "50": (573, 517, 464, 321, 290, 208, 173),
    "60": (562, 440, 368, 254, 231, 154, 127),
    "80": (448, 203, 142, 116, 113, 73, 62),
    "90": (314, 81, 49, 46, 46, 39, 37),
}


@dataclass(frozen=True)
class FitPrune(IntraLLM):
    """Cuts before every layer from the second on, along a fitted curve of tokens left.

    Attributes:
        preset: a published curve (50, 60, 80, 90 per cent of FLOPs) instead of a budget.
        left: a curve fitted by `effivlm.calibration.fit_deletions`: tokens left of 576 after each
            layer; it replaces the shape that budgets scale, or without a budget it is used as it
            is.
    """

    name: ClassVar[str] = "fitprune"
    paper: ClassVar[Paper] = Paper(
        "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language"
        " Models",
        "2409.10197",
        "https://github.com/ywh187/FitPrune @ d28e418",
        (
            (
                "deletes before the next layer; the official code deletes inside layer l, between"
                " attention and output projection"
            ),
            (
                "published curves are known here at seven layers and interpolated linearly between"
                " them"
            ),
            (
                "curves scale with n, and with depth by resampling; the official code is for 576"
                " tokens and 32 layers"
            ),
            "budgets scale the 60 % curve, or the fitted one",
        ),
    )
    budget: ClassVar[str] = "optional"
    presets: ClassVar[tuple[str, ...]] = tuple(f"preset={p}" for p in LEFT)
    preset: str = ""
    left: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        if self.preset and self.preset not in LEFT:
            raise ValueError(f"fitprune: preset={self.preset!r}: expected one of {', '.join(LEFT)}")
        falling = list(self.left) == sorted(self.left, reverse=True)
        if self.left and (self.preset or not falling or self.left[-1] < 1 or self.left[0] > TOKENS):
            raise ValueError(
                f"fitprune: left={self.left}: expected falling counts between {TOKENS} and 1, and"
                " no preset"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """Attention received from text and from visual rows, maximum over heads."""
        return frozenset({HeadMaxSums(rows="text"), HeadMaxSums(rows="visual")})

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """A cut before every layer but the first."""
        layers = room.layers
        at = tuple(range(1, layers))
        fitted = bool(self.left) and budget is None
        direct = fitted or preset_or_budget(self.name, self.preset, tuple(LEFT), budget)
        curve = self.left or curve_of(LEFT[self.preset or "60"])
        counts = [curve[min(len(curve) - 1, (a - 1) * len(curve) // layers)] for a in at]
        if direct:
            return published(self.name, at, counts, room)
        return stages(self.name, at, [k / TOKENS for k in counts], room, budget)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Drop the lowest products."""
        text, visual = tokens[HeadMaxSums(rows="text")], tokens[HeadMaxSums(rows="visual")]
        return Selection(top_k((text * visual)[tokens.visual], k))


def curve_of(knots: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens left after each of 32 layers, linear between the known ones."""
    out: list[int] = []
    for layer in range(KNOTS[-1] + 1):
        i = max(i for i, at in enumerate(KNOTS) if at <= layer)
        j = min(i + 1, len(KNOTS) - 1)
        part = (layer - KNOTS[i]) / max(1, KNOTS[j] - KNOTS[i])
        out.append(round(knots[i] + part * (knots[j] - knots[i])))
    return tuple(out)
