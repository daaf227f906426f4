"""What a compressed matrix was to hold, against what is in its tensors."""

from typing import cast

from torch import Tensor, nn

from effivlm.methods.linears import NewWeight, Promise
from effivlm.runtime.audit import AuditError
from effivlm.runtime.quant_linear import QuantLinear


def check_weight(where: str, held: nn.Module, new: NewWeight, promise: Promise) -> None:
    """Non-zeros of the matrix, its rows and runs, and bits, are at most those promised; a mask
    keeps exactly as many.

    Raises:
        AuditError: naming the layer and both numbers.
    """
    weight = cast(Tensor, held.weight)
    if not bool(weight.isfinite().all()):
        raise AuditError(f"{where}: the compressed weight holds NaN or infinity")
    if promise.bits is not None:
        _check_bits(where, held, promise.bits)
    here = weight != 0
    _most(f"{where} holds non-zeros", int(here.sum()), promise.nonzero)
    _most(f"a row of {where} holds non-zeros", int(here.sum(1).max()), promise.row)
    if promise.pattern is not None:
        n, m = promise.pattern
        runs = here.reshape(len(here), -1, m).sum(-1)
        _most(f"a run of {m} inputs of {where} holds non-zeros", int(runs.max()), n)
    if new.keep is not None and promise.nonzero is not None:
        kept = int(new.keep.sum())
        if kept > promise.nonzero or (promise.row is not None and kept != promise.nonzero):
            raise AuditError(
                f"{where} keeps {kept} weights, the setting promises {promise.nonzero}"
            )


def _most(what: str, found: int, most: int | None) -> None:
    if most is not None and found > most:
        raise AuditError(f"{what}: {found}, the setting promises at most {most}")


def _check_bits(where: str, held: nn.Module, bits: int) -> None:
    if not isinstance(held, QuantLinear):
        raise AuditError(f"{where} holds {type(held).__name__}, the setting promises {bits} bits")
    codes = held.codes
    top = int(codes.codes.max())
    if top >= 2**bits:
        raise AuditError(f"{where} holds the code {top}, the setting promises {bits} bits")
    rows, columns = codes.codes.shape
    stored = 4 if bits <= 4 and columns % 2 == 0 else 8
    groups = rows * columns // codes.group
    most = rows * columns * stored // 8 + groups * 4
    _most(f"{where} holds bytes", held.bytes_held, most)
