"""VScan: pick tokens by a deep and a shallow encoder block, merge the rest into them, and cut once
more inside the LLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effivlm.budget import Budget, split
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
from effivlm.methods.schedules import most_entering, scaled_layers, single_cut
from effivlm.methods.signals import LastRow, Saliency, Signal
from effivlm.ops.cluster import nearest_kept
from effivlm.ops.merge import mean_into
from effivlm.ops.numbers import occurrences
from effivlm.ops.precision import working
from effivlm.ops.regions import best_per_region
from effivlm.ops.select import top_k

AT = (16,)


@dataclass(frozen=True)
class VScanStage1(PreLLM):
    """VScan without its second cut: global and local scans before the LLM, every dropped token
    merged into a kept one.

    Attributes:
        window: side of the windows of the local scan, in tokens. local: encoder block of the local
            scan.
    """

    name: ClassVar[str] = "vscan_stage1"
    paper: ClassVar[Paper] = Paper(
        "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
        "2505.22654",
        "https://github.com/Tencent/SelfEvolvingAgent @ a82450e (VScan)",
        (
            (
                "keeps exactly k: local quotas by largest remainder; the official code keeps 98 of"
                " 100 and fails below 32"
            ),
            (
                "any grid: windows at the lower and right edges may be smaller; without a grid the"
                " scan is global only"
            ),
            "without [CLS]: attention received from all patches",
        ),
    )
    window: int = 6
    local: int = 5

    def __post_init__(self) -> None:
        """Validate."""
        if self.window < 1 or self.local < 0:
            raise ValueError(
                f"{self.name}: window={self.window} must be at least 1 and local={self.local} at"
                " least 0"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """Two encoder blocks."""
        return frozenset({Saliency(), Saliency(at=self.local)})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Half by the local scan, the rest by the global one; every dropped token joins the most
        similar kept one.
        """
        keep = scans(
            tokens[Saliency()], tokens[Saliency(at=self.local)], tokens.place, k, self.window
        )
        dropped, heir = nearest_kept(tokens.embeds, keep)
        return Selection(keep, Merge(*mean_into(heir, dropped)))


@dataclass(frozen=True)
class VScan(VScanStage1, IntraLLM):
    """Global and local scans before the LLM, last-token attention inside it.

    Attributes:
        layer: the second cut happens before it; -1: 16, moved in proportion for models with 16
            layers or fewer.
        ratio: tokens entering the LLM per token after the second cut (the paper's 96 and 32).
    """

    name: ClassVar[str] = "vscan"
    paper: ClassVar[Paper] = Paper(
        VScanStage1.paper.title,
        VScanStage1.paper.arxiv,
        VScanStage1.paper.code,
        (
            *VScanStage1.paper.deviations,
            (
                "the second cut reads the attention of the layer before, with rotary positions; the"
                " official code leaves them out"
            ),
        ),
    )
    layer: int = -1
    ratio: float = 3.0

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.layer < 1 and self.layer != -1:
            raise ValueError(
                f"vscan: layer={self.layer} must be at least 1 (or -1 for the published one)"
            )
        if self.ratio < 1:
            raise ValueError(
                f"vscan: ratio={self.ratio} must be at least 1: the second cut cannot add tokens"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """Two encoder blocks and the last token's row."""
        return super().signals | {LastRow()}

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """``ratio`` times what is left after the second cut enters the LLM; one cut there."""
        assert budget is not None
        (at,) = scaled_layers(AT, room.layers, () if self.layer == -1 else (self.layer,))
        if room.stage is IntraLLM:
            return single_cut(self.name, at, room, budget)
        layers, k = room.layers, budget.count(room.n)
        entering = int(self.ratio * k + 1e-9)
        if budget.unit == "visual_mean":
            entering = int(k * layers / (at + (layers - at) / self.ratio) + 1e-9)
            entering = min(entering, most_entering(k, at, layers))
        return [min(room.n, max(k, entering))]

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Highest attention from the last prompt token."""
        return Selection(top_k(tokens[LastRow()].mean(0)[tokens.visual], k))


def scans(deep: Tensor, shallow: Tensor, place: Tensor, k: int, side: int) -> Tensor:
    """[k] ascending: ``k // 2`` by shallow saliency [N], spread over windows, the others by deep
    saliency [N].

    Args:
        deep: [N] saliency.
        shallow: [N] saliency.
        place: [N, 2] rows and columns, NaN without a grid.
        k: tokens to keep.
        side: of a window.
    """
    count = 0 if bool(place.isnan().any()) else k // 2
    chosen = torch.empty(0, dtype=torch.long, device=deep.device)
    if count:
        at = (place.double() - place.double().amin(0)).div(side).floor().long()
        number = at[:, 0] * (at[:, 1].max() + 1) + at[:, 1]
        size = occurrences(number)
        quota = torch.tensor(split(count, size, size), device=deep.device)
        chosen = best_per_region(shallow, number, quota)
    rest = working(deep).index_fill(0, chosen, -torch.inf)
    return torch.cat([chosen, top_k(rest, k - count)]).sort().values
