"""ToMe: in every encoder block the most similar pairs of tokens merge into size-weighted means;
attention counts sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.base import BlockTokens, EncoderReducer, Merge, Paper, Room, Selection
from effivlm.ops.merge import average, bipartite
from effivlm.ops.select import others


@dataclass(frozen=True)
class ToMe(EncoderReducer):
    """Bipartite soft matching on keys, an equal number of pairs per block, sizes tracked.

    Attributes:
        prop_attn: add log(size) of every key to later attention logits, as for models not trained
            with merging.
    """

    prop_attn: bool = True

    name = "tome"
    paper = Paper(
        "Token Merging: Your ViT But Faster",
        "2210.09461",
        "facebookresearch/ToMe @ af95e4b",
        (
            (
                "merges between blocks, with the keys of the block before, instead of between"
                " attention and MLP of one block"
            ),
            (
                "pairs per block follow the budget, in equal steps; a step that would merge more"
                " than half of the tokens matches what is left once more"
            ),
            (
                "tokens keep raster order, so even and odd tokens alternate over the image; the"
                " official order degrades, so beyond the first step other pairs are proposed"
            ),
            (
                "where several patches become one LLM token, whole groups are merged, so no group"
                " is torn apart"
            ),
            (
                "nothing is merged before the first and the last block; many models read features"
                " before the last"
            ),
        ),
    )

    @property
    def proportional_attention(self) -> bool:
        """As ``prop_attn``."""
        return self.prop_attn

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """Equal steps down to the budget, before every block but the first and the last."""
        assert budget is not None
        n, k, steps = room.n, budget.count(room.n), max(1, len(room.lengths) - 2)
        return [n - (n - k) * min(t, steps) // steps for t in range(len(room.lengths))]

    def reduce_block(self, tokens: BlockTokens, k: int) -> Selection:
        """Merge pairs until ``k`` groups are left; a mean weighs what it stands for by size.

        Even tokens propose, odd ones receive, and a [CLS] is token 0: it never merges, and it makes
        the first patch an odd one, as in the official code.
        """
        every = torch.arange(len(tokens.keys), device=tokens.keys.device)
        owner, alive = every.clone(), every
        while len(alive) > k:
            source, target = _pairs(tokens.keys[alive], len(alive) - k, tokens.prefix)
            owner[alive[source]] = alive[target]
            owner = owner[owner]
            alive = alive[others(source, len(alive))]
        return Selection(alive, Merge(*average(owner, every, tokens.sizes)))


def _pairs(keys: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """`ops.merge.bipartite` of keys [G, d] that stand behind ``prefix`` protected tokens, whose
    keys matter to nobody: only whether their number is odd.
    """
    odd = prefix % 2
    source, target = bipartite(torch.nn.functional.pad(keys, (0, 0, odd, 0)), r, odd)
    return source - odd, target - odd
