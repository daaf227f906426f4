"""What a prefill will hold, known from budgets before any layer has run."""

from dataclasses import dataclass, field

from effivlm.methods.base import Method
from effivlm.runtime.tokens import Prompt


@dataclass(frozen=True)
class PlannedCut:
    """One image's cut at a decoder layer: which method cuts which image (index into
    ``Prompt.images``) to how many.
    """

    method: Method
    image: int
    keep: int


@dataclass
class Promise:
    """What a prefill will hold, known from budgets before any layer has run.

    Attributes:
        before: per image, tokens entering the LLM. cuts: layer -> planned cuts.
    """

    before: list[int]
    cuts: dict[int, list[PlannedCut]] = field(default_factory=dict)

    def visual(self, prompt: Prompt, row: int, layers: int) -> list[int]:
        """[layers] visual tokens of a row that enter each layer."""
        total = [0] * layers
        for number, image in enumerate(prompt.images):
            count = self.before[number]
            for layer in range(layers) if image.row == row else ():
                keeps = [c.keep for c in self.cuts.get(layer, ()) if c.image == number]
                count = min(count, *keeps) if keeps else count
                total[layer] += count
        return total

    def tokens(self, prompt: Prompt, row: int, layers: int) -> list[int]:
        """[layers] all tokens of a row that enter each layer, padding apart."""
        return [prompt.texts[row] + n for n in self.visual(prompt, row, layers)]

    def lengths(self, prompt: Prompt, layers: int) -> list[list[int]]:
        """[rows][layers] `tokens`."""
        return [self.tokens(prompt, row, layers) for row in range(len(prompt.keys))]
