"""VTW: visual information has moved into the text after some layers, so all visual tokens are
withdrawn there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from effivlm.budget import Budget, BudgetError
from effivlm.methods.base import IntraLLM, LayerTokens, Paper, Room, Selection


@dataclass(frozen=True)
class VTW(IntraLLM):
    """No visual token enters ``layer`` or any layer after it; the budget, if given, is the mean
    share and sets the layer.

    Attributes:
        layer: first layer without visual tokens when no budget is given; -1: half of the layers
            (the paper's 16 of 32). `effivlm.calibration.withdrawal_layer` finds it for a model.
    """

    name: ClassVar[str] = "vtw"
    paper: ClassVar[Paper] = Paper(
        "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid"
        " Inference",
        "2405.05803",
        "https://github.com/lzhxmu/VTW @ a3d8cfc",
        (
            "a budget b withdraws before layer floor(b * layers)",
            "withdraws every image; the official code withdraws one span",
        ),
    )
    budget: ClassVar[str] = "optional"
    units: ClassVar[tuple[str, ...]] = ("visual_mean",)
    layer: int = -1

    def __post_init__(self) -> None:
        """Validate."""
        if self.layer < 1 and self.layer != -1:
            raise ValueError(
                f"vtw: layer={self.layer} must be at least 1 (or -1 for half of the layers)"
            )

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """Nothing from one layer on.

        Raises:
            BudgetError: for less than one layer's share, or a ``layer`` outside the model.
        """
        if room.n == 0:
            return room.lengths
        layers = room.layers
        layer = layers // 2 if self.layer == -1 else self.layer
        if budget is not None:
            layer = math.floor(budget.as_share(room.n) * layers + 1e-9)
        if layer < 1:
            raise BudgetError(
                f"vtw@{budget.text if budget else ''}: visual tokens must enter at least one of"
                f" {layers} layers, so the smallest feasible share is {1 / layers:.4f}"
            )
        if budget is None and layer >= layers:
            raise BudgetError(
                f"vtw: layer={layer} does not exist in a model of {layers} decoder layers"
            )
        return [n if i < layer else 0 for i, n in enumerate(room.lengths)]

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Nothing stays."""
        return Selection(torch.empty(0, dtype=torch.long, device=tokens.visual.device))
