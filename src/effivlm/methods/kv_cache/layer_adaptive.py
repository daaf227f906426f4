"""Layer budgets by attention density, mixed with even ones, for any scorer (EffiVLM-Bench 5.1:
U-40, U-80).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import LayerCache, Paper, Room
from effivlm.methods.kv_cache.allocators import Density, allocated
from effivlm.methods.kv_cache.wrapper import Wrapper
from effivlm.methods.signals import Signal, ThresholdCounts


@dataclass(frozen=True)
class LayerAdaptive(Wrapper):
    """A wrapper around any scorer that gives layers with denser attention more entries.

    Attributes:
        uniform: part of the budget spread evenly: 0, 0.4 (U-40), 0.8 (U-80).
        window: share of the mean budget every layer keeps whatever its density.
        p: as in vl_cache.
    """

    name: ClassVar[str] = "layer_adaptive"
    paper: ClassVar[Paper] = Paper(
        "EffiVLM-Bench: A Comprehensive Benchmark for Evaluating Training-Free Acceleration in"
        " Large Vision-Language Models",
        "2506.00479",
        "",
        (
            (
                "not in the released code: shares are mixed first, then bounded and made to meet"
                " the total"
            ),
        ),
    )
    uniform: float = 0.8
    window: float = 0.1
    p: float = 0.01

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if not (0 < self.p < 1 and 0 <= self.uniform <= 1 and 0 <= self.window <= 1):
            got = f"uniform={self.uniform}, window={self.window}, p={self.p}"
            raise ValueError(
                f"layer_adaptive: {got}: uniform and window must be in [0, 1] and p in (0, 1)"
            )
        self._needs(
            not self.scorer.spreads,
            "it has layer budgets of its own, which this would replace: write for example"
            f" {self.scorer.name}@0.2",
        )
        least = getattr(self.scorer, "window", 0.0)
        if self.window < least:
            raise ValueError(
                f"layer_adaptive: window={self.window} is less than the {least} that"
                f" {self.scorer.name} always keeps"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """Those of the scorer, and the density."""
        return self.scorer.signals | {ThresholdCounts(self.p)}

    @property
    def waits(self) -> bool:
        """Densities of all layers compete."""
        return True

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """By density, partly even."""
        return allocated(Density(self.window, self.uniform), room, budget)

    def statistic(self, cache: LayerCache) -> Tensor:
        """Density: the share of entries that count, mean over heads."""
        return 1 - cache[ThresholdCounts(self.p)].mean()
