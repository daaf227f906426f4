"""The Triton kernel in its interpreter, on the CPU: `TRITON_INTERPRET=1 pytest tests/test_statistics_kernel.py`.

Skipped where Triton is not installed or the interpreter is off; `gpu/kv_statistics.py` checks it on a GPU.
"""

import os

import pytest
import torch
from kv_contexts import dense

from effivlm.ops.statistics import log_sum_exp

pytest.importorskip(
    "triton", reason="Triton is not installed (Linux with CUDA installs it with PyTorch)"
)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1, set before Triton is imported", allow_module_level=True)

from effivlm.ops.kernels.column_sums import column_sums


@pytest.mark.parametrize(
    ("heads", "groups", "length", "d"),
    [(4, 2, 150, 16), (2, 2, 64, 20), (3, 1, 300, 8), (2, 1, 1, 16)],
)
def test_column_sums(heads, groups, length, d):
    g = torch.Generator().manual_seed(length)
    q, k = (
        2 * torch.randn(heads, length, d, generator=g),
        torch.randn(groups, length, d, generator=g),
    )
    want = dense(q, k, 0.3).sum(1).float()
    torch.testing.assert_close(column_sums(q, k, 0.3), want, rtol=1e-5, atol=1e-5)
    lse = log_sum_exp(q, k, torch.arange(length), 0.3)
    torch.testing.assert_close(column_sums(q, k, 0.3, lse=lse), want, rtol=1e-5, atol=1e-5)


def test_chunks():
    g = torch.Generator().manual_seed(0)
    q, k = 2 * torch.randn(4, 200, 16, generator=g), torch.randn(2, 200, 16, generator=g)
    total = torch.zeros(4, 200)
    for start, end in ((0, 70), (70, 71), (71, 200)):
        total[:, :end] += column_sums(q[:, start:end], k[:, :end], 0.3, start)
    torch.testing.assert_close(total, dense(q, k, 0.3).sum(1).float(), rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit keys"):
        column_sums(torch.zeros(3, 4, 16), torch.zeros(2, 4, 16), 1.0)
