"""SnapKV: the last queries of the prompt vote for the entries the answer will need."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from effivlm.methods.base import LayerCache, Paper
from effivlm.methods.kv_cache.scoring import WindowedKV, recent
from effivlm.methods.signals import Signal, WindowRows
from effivlm.ops.statistics import pool


@dataclass(frozen=True)
class SnapKV(WindowedKV):
    """Attention from an observation window, pooled along the sequence.

    Attributes:
        rows: observing rows; 0 means as many as the kept window, as EffiVLM-Bench does.
        kernel: pooling width. pooling: ``avg``, ``max`` or ``none``.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[Paper] = Paper(
        "SnapKV: LLM Knows What You are Looking for Before Generation",
        "2404.14469",
        "https://github.com/FasterDecoding/SnapKV",
        (
            (
                "one choice per KV head (group mean), so that the cache stays small under grouped"
                " queries; the original repeats keys"
            ),
            (
                "observing rows and kept window default to 10 % of the budget (EffiVLM-Bench); the"
                " original uses 32 or 64"
            ),
            (
                "pooling=max: within the plateau that a peak makes, the entries' own scores decide,"
                " not torch.topk's order"
            ),
        ),
    )
    rows: int = 0
    kernel: int = 5
    pooling: Literal["avg", "max", "none"] = "avg"

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.rows < 0 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"{self.name}: rows={self.rows} must be >= 0 and kernel={self.kernel} odd"
            )
        if self.pooling == "none" and self.kernel != SnapKV.kernel:
            raise ValueError(
                f"{self.name}: kernel={self.kernel} has no effect with pooling=none: leave one of"
                " them out"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """The last rows."""
        return frozenset({WindowRows()})

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """Attention from the observing rows; pooled over the entries before the kept window."""
        window = recent(k, self.window)
        rows, past = min(self.rows or window, cache.length), cache.length - window
        seen = self.folded(cache[WindowRows(self.rows or window)], cache, rows)
        pooled = pool(seen[:, :past], self.kernel, self.pooling)
        if (
            self.pooling == "max"
        ):  # a peak makes a plateau: below the last bit of float32, the entries' own scores decide
            pooled = pooled.double() + seen[:, :past].double() * 2.0**-30
        return pad(pooled, (0, window), value=torch.inf)
