"""Merges as linear maps: triples (target, source, weight), one entry per summand. Shapes:
N tokens, D width.
"""

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from effivlm.ops.numbers import distinct
from effivlm.ops.precision import working
from effivlm.ops.select import ranked, unit

Triple = tuple[Int[Tensor, "E"], Int[Tensor, "E"], Float[Tensor, "E"]]


def apply(x: Float[Tensor, "N D"], triple: Triple) -> Float[Tensor, "N D"]:
    """A float32 copy of x in which target rows are weighted sums of source rows."""
    target, source, weight = triple
    out = working(x).clone()
    out[target] = 0.0
    return out.index_add_(0, target, weight[:, None] * working(x)[source])


def average(
    target: Int[Tensor, "E"], source: Int[Tensor, "E"], size: Real[Tensor, "N"] | None = None
) -> Triple:
    """Weights that make each target the mean of its sources (weighted by ``size``); list a
    target as its own source.

    Args:
        target: of every summand.
        source: likewise.
        size: None for all ones.
    """
    span = int(torch.cat([target, source]).max()) + 1 if len(target) else 0
    mass = torch.ones(span, device=target.device) if size is None else working(size)
    total = mass.new_zeros(max(span, len(mass))).index_add_(0, target, mass[source])
    return target, source, mass[source] / total[target]


def mean_into(
    heir: Int[Tensor, "e"], dropped: Int[Tensor, "e"], size: Real[Tensor, "N"] | None = None
) -> Triple:
    """Each dropped token joins the kept token ``heir``, which becomes the plain (size-weighted)
    mean of itself and those.

    Args:
        heir: of every dropped token.
        dropped: those.
        size: None for all ones.
    """
    targets = distinct(heir)
    return average(torch.cat([targets, heir]), torch.cat([targets, dropped]), size)


def bipartite(
    metric: Float[Tensor, "N d"], r: int, protected: int = 0
) -> tuple[Int[Tensor, "r"], Int[Tensor, "r"]]:
    """ToMe's bipartite soft matching: even tokens each propose their most similar odd token, the r
    best pairs merge.

    Ties: pairs by lower even index, partners by lower odd index. The first ``protected`` tokens are
    never merged away.

    Args:
        metric: what is compared, by cosine.
        r: pairs wanted; at most half of the tokens that are not protected can merge.
        protected: tokens at the front that stay.

    Returns:
        (source, target): token indices by descending similarity.
    """
    rows = unit(metric)
    even, odd = rows[::2], rows[1::2]
    r = max(0, min(r, (len(rows) - protected) // 2))
    if r == 0:
        empty = torch.empty(0, dtype=torch.long, device=metric.device)
        return empty, empty
    best, partner = (even @ odd.T).max(1)
    best[: (protected + 1) // 2] = -torch.inf
    chosen = ranked(best)[:r]
    return 2 * chosen, 2 * partner[chosen] + 1
