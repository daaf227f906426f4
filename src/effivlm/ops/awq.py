"""AWQ: input channels scaled so that those of large activations lose less, and ranges clipped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effivlm.ops.grid import Grid, rtn
from effivlm.ops.precision import working


@dataclass(frozen=True)
class Search:
    """What `scale_search` found.

    Attributes:
        scale: [I] of the least loss. index: which candidate that was. losses: of every candidate.
    """

    scale: Tensor
    index: int
    losses: tuple[float, ...]


def x_mean(x: Tensor) -> Tensor:
    """[I] mean |x| over all tokens of x [..., I]."""
    return working(x).abs().flatten(0, -2).mean(0)


def w_mean(weights: Sequence[Tensor], group: int) -> Tensor:
    """[I] mean over all rows of |w| relative to the largest of its group."""
    rows = torch.cat([working(w) for w in weights]).abs()
    groups = rows.reshape(-1, rows.shape[1] if group == -1 else group)
    return (groups / (groups.amax(1, keepdim=True) + 1e-6)).view_as(rows).mean(0)


def candidates(
    x_mean: Tensor, w_mean: Tensor | None, n_grid: int = 20, identity: bool = False
) -> list[Tensor]:
    """``n_grid`` scales [I] for ratios r: ``x^r``, or ``x^r / w^(1-r)`` if ``w_mean`` is given
    (AutoAWQ's duo scaling), each divided by ``sqrt(max * min)``.

    Args:
        x_mean: [I].
        w_mean: [I] or None.
        n_grid: how many.
        identity: the first candidate is no scaling, and ratios go from 0 to 1; else they are
            ``i / n_grid``.
    """
    ratios = [i / (n_grid - 2) for i in range(n_grid - 1)] if identity else None
    found = [torch.ones_like(x_mean)] if identity else []
    for r in ratios or [i / n_grid for i in range(n_grid)]:
        scale = x_mean.pow(r)
        if w_mean is not None:
            scale = scale / (w_mean.pow(1 - r) + 1e-4)
        scale = scale.clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        found.append(torch.where(scale.isfinite(), scale, 1.0))
    return found


def scale_search(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    grid: Grid,
    loss: Callable[[list[Tensor]], float],
) -> Search:
    """The scale s of the least ``loss([Q(W s) / s])``; the first of equals.

    Args:
        weights: matrices [O, I] that read the same inputs.
        scales: candidates [I].
        grid: of the quantization Q.
        loss: error of what the matrices are part of, with others in their place.
    """
    losses = [loss([rtn(w * s, grid).dequantized(w.dtype) / s for w in weights]) for s in scales]
    finite = [x if x == x else float("inf") for x in losses]
    best = finite.index(min(finite))
    return Search(scales[best], best, tuple(losses))


def output_loss(x: Tensor, weights: Sequence[Tensor]) -> Callable[[list[Tensor]], float]:
    """Mean squared error of the joint outputs of matrices [O, I] on x [..., I]: a `scale_search`
    loss without a model.
    """
    want = x @ torch.cat(list(weights)).T
    return lambda new: float((x @ torch.cat(new).T - want).pow(2).mean())


def clip_search(
    weight: Tensor,
    x: Tensor,
    grid: Grid,
    n_grid: int = 20,
    max_shrink: float = 0.5,
    n_sample_token: int = 512,
) -> Tensor:
    """[O, G] the bound of every group whose clipped and quantized outputs are nearest.

    Args:
        weight: [O, I].
        x: [T, I] its inputs; every ``T // n_sample_token``-th is used.
        grid: of the quantization.
        n_grid: bounds are ``absmax * (1 - i / n_grid)``.
        max_shrink: for ``i < max_shrink * n_grid``.
        n_sample_token: tokens used, about.
    """
    rows, columns = weight.shape
    width = grid.width(columns)
    tokens = working(x).reshape(-1, columns)
    tokens = tokens[:: max(1, len(tokens) // n_sample_token)].reshape(
        1, -1, columns // width, width
    )
    bounds: list[Tensor] = []
    for a in range(0, rows, 64):  # outputs of 64 rows at a time: [64, T, G]
        w = working(weight[a : a + 64]).reshape(-1, 1, columns // width, width)
        want, most = (tokens * w).sum(-1), w.abs().amax(-1, keepdim=True)
        best, least = most.clone(), torch.full_like(most, float("inf"))
        for step in range(int(max_shrink * n_grid)):
            bound = most * (1 - step / n_grid)
            flat = w.clamp(-bound, bound).reshape(-1, columns)
            got = (tokens * rtn(flat, grid).dequantized(w.dtype).view_as(w)).sum(-1)
            error = (got - want).pow(2).mean(1)[:, None, :, None]
            best, least = torch.where(error < least, bound, best), torch.minimum(error, least)
        bounds.append(best[:, 0, :, 0])
    return torch.cat(bounds)


def clipped(weight: Tensor, bounds: Tensor) -> Tensor:
    """[O, I] a weight within the bounds [O, G] of its groups."""
    groups = weight.reshape(*bounds.shape, -1)
    return groups.clamp(-bounds[..., None], bounds[..., None]).reshape(weight.shape)
