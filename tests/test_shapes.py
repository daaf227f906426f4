"""Annotated shapes are checked while the tests run (conftest.py)."""

import pytest
import torch
from jaxtyping import TypeCheckError

from effivlm.methods.base import Merge, Selection
from effivlm.ops.select import top_k
from effivlm.ops.statistics import row_sums
from effivlm.runtime.geometry import to_index


def test_what_fits_passes():
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        assert len(top_k(torch.arange(5).to(dtype), 2)) == 2
    assert len(Selection(torch.empty(0, dtype=torch.long)).keep) == 0


def rows(q, k):
    return row_sums(q, k, torch.arange(q.shape[1]), 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: top_k(torch.zeros(2, 5), 2),  # a dimension too many
        lambda: rows(torch.zeros(2, 5, 8), torch.zeros(1, 5, 4)),  # widths that differ
        lambda: to_index(torch.zeros(1, 5)),  # floats where a mask belongs
        lambda: Selection(torch.zeros(3, dtype=torch.bool)),  # a mask where indices belong
        lambda: Merge(torch.arange(3), torch.arange(3), torch.ones(2)),  # summands that differ
    ],
)
def test_a_wrong_shape_or_dtype_raises(wrong):
    with pytest.raises(TypeCheckError):
        wrong()
