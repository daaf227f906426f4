"""VisionZip: keep the patches [CLS] looks at, and merge the rest by key similarity into a few
contextual tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.methods.base import ImageTokens, Merge, Paper, PreLLM, Selection
from effivlm.methods.signals import EncoderKeys, Saliency, Signal
from effivlm.ops.merge import mean_into
from effivlm.ops.select import lattice, others, top_k, unit

VARIANTS = ("", "official")


@dataclass(frozen=True)
class VisionZip(PreLLM):
    """Dominant tokens by attention, contextual tokens by merging.

    Attributes:
        ratio: dominant tokens per contextual token; the paper's 54 + 10 of 64.
        variant: ``official``: contextual targets are the first of a stride (the bottom of the image
            can hold none), and a contextual token is target + mean of its members, about twice the
            norm of a token.
    """

    ratio: float = 5.4
    variant: str = ""

    name = "visionzip"
    paper = Paper(
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        "2412.04467",
        "dvlab-research/VisionZip @ 3151f6d",
        (
            (
                "merges projected tokens; the official LLaVA code merges encoder features before"
                " the projector"
            ),
            "the [CLS] token is not sent, its place in the budget goes to a patch",
            (
                "contextual tokens are plain means of target and members (the paper's centroids),"
                " targets are spaced over all remaining tokens; variant=official sums instead and"
                " takes the first of a stride"
            ),
            (
                "contextual tokens stand at their targets, in raster order; the official code"
                " appends them"
            ),
            "without a [CLS]: attention received from all patches",
        ),
    )

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"visionzip: variant must be one of {VARIANTS}, got {self.variant!r}")
        if self.ratio <= 0:
            raise ValueError(
                "visionzip: ratio is dominant tokens per contextual token, above 0, got"
                f" {self.ratio}"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """[CLS] attention and keys of the feature block."""
        return frozenset({Saliency(), EncoderKeys()})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Dominant tokens, and contextual ones standing at their targets."""
        contextual = min(max(1, int(k / (self.ratio + 1) + 1e-9)), k - 1)
        dominant = top_k(tokens[Saliency()], k - contextual)
        if contextual == 0:
            return Selection(dominant)
        official = self.variant == "official"
        targets, source, heir = self.assign(tokens[EncoderKeys()], dominant, contextual)
        merge = target_plus_mean(targets, heir, source) if official else mean_into(heir, source)
        return Selection(torch.cat([dominant, targets]).sort().values, Merge(*merge))

    def assign(
        self, keys: Tensor, dominant: Tensor, contextual: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Targets [c] among the tokens that are not dominant, the tokens merged [M - c], and the
        target of each [M - c].
        """
        rest = others(dominant, len(keys))
        if self.variant == "official":
            at = torch.arange(contextual, device=rest.device) * max(1, len(rest) // contextual)
        else:
            at = lattice(len(rest), contextual).to(rest.device)
        targets, source = rest[at], rest[others(at, len(rest))]
        rows = unit(keys)
        return targets, source, targets[(rows[source] @ rows[targets].T).argmax(1)]


def target_plus_mean(
    targets: Tensor, heir: Tensor, source: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The official merge: each target keeps its own row in full and adds the mean of its members
    (heir, source [E]).
    """
    size = int(targets.max()) + 1
    members = torch.zeros(size, device=targets.device).index_add_(
        0, heir, torch.ones_like(heir, dtype=torch.float32)
    )
    weight = torch.cat([torch.ones(len(targets), device=targets.device), 1 / members[heir]])
    return torch.cat([targets, heir]), torch.cat([targets, source]), weight
