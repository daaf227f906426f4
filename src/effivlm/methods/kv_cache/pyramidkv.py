"""PyramidKV: SnapKV's scores with a budget that shrinks from the first layer to the last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from effivlm.budget import Budget
from effivlm.methods.base import Paper, Room
from effivlm.methods.kv_cache.allocators import Pyramid
from effivlm.methods.kv_cache.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Attention funnels into fewer entries in higher layers, so they get fewer; the window is the
    same everywhere.

    Attributes:
        beta: mean budget over the last layer's.
        variant: ``exact`` spends its budget; ``effivlm`` rounds the step between layers down, as
            published codes do.
    """

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[Paper] = Paper(
        "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        "2406.02069",
        "https://github.com/Zefan-Cai/KVCache-Factory @ c97f9d7",
        (
            (
                "a real-valued schedule, rounded by largest remainder; the published integer step"
                " keeps up to 1.9 times the budget"
            ),
            "scores as in snapkv here: one choice per KV head, observing rows follow the window",
        ),
    )
    beta: int = 20
    variant: Literal["exact", "effivlm"] = "exact"

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"pyramidkv: beta={self.beta} must be at least 1")

    @property
    def spreads(self) -> bool:
        """Less and less from layer to layer."""
        return True

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """The pyramid."""
        assert budget is not None
        pyramid = Pyramid(self.beta, self.window, self.variant)
        return pyramid(list(room.lengths), budget.as_share(room.n), None)
