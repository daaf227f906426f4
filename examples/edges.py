"""Edges: keep the tokens nearest to the border of the image: docs/adding-a-method.md."""

from dataclasses import dataclass

from effivlm.methods.base import ImageTokens, Paper, PreLLM, Selection
from effivlm.ops.select import top_k


@dataclass(frozen=True)
class Edges(PreLLM):
    """Scores a token by how far it lies from the middle; ``power`` weighs far against near."""

    name = "edges"
    paper = Paper("Edges (an example, not a paper)", "0000.00000", "")
    power: float = 1.0

    @property
    def unsupported(self):
        """It needs to know where tokens are."""
        return {"no_grid": "its tokens have no row and column"}

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """The ``k`` tokens farthest from the middle."""
        place = tokens.place
        middle = (place.amin(0) + place.amax(0)) / 2
        away = (place - middle).abs() ** self.power
        return Selection(top_k(away.sum(1), k))
