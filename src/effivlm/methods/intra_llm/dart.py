"""DART: keep the visual tokens least similar to a few pivots, so that what stays is not duplicated;
needs no attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import IntraLLM, LayerTokens, Paper, Room, Selection
from effivlm.methods.schedules import single_cut
from effivlm.methods.signals import Keys, NormedHidden, Signal
from effivlm.ops.precision import working
from effivlm.ops.select import ranked, top_k, unit


@dataclass(frozen=True)
class DART(IntraLLM):
    """Pivots have the largest keys (L1); each in turn takes the tokens with the lowest cosine to it
    that are left.

    Attributes:
        layer: first layer that runs on the short sequence.
        pivots: visual pivots, which are kept. text_pivots: text pivots, which only choose.
    """

    name: ClassVar[str] = "dart"
    paper: ClassVar[Paper] = Paper(
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
        "2502.11494",
        "https://github.com/ZichenWen1/DART (not readable; from agreeing ports, VTC-Bench @"
        " 983e443)",
        (
            (
                "pivots take their turns in ascending order, visual before text; the official loop"
                " follows a Python set's order"
            ),
            (
                "keeps exactly k: what does not divide by the number of pivots goes to the last"
                " pivot; the official code keeps p_v + (p_v + p_t) * floor(k / (p_v + p_t)), that"
                " is 132 where 128 are asked"
            ),
            (
                "with k <= pivots only the strongest visual pivots are kept; fewer text tokens than"
                " pivots is no error"
            ),
        ),
    )
    layer: int = 2
    pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        """Validate."""
        if self.layer < 1:
            raise ValueError(
                f"dart: layer={self.layer} must be at least 1: it reads the keys of the layer"
                " before"
            )
        if self.pivots < 0 or self.text_pivots < 0 or self.pivots + self.text_pivots == 0:
            raise ValueError(
                f"dart: pivots={self.pivots}, text_pivots={self.text_pivots}: expected at least one"
                " pivot in all"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """Keys for the pivots, normed hidden states for the similarities."""
        return frozenset({Keys(), NormedHidden()})

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """One cut before ``layer``."""
        return single_cut(self.name, self.layer, room, budget)

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Pivots, then the least similar tokens, pivot by pivot."""
        strength = working(tokens[Keys()]).abs().sum((0, 2))
        own = top_k(strength[tokens.visual], min(self.pivots, k))
        if len(own) == k:
            return Selection(own)
        text = tokens.text[top_k(strength[tokens.text], self.text_pivots)]
        x = tokens[NormedHidden()]
        turns = torch.cat([tokens.visual[own], text])
        if len(turns) == 0:
            return Selection(top_k(strength[tokens.visual], k))
        return Selection(least_similar(x[tokens.visual], x[turns], own, k))


def least_similar(x: Tensor, pivots: Tensor, taken: Tensor, k: int) -> Tensor:
    """[k] indices of x [N, D], ascending: ``taken``, and what each pivot [P, D] in turn finds least
    similar (cosine).

    Every pivot takes ``(k - len(taken)) // P`` tokens, the last one what is missing besides.
    """
    similarity = unit(pivots) @ unit(x).T
    free = torch.ones(len(x), dtype=torch.bool, device=x.device)
    free[taken] = False
    share, rest = divmod(k - len(taken), len(pivots))
    out = [taken]
    for turn, row in enumerate(similarity):
        pick = ranked(torch.where(free, -row, -torch.inf))[
            : share + (rest if turn == len(pivots) - 1 else 0)
        ]
        free[pick] = False
        out.append(pick)
    return torch.cat(out).sort().values
