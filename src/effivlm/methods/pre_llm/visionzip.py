"""VisionZip: keep the tokens the encoder attends to, and merge the rest into evenly spread contextual tokens."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from effivlm.methods.base import ImageTokens, Merge, Paper, PreLLM, Selection
from effivlm.methods.signals import EncoderKeys, Saliency, Signal
from effivlm.ops.select import top_k, unit


def contextual(keys: Tensor, rest: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets among ``rest`` at a constant stride, and the target of every other token by cosine of keys.

    Args:
        keys: [N, d]. rest: [M] ascending indices that are not dominant. count: contextual tokens, at most M.

    Returns:
        targets [count], merged [M - count] and assigned [M - count] (an index into targets), the first two into N.
    """
    stride = max(1, len(rest) // count)
    at = torch.arange(0, len(rest), stride, device=rest.device)[:count]
    other = torch.ones(len(rest), dtype=torch.bool, device=rest.device)
    other[at] = False
    x = unit(keys)
    assigned = (x[rest[other]] @ x[rest[at]].T).argmax(1)
    return rest[at], rest[other], assigned


@dataclass(frozen=True)
class VisionZip(PreLLM):
    """Dominant tokens by [CLS] attention (attention received without [CLS]); contextual tokens are means of clusters.

    Attributes:
        ratio: one token in ``ratio`` of the budget is contextual (official 6.4: 54 + 10 of 64).
        merge: ``mean`` (target and members, as the paper says) or ``sum`` (target plus the members' mean, the code).
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[Paper] = Paper(
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        "2412.04467",
        "https://github.com/dvlab-research/VisionZip @ 3151f6d",
        (
            "tokens are merged after the projector; the official LLaVA code merges before it",
            "contextual tokens stand at their target's place, in raster order; the official code appends them",
            "[CLS] itself is not kept: transformers' models do not project it",
            "contextual tokens are true means by default; merge=sum is the official sum",
        ),
    )
    ratio: float = 6.4
    merge: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        """Validate."""
        if self.ratio < 1:
            raise ValueError(f"visionzip: ratio={self.ratio} must be at least 1 (contextual tokens are 1/ratio of the budget)")

    @property
    def signals(self) -> frozenset[Signal]:
        """Saliency and keys of the block whose output the projector takes."""
        return frozenset({Saliency(), EncoderKeys()})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Dominant tokens plus merged contextual ones."""
        scores, keys = tokens[Saliency()], tokens[EncoderKeys()]
        context = min(max(1, int(k / self.ratio + 1e-9)), k - 1)
        dominant = top_k(scores, k - context)
        if not context:
            return Selection(dominant)
        rest = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        rest[dominant] = False
        targets, merged, assigned = contextual(keys, rest.nonzero()[:, 0], context)
        members = torch.bincount(assigned, minlength=context).float()
        own = 1 / (members + 1) if self.merge == "mean" else torch.ones_like(members)
        each = 1 / (members + 1) if self.merge == "mean" else 1 / members.clamp(min=1)
        merge = Merge(torch.cat([targets, targets[assigned]]), torch.cat([targets, merged]), torch.cat([own, each[assigned]]))
        return Selection(torch.cat([dominant, targets]).sort().values, merge)
