"""FasterVLM: keep the patches that get the most [CLS] attention in the encoder."""

from dataclasses import dataclass

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.methods.signals import Saliency, Signal
from effivlm.ops.select import top_k


@dataclass(frozen=True)
class FasterVLM(PreLLM):
    """Top-k by [CLS] attention at the feature block, mean over heads."""

    name = "fastervlm"
    paper = Paper(
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference"
        " Faster",
        "2412.01818",
        "Theia-4869/FasterVLM @ f5d5f12",
        ("without a [CLS]: attention received from all patches",),
    )

    @property
    def signals(self) -> frozenset[Signal]:
        """[CLS] attention of the feature block."""
        return frozenset({Saliency()})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Keep the most attended."""
        return Selection(top_k(tokens[Saliency()], k))
