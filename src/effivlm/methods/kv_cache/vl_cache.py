"""VL-Cache: rows after the image decide what stays, and layers with dense attention get more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import LayerCache, Paper, Room
from effivlm.methods.kv_cache.allocators import Density, allocated
from effivlm.methods.kv_cache.scoring import WindowedKV, protect_recent, recent
from effivlm.methods.signals import PostVisionRows, Signal, ThresholdCounts


@dataclass(frozen=True)
class VLCache(WindowedKV):
    """Attention from the rows after the last visual token; budgets by the share of entries that
    matter there.

    Attributes:
        p: an attention entry counts if it reaches ``p`` times its row's largest.
        uniform: part of the budget spread evenly over layers: 0.4 and 0.8 are EffiVLM-Bench's U-40
            and U-80.
        renormalise: False clips layer budgets and leaves them there, as published; the total then
            misses the budget.
    """

    name: ClassVar[str] = "vl_cache"
    paper: ClassVar[Paper] = Paper(
        "VL-Cache: Sparsity and Modality-Aware KV Cache Compression for Vision-Language Model"
        " Inference Acceleration",
        "2410.23317",
        "",
        (
            (
                "written after the paper's formulas and EffiVLM-Bench @ ab3ee18, since the authors"
                " published no code"
            ),
            (
                "layer budgets at a bound are fixed and the others rescaled, so that the total is"
                " met; renormalise=false does not"
            ),
            "a prompt without rows after its last visual token is read through its last 32 rows",
        ),
    )
    p: float = 0.01
    uniform: float = 0.0
    renormalise: bool = True

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if not (0 < self.p < 1 and 0 <= self.uniform <= 1):
            raise ValueError(
                f"{self.name}: p={self.p} must be in (0, 1) and uniform={self.uniform} in [0, 1]"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """Rows after the last visual token."""
        return frozenset({PostVisionRows(), ThresholdCounts(self.p)})

    @property
    def waits(self) -> bool:
        """Densities of all layers compete."""
        return True

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """By density."""
        density = Density(self.window, self.uniform, renormalise=self.renormalise)
        return allocated(density, room, budget)

    def statistic(self, cache: LayerCache) -> Tensor:
        """Density: the share of entries that count, mean over heads."""
        return 1 - cache[ThresholdCounts(self.p)].mean()

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Attention received from those rows; visual and text entries compete."""
        return protect_recent(self.folded(cache[PostVisionRows()], cache), recent(k, self.window))
