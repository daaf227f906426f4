"""The typed door to the parts of torch whose types its stubs leave open: what comes out of a tensor
as Python numbers, distinct values, norms, blocks and triangular factors.

Each function is the one torch call that its name says, results included; the rest of the package
calls these, so that its own types stay checked.
"""

from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor, linalg


def _open(x: object) -> Any:
    """X, its type left open."""
    return x


def whole(x: Int[Tensor, "N"]) -> list[int]:
    """Whole numbers as Python's numbers."""
    return _open(x).tolist()


def floats(x: Float[Tensor, "N"]) -> list[float]:
    """Real numbers as Python's numbers."""
    return _open(x).tolist()


def distinct(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "R"]:
    """The different values of x, ascending."""
    return _open(x).unique()


def numbered(x: Shaped[Tensor, "N"]) -> tuple[Shaped[Tensor, "R"], Int[Tensor, "N"]]:
    """`distinct` values, and for every element of x the index of its own among them."""
    values, where = _open(x).unique(return_inverse=True)
    return values, where


def occurrences(x: Shaped[Tensor, "..."]) -> list[int]:
    """How often each of the `distinct` values of x occurs."""
    return _open(x).unique(return_counts=True)[1].tolist()


def norms(
    x: Float[Tensor, "*n C"], keepdim: bool = False
) -> Float[Tensor, "*n"] | Float[Tensor, "*n 1"]:
    """Euclidean lengths of the rows of x; [..., 1] with ``keepdim``."""
    return _open(x).norm(dim=-1, keepdim=keepdim)


def parts(x: Shaped[Tensor, "..."], size: int, dim: int = 0) -> tuple[Shaped[Tensor, "..."], ...]:
    """Views of ``size`` elements along ``dim``, in order; the last may be shorter."""
    return _open(x).split(size, dim)


def triangular(x: Float[Tensor, "M N"]) -> Float[Tensor, "min(M,N) N"]:
    """The factor R of the QR decomposition of x: its singular values are
    x's.
    """
    return _open(linalg).qr(x, mode="r").R


def matrix_rank(x: Float[Tensor, "M N"], rtol: float) -> Int[Tensor, ""]:
    """How many singular values of x lie above ``rtol`` times the largest."""
    return _open(linalg).matrix_rank(x, rtol=rtol)


def cholesky(x: Tensor, upper: bool = False) -> Tensor:
    """[N, N] the triangular factor of a positive definite x [N, N].

    Raises:
        ArithmeticError: if x is not positive definite.
    """
    factor, failed = _open(linalg).cholesky_ex(x, upper=upper)
    if int(failed):
        raise ArithmeticError("the matrix is not positive definite")
    return factor
