"""The precision decisions are computed in: float32 at least, float64 where the model runs in it."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def working_dtype(x: Shaped[Tensor, "..."]) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def working(x: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """X as it is computed with: half precision and whole numbers become float32, float64 stays."""
    return x.to(working_dtype(x))
