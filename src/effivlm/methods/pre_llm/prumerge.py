"""PruMerge: patches whose [CLS] attention stands out stay and take in what resembles them;
PruMerge+ adds even samples.

Both in a budgeted form: the interquartile rule says how many tokens stand out, the budget how many
stay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.methods.base import ImageTokens, Merge, Paper, PreLLM, Selection
from effivlm.methods.signals import ClsLogits, EncoderKeys, Signal
from effivlm.ops.precision import working
from effivlm.ops.select import lattice, others, ranked, unit

COMMON = (
    (
        "attention is softmaxed over the patches; the official code leaves [CLS] in the denominator"
        " (same order, weights scaled)"
    ),
    "merges projected tokens; the official code merges encoder features before the projector",
    (
        "neighbours are sought among pruned tokens and averaged with weights of attention, as the"
        " paper says; variant=official also takes kept ones, and adds attention * token to the kept"
        " token without normalising"
    ),
    (
        "no extra token for all that was pruned (official: unnormalised, so close to zero); tokens"
        " stay in raster order"
    ),
    "without a [CLS]: the mean query takes its place",
)
CODE = "42Shawn/LLaVA-PruMerge @ 097c041"


@dataclass(frozen=True)
class PruMerge(PreLLM):
    """Top-k by attention, each merged with its nearest neighbours by key.

    Attributes:
        neighbours: tokens merged into each kept token.
        variant: ``official`` merges as the released code does.
    """

    neighbours: int = 32
    variant: str = ""

    name = "prumerge"
    paper = Paper(
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
        "2403.15388",
        CODE,
        (
            (
                "the budget sets the number of tokens; the paper takes as many as the interquartile"
                " rule flags"
            ),
            *COMMON,
        ),
    )

    def __post_init__(self) -> None:
        known = self.variants()
        if self.variant not in known:
            raise ValueError(f"{self.name}: variant must be one of {known}, got {self.variant!r}")
        if self.neighbours < 0:
            raise ValueError(f"{self.name}: neighbours must not be negative, got {self.neighbours}")

    @staticmethod
    def variants() -> tuple[str, ...]:
        """Accepted values of ``variant``."""
        return ("", "official")

    @property
    def signals(self) -> frozenset[Signal]:
        """Single-head [CLS] logits and concatenated keys of the last block."""
        return frozenset({ClsLogits(), EncoderKeys(at="last", heads="concat")})

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Keep by attention and merge neighbours in."""
        attention = working(tokens[ClsLogits()]).nan_to_num(nan=-1e30).softmax(0)
        keep = self.choose(attention, k).sort().values
        keys = tokens[EncoderKeys(at="last", heads="concat")]
        if self.variant == "":
            return Selection(keep, Merge(*weighted_mean(attention, keys, keep, self.neighbours)))
        return Selection(keep, Merge(*attention_sum(attention, keys, keep, self.neighbours)))

    def choose(self, attention: Tensor, k: int) -> Tensor:
        """[k] tokens to keep, in any order, by attention [N]."""
        return ranked(attention)[:k]


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """The outliers, then evenly spaced tokens of the rest; merged as in PruMerge.

    Attributes:
        variant: ``official`` merges as the released code does; ``effivlm`` does too, and fills up
            with the first multiples of ``N // k``, as EffiVLM-Bench does, so that samples cover
            only the top of the image.
    """

    name = "prumerge_plus"
    paper = Paper(
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models"
        " (PruMerge+)",
        "2403.15388",
        CODE,
        (
            (
                "the budget sets the number of even samples; the official code derives a stride"
                " from the share of outliers"
            ),
            *COMMON,
        ),
    )

    @staticmethod
    def variants() -> tuple[str, ...]:
        """Accepted values of ``variant``."""
        return ("", "official", "effivlm")

    def choose(self, attention: Tensor, k: int) -> Tensor:
        """[k] tokens to keep, in any order: outliers of attention [N], then samples."""
        top = ranked(attention)[: min(k, max(1, outliers(attention)))]
        rest = others(top, len(attention))
        fill = k - len(top)
        if self.variant != "effivlm":
            return torch.cat([top, rest[lattice(len(rest), fill).to(rest.device)]])
        on_stride = rest[rest % max(1, len(attention) // k) == 0]
        return torch.cat(
            [top, on_stride[:fill], ranked(attention)[len(top) :][: max(0, fill - len(on_stride))]]
        )


def outliers(attention: Tensor) -> int:
    """How many values of attention [N] exceed ``Q3 + 1.5 (Q3 - Q1)`` (quartiles by linear
    interpolation).
    """
    values = working(attention)
    low, high = values.quantile(values.new_tensor([0.25, 0.75]))
    return int((attention > high + 1.5 * (high - low)).sum())


def attention_sum(
    attention: Tensor, keys: Tensor, keep: Tensor, neighbours: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The official merge: ``x_i + sum_j a_j x_j`` over the nearest neighbours of i, kept or pruned,
    itself excluded.
    """
    rows = unit(keys)
    similarity = rows[keep] @ rows.T
    similarity[torch.arange(len(keep), device=keep.device), keep] = -torch.inf
    near = ranked(similarity)[:, : min(neighbours, len(keys) - 1)]
    source = near.flatten()
    target = keep.repeat_interleave(near.shape[1])
    weight = torch.cat([torch.ones(len(keep), device=keep.device), working(attention[source])])
    return torch.cat([keep, target]), torch.cat([keep, source]), weight


def weighted_mean(
    attention: Tensor, keys: Tensor, keep: Tensor, neighbours: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's merge: the attention-weighted mean of a kept token and its nearest pruned
    neighbours.
    """
    rows, pruned = unit(keys), others(keep, len(keys))
    near = ranked(rows[keep] @ rows[pruned].T)[:, : min(neighbours, len(pruned))]
    source = torch.cat([keep[:, None], pruned[near]], 1)
    weight = working(attention).clamp(min=1e-30)[source]
    weight = weight / weight.sum(1, keepdim=True)
    return keep.repeat_interleave(source.shape[1]), source.flatten(), weight.flatten()
