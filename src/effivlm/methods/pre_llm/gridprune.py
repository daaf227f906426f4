"""GridPrune: zones of the image share the budget by how much they answer the prompt; in a zone,
relevance meets saliency.

No code was published, and the description leaves constants open: ``zones``, ``alpha`` and
``temperature`` are free here.
"""

from dataclasses import dataclass

import torch

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.methods.signals import Saliency, Signal, TextEmbeds
from effivlm.ops.regions import best_per_region, blocks, region_mean, share_out
from effivlm.ops.select import min_max, rounded, unit


@dataclass(frozen=True)
class GridPrune(PreLLM):
    """Where to look (zones), then what to take (tokens).

    The question is one direction, as the paper's is one text vector: the *unit of the mean* of the
    text tokens' unit vectors. Unit vectors inside, so that every token counts alike; a unit
    outside, for nothing rescales relevance afterwards: the bare mean is the shorter the more its
    tokens differ, so a long prompt would flatten the softmax over zones and lose against saliency.

    Attributes:
        zones: zones along each side of the grid. A free constant.
        alpha: share of saliency, against relevance, in a token's score. A free constant.
        temperature: of the softmax over zones; 1 as described, which is close to an even split. A
            free constant.
    """

    zones: int = 4
    alpha: float = 0.5
    temperature: float = 1.0

    name = "gridprune"
    paper = Paper(
        'GridPrune: From "Where to Look" to "What to Select" in Visual Token Pruning for MLLMs',
        "2511.10081",
        "",
        (
            "written from the description; grid, alpha and temperature are choices made here",
            (
                "relevance is the cosine of projected tokens with the mean direction of the"
                " prompt's text embeddings, without the markers around images; the paper uses"
                " CLIP's image and text projections"
            ),
            (
                "saliency is scaled to [0, 1] per image, for as a probability it would not count"
                " against relevance"
            ),
            (
                "quotas by largest remainder, capped at the size of a zone, the excess shared among"
                " the others"
            ),
            "without a [CLS]: attention received from all patches",
        ),
    )

    def __post_init__(self) -> None:
        if self.zones < 1 or not 0 <= self.alpha <= 1 or self.temperature <= 0:
            raise ValueError(
                "gridprune: needs zones >= 1, alpha in [0, 1] and temperature > 0, "
                f"got {self.zones}, {self.alpha} and {self.temperature}"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """[CLS] attention of the feature block and embeddings of the prompt's text."""
        return frozenset({Saliency(), TextEmbeds()})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Quotas by softmax of the zones' mean relevance, and in every zone the highest scores."""
        text = unit(tokens[TextEmbeds()])
        question = (
            unit(text.mean(0))
            if len(text)
            else torch.zeros(tokens.embeds.shape[1], device=text.device)
        )
        relevance = unit(tokens.embeds) @ question
        score = (1 - self.alpha) * (relevance + 1) / 2 + self.alpha * min_max(tokens[Saliency()])
        zone = blocks(tokens.place, self.zones)
        mean, size = region_mean(relevance, zone)
        quota = share_out((mean / self.temperature).softmax(0), size, k)
        return Selection(best_per_region(rounded(score), zone, quota))
