"""HoloV: spread the budget over regions of the image by how much attention and variety each holds,
then rank inside.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.methods.signals import Saliency, Signal
from effivlm.ops.numbers import distinct, whole
from effivlm.ops.precision import working
from effivlm.ops.regions import best_per_region, blocks, region_mean, segments, share_out
from effivlm.ops.select import others, ranked, rounded, unit

VARIANTS = ("", "official")


@dataclass(frozen=True)
class HoloV(PreLLM):
    """Quotas per region, top tokens in each.

    Attributes:
        num_patches: regions; the largest square grid of at most as many blocks (contiguous segments
            where there is no grid).
        alpha: weight of the variety term relative to attention, both scaled to mean 1 over the
            image.
        variant: ``official``: segments of the raster, quotas and ranks by attention alone (in the
            released code the variety term cancels within every region).
    """

    num_patches: int = 16
    alpha: float = 0.09
    variant: str = ""

    name = "holov"
    paper = Paper(
        "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context"
        " Retention",
        "2510.02912",
        "obananas/HoloV @ 1d2e65e",
        (
            (
                "the variety term is scaled over the whole image, so that it counts; the official"
                " code scales it per region, where it cancels exactly"
            ),
            (
                "regions are 2-D blocks; the official code cuts the raster into segments"
                " (variant=official)"
            ),
            (
                "tokens a full region cannot take go to the others; the official code pads with"
                " zero vectors, where variant=official takes the most attended of the rest"
            ),
            "per tile or image; without a [CLS]: attention received from all patches",
        ),
    )

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"holov: variant must be one of {VARIANTS}, got {self.variant!r}")
        if self.num_patches < 1 or self.alpha < 0:
            raise ValueError(
                f"holov: needs num_patches >= 1 and alpha >= 0, got {self.num_patches} and"
                f" {self.alpha}"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """[CLS] attention of the feature block."""
        return frozenset({Saliency()})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Quotas by mean score, and in every region the highest scores."""
        attention = working(tokens[Saliency()]).nan_to_num().clamp(min=0)
        if self.variant == "official":
            region = segments(len(attention), self.num_patches).to(attention.device)
            mean, size = region_mean(attention, region)
            keep = best_per_region(attention, region, official_quota(mean, k).minimum(size))
            rest = others(keep, len(attention))
            return Selection(
                torch.cat([keep, rest[ranked(attention[rest])[: k - len(keep)]]]).sort().values
            )
        region = blocks(tokens.place, max(1, int(self.num_patches**0.5 + 1e-9)))
        score = rounded(scaled(attention) + self.alpha * scaled(variety(tokens.embeds, region)))
        return Selection(best_per_region(score, region, share_out(*region_mean(score, region), k)))


def official_quota(weight: Tensor, k: int) -> Tensor:
    """[R] the released code's quotas: rounded down, and one more for as many of the heaviest
    regions as are missing.
    """
    weight = (
        1090 * weight
    )  # the code's 1e3, and 1 + alpha of the variety term that cancels; only its 1e-6 sees them
    quota = (weight / (weight.sum() + 1e-6) * k).floor().long()
    quota[ranked(weight)[: k - int(quota.sum())]] += 1
    return quota


def scaled(x: Tensor) -> Tensor:
    """Not negative x [N] divided by its mean; zeros stay zero."""
    return x / x.mean().clamp(min=1e-30)


def variety(y: Tensor, region: Tensor) -> Tensor:
    """[N] spread of a token's cosines to the others of its region (a region of one has none)."""
    rows = unit(y)
    out = rows.new_zeros(len(y))
    for number in whole(distinct(region)):
        members = (region == number).nonzero()[:, 0]
        m = len(members)
        if m > 1:
            cosine = (rows[members] @ rows[members].T).fill_diagonal_(0.0)
            mean = cosine.sum(1, keepdim=True) / (m - 1)
            off = 1 - torch.eye(m, device=y.device)
            out[members] = ((cosine - mean) ** 2 * off).sum(1) / (m - 1)
    return out
