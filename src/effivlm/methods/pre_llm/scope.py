"""SCOPE: each pick adds the most to the coverage of all patches, weighted by its own [CLS]
attention.
"""

from dataclasses import dataclass

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.methods.signals import EncoderFeatures, Saliency, Signal
from effivlm.ops.precision import working
from effivlm.ops.select import coverage


@dataclass(frozen=True)
class Scope(PreLLM):
    """Greedy facility location with gains times ``attention ** alpha``.

    Attributes:
        alpha: how much attention counts; 0 is pure coverage.
    """

    alpha: float = 1.0

    name = "scope"
    paper = Paper(
        "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs",
        "2510.24214",
        "kinredon/SCOPE @ 6bf7306",
        (
            (
                "once everything is covered the rest is filled by attention; the official code"
                " falls to indices 0, 1, 2, ..."
            ),
            "gains within 1e-6 of the first pick's gain are ties, the lower index wins",
            "without a [CLS]: attention received from all patches",
        ),
    )

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(
                "scope: alpha is an exponent of attention and must not be negative, got"
                f" {self.alpha}"
            )

    @property
    def signals(self) -> frozenset[Signal]:
        """[CLS] attention and features of the feature block."""
        return frozenset({Saliency(), EncoderFeatures()})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Greedy coverage."""
        attention = working(tokens[Saliency()]).nan_to_num().clamp(min=0)
        return Selection(
            coverage(tokens[EncoderFeatures()], attention**self.alpha, k).sort().values
        )
