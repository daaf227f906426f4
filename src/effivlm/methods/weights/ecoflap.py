"""EcoFLAP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from effivlm.budget import Budget
from effivlm.methods.base import Paper
from effivlm.methods.linears import Promise, pruned_share
from effivlm.methods.weights.wanda import Wanda
from effivlm.ops.pruning import ecoflap_ratios

Place = tuple[int, str]


@dataclass(frozen=True)
class EcoFLAP(Wanda):
    """Shares the budget over decoder layers by how much noise in their weights costs, then prunes
    as Wanda does; with a pattern, which leaves nothing to share, it is Wanda.

    Attributes:
        samples: captions that every matrix is probed with.
        max_extra: a layer loses at most this share more than asked of all.
        by: layers share one ratio (``block``), or every matrix has its own (``matrix``).
    """

    samples: int = 32
    max_extra: float = 0.1
    by: Literal["block", "matrix"] = "block"

    name = "ecoflap"
    paper = Paper(
        "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
        "2310.02998",
        "ylsung/ECoFLaP @ 59dac0a",
        (
            "weights come back from a copy after a probe; the official ones drift",
            "only the language model is pruned, as in EffiVLM-Bench",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: expected at least 1")
        if not 0 <= self.max_extra <= 1:
            raise ValueError(f"max_extra={self.max_extra}: expected a share such as 0.1")

    def probes(self, budget: Budget | None) -> int:
        """None where a pattern fixes every layer's share."""
        return 0 if self.pattern else self.samples

    def shares(
        self, scores: Mapping[Place, float], sizes: Mapping[Place, int], budget: Budget | None
    ) -> dict[Place, float]:
        """By the sum of the scores of a layer's matrices."""
        group = {p: str(p[0]) if self.by == "block" else f"{p[0]}.{p[1]}" for p in sizes}
        total = dict.fromkeys(group.values(), 0.0)
        count = dict.fromkeys(group.values(), 0)
        for place, name in group.items():
            total[name] += scores[place]
            count[name] += sizes[place]
        ratio = pruned_share(budget)
        found = ecoflap_ratios(total, count, ratio, min(1.0, ratio + self.max_extra))
        return {place: found[name] for place, name in group.items()}

    def promise(self, rows: int, columns: int, share: float) -> Promise:
        """The same count in every row of a matrix."""
        return super().promise(rows, columns, max(0.0, share))
