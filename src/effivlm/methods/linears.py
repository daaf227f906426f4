"""What a weights method sees and returns: one linear layer with statistics of its inputs, or the
linear layers that read one tensor.

Shapes: O outputs, I inputs of a linear layer, T tokens, S calibration samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from effivlm.budget import Budget
from effivlm.errors import EffivlmError
from effivlm.ops.grid import Codes

SQUARES, HESSIAN, TOKENS = "squares", "hessian", "tokens"


class WeightsError(EffivlmError, ValueError):
    """Weights that cannot be compressed as asked; the message names the layer and says why."""


def pruned_share(budget: Budget | None) -> float:
    """The share that goes where ``budget`` is the share that stays; 0 without a budget."""
    return round(1 - budget.as_share(1), 12) if budget is not None else 0.0


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        name: where it is, such as ``layer 3 mlp.up_proj``.
        weight: [O, I] float32 (float64 where the model runs in it).
        share: to be pruned of it.
        statistics: by name, what the method declared: ``squares`` [I] (mean over samples of the sum
            over tokens of x^2), ``hessian`` [I, I] (``2 / S`` of the sum of x x^T), ``tokens`` [T,
            I] (some inputs).
    """

    name: str
    weight: Tensor
    share: float
    statistics: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Readers:
    """Linear layers that read the same tensor, which one module makes.

    Attributes:
        weights: [O, I] each, O may differ. x_mean: [I] mean |x| over all calibration tokens.
        loss: mean squared error of the smallest module around them all, with other weights in
            place.
    """

    weights: list[Tensor]
    x_mean: Tensor
    loss: Callable[[list[Tensor]], float] = field(repr=False)


@dataclass(frozen=True)
class NewWeight:
    """What a linear layer's weight becomes: other values, or codes.

    Attributes:
        weight: [O, I], or None with codes. keep: [O, I] bool, False where pruned, or None.
        codes: of a quantized weight.
    """

    weight: Tensor | None = None
    keep: Tensor | None = None
    codes: Codes | None = None


@dataclass(frozen=True)
class Promise:
    """What a compressed matrix holds.

    Attributes:
        nonzero: weights that are not 0, at most. row: the same of every row, or None.
        pattern: (n, m): at most n of every m inputs of a row, or None.
        bits: of a code, or None.
    """

    nonzero: int | None = None
    row: int | None = None
    pattern: tuple[int, int] | None = None
    bits: int | None = None
