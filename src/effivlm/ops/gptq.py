"""GPTQ: quantize column after column, and move what is lost onto later columns."""

import torch
from torch import Tensor

from effivlm.ops.grid import Codes, Grid, encode, fit
from effivlm.ops.precision import working
from effivlm.ops.pruning import inverse_factor


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    actorder: bool = True,
    static_groups: bool = True,
    blocksize: int = 128,
    percdamp: float = 0.01,
) -> Codes:
    """The codes of a weight, by the official algorithm.

    Scales of groups are fitted on the untouched weight (``static_groups``), or when the sweep
    comes to a group: on the weight as it was when its block of columns began, as in the official
    code (errors of the same block are not seen; with ``grid.group`` a multiple of ``blocksize`` all
    are). Without ``grid.group`` a whole row is fitted, before anything moves.

    Args:
        weight: [O, I].
        hessian: [I, I] ``2 / samples * X^T X`` of its inputs.
        grid: codes; ``grid.group`` divides I.
        actorder: columns of large Hessian diagonal first. Without static groups a group is then a
            run of that order, and ``Codes.index`` says which.
        static_groups: see above.
        blocksize: columns whose errors move on together.
        percdamp: damping, of the mean diagonal.

    Raises:
        ArithmeticError: if the damped Hessian is not positive definite.
    """
    w = working(weight).clone()
    rows, columns = w.shape
    width = grid.width(columns)
    dead, alone = hessian.diagonal() == 0, width == columns
    whole = w.clone()
    w[:, dead] = 0
    scale, zero = fit((whole if alone else w).reshape(rows, -1, width), grid)
    fixed = static_groups or alone
    importance = torch.where(dead, 1.0, working(hessian).diagonal())
    places = torch.arange(columns, device=w.device)
    order = importance.argsort(descending=True) if actorder else places
    w = w[:, order]
    upper = inverse_factor(hessian[order][:, order], percdamp).upper
    group = order // width if fixed else places // width
    codes = torch.zeros_like(w)
    for a in range(0, columns, blocksize):
        b = min(a + blocksize, columns)
        block, u = w[:, a:b].clone(), upper[a:b, a:b]
        errors = torch.zeros_like(block)
        for j in range(b - a):
            g = int(group[a + j])
            if not fixed and (a + j) % width == 0:
                scale[:, g], zero[:, g] = fit(w[:, a + j : a + j + width], grid)
            s, z = scale[:, g], zero[:, g]
            codes[:, a + j] = encode(block[:, j], s, z, grid)
            error = (block[:, j] - (codes[:, a + j] - z) * s) / u[j, j]
            block[:, j:] -= error[:, None] * u[j, j:]
            errors[:, j] = error
        w[:, b:] -= errors @ upper[a:b, b:]
    back = order.argsort()
    runs = torch.equal(group[back], places // width)
    return Codes(
        codes[:, back].to(torch.uint8),
        scale,
        zero.to(torch.uint8),
        width,
        grid.bits,
        None if runs else group[back],
    )
