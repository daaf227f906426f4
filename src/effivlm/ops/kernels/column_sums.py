"""Column sums of causal attention in two Triton passes: each row's log-sum-exp, then sums over rows
of exp(S - lse).

The outer loop of each pass runs over what it writes, so nothing is added atomically and results do
not depend on scheduling. O(L) extra memory. Needs CUDA, or TRITON_INTERPRET=1 for tests on a CPU;
the slow twin is `ops.statistics.column_sums`.
"""

# pyright: standard
# not strict as its neighbours: what Triton compiles has no Python types

import torch
import triton  # pyright: ignore[reportMissingModuleSource]  # not installed without CUDA: typings/ has its types
import triton.language as tl  # pyright: ignore[reportMissingModuleSource]
from jaxtyping import Float
from torch import Tensor


@triton.jit
def _lse_kernel(
    q,
    k,
    out,
    length,
    offset,
    keys,
    scale,
    q_head,
    q_row,
    k_head,
    k_row,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program: ROWS query rows of one head against all keys they see; base 2."""
    block, head = tl.program_id(0), tl.program_id(1)
    rows, dims = block * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    x = tl.load(
        q + head * q_head + rows[:, None] * q_row + dims[None, :],
        mask=(rows[:, None] < length) & (dims[None, :] < WIDTH),
        other=0.0,
    )
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.minimum(keys, offset + (block + 1) * ROWS), COLS):
        columns = start + tl.arange(0, COLS)
        y = tl.load(
            k + (head // GROUP) * k_head + columns[None, :] * k_row + dims[:, None],
            mask=(columns[None, :] < keys) & (dims[:, None] < WIDTH),
            other=0.0,
        )
        s = tl.dot(x, y, input_precision="ieee") * scale
        s = tl.where(
            (columns[None, :] <= offset + rows[:, None]) & (columns[None, :] < keys), s, -1.0e30
        )
        new = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
        top = new
    tl.store(out + head * length + rows, top + tl.log2(total), mask=rows < length)


@triton.jit
def _sum_kernel(
    q,
    k,
    lse,
    out,
    length,
    offset,
    keys,
    scale,
    q_head,
    q_row,
    k_head,
    k_row,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program: COLS keys of one head, over all rows that see them."""
    block, head = tl.program_id(0), tl.program_id(1)
    columns, dims = block * COLS + tl.arange(0, COLS), tl.arange(0, PAD)
    y = tl.load(
        k + (head // GROUP) * k_head + columns[None, :] * k_row + dims[:, None],
        mask=(columns[None, :] < keys) & (dims[:, None] < WIDTH),
        other=0.0,
    )
    total = tl.zeros([COLS], tl.float32)
    first = tl.maximum(block * COLS - offset, 0) // ROWS * ROWS
    for start in range(first, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        x = tl.load(
            q + head * q_head + rows[:, None] * q_row + dims[None, :],
            mask=(rows[:, None] < length) & (dims[None, :] < WIDTH),
            other=0.0,
        )
        at = tl.load(lse + head * length + rows, mask=rows < length, other=0.0)
        p = tl.exp2(tl.dot(x, y, input_precision="ieee") * scale - at[:, None])
        total += tl.sum(
            tl.where(
                (columns[None, :] <= offset + rows[:, None]) & (rows[:, None] < length), p, 0.0
            ),
            0,
        )
    tl.store(out + head * keys + columns, total, mask=columns < keys)


def column_sums(
    q: Float[Tensor, "H R d"],
    k: Float[Tensor, "KV L d"],
    scaling: float,
    offset: int = 0,
    lse: Float[Tensor, "H R"] | None = None,
) -> Float[Tensor, "H L"]:
    """Float32: attention each key receives from all given rows.

    Args:
        q: post-RoPE queries, row r standing at key ``offset + r`` (a chunk of a prompt).
        k: post-RoPE keys.
        scaling: of the logits.
        offset: keys before the first row.
        lse: float32 natural log-sum-exp of every row, where the attention kernel returned
            it.

    Raises:
        ValueError: if head counts or widths do not fit, or rows reach past the keys.
    """
    (heads, rows, width), (groups, keys, _) = q.shape, k.shape
    if heads % groups or k.shape[2] != width or offset + rows > keys:
        raise ValueError(
            f"queries {tuple(q.shape)} at offset {offset} do not fit keys {tuple(k.shape)}"
        )
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    sizes = {
        "GROUP": heads // groups,
        "WIDTH": width,
        "PAD": max(16, triton.next_power_of_2(width)),
    }
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    scale = scaling * 1.4426950408889634  # exp2 and log2 are what the hardware has
    if lse is None:
        base2, grid = (
            torch.empty(heads, rows, dtype=torch.float32, device=q.device),
            (triton.cdiv(rows, 128), heads),
        )
        _lse_kernel[grid](
            q, k, base2, rows, offset, keys, scale, *strides, **sizes, ROWS=128, COLS=64
        )
    else:
        base2 = (lse.float() * 1.4426950408889634).contiguous()
    out = torch.empty(heads, keys, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(keys, 128), heads)
    _sum_kernel[grid](
        q, k, base2, out, rows, offset, keys, scale, *strides, **sizes, ROWS=64, COLS=128
    )
    return out
