"""GPTQ."""

from dataclasses import dataclass

from effivlm.budget import Budget
from effivlm.methods.base import Paper
from effivlm.methods.linears import HESSIAN, Linear, NewWeight, WeightsError
from effivlm.methods.weights.quantized import Quantizing
from effivlm.ops.gptq import gptq


@dataclass(frozen=True)
class GPTQ(Quantizing):
    """Quantizes input after input, and corrects the weights that come after.

    Attributes:
        actorder: inputs of large Hessian diagonal first.
        static_groups: scales are fitted to the untouched weights, so that groups stay runs of
            inputs; required by ``actorder``.
        blocksize: inputs whose errors move on together.
        percdamp: damping of the Hessian, of its mean diagonal.
    """

    sym: bool = True
    actorder: bool = True
    static_groups: bool = True
    blocksize: int = 128
    percdamp: float = 0.01

    name = "gptq"
    paper = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "2210.17323",
        "IST-DASLab/gptq @ 2d65066",
        (
            "symmetric, activation order and static groups are on, as in later practice; the paper"
            " has actorder=false,static_groups=false",
            "scales are rounded to bfloat16, in which they are stored, before anything is encoded",
            "a Hessian that is not positive definite is an error that names the layer",
        ),
    )
    statistics = frozenset({HESSIAN})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actorder and not self.static_groups:
            raise ValueError(
                "static_groups=false with actorder=true scatters a group over a row, which packed"
                " weights cannot hold: add actorder=false"
            )
        if self.blocksize < 1 or self.percdamp <= 0:
            raise ValueError(
                f"blocksize={self.blocksize}, percdamp={self.percdamp}: expected positive values"
            )

    def compress(self, linear: Linear, budget: Budget | None) -> NewWeight:
        """Codes."""
        try:
            codes = gptq(
                linear.weight,
                linear.statistics[HESSIAN],
                self.grid(linear),
                self.actorder,
                self.static_groups,
                self.blocksize,
                self.percdamp,
            )
        except ArithmeticError:
            raise WeightsError(
                f"{linear.name}: the Hessian of its inputs is not positive definite with"
                f" percdamp={self.percdamp}: raise percdamp, or calibrate with more samples"
            ) from None
        return NewWeight(codes=codes)
