"""Attention statistics of one prompt from post-RoPE queries and keys, never as an L x L matrix.

Shapes: q [H, R, d] chosen query rows, k [KV, L, d], H a multiple of KV (query head h reads KV head
h // (H // KV)). ``positions`` [R] ascending says at which key each row stands: a row sees keys up
to its own, so rows of one chunk of a prompt can be given against the longer prefix of keys and
chunks add up exactly. ``mask``, where attention is not plainly causal, is a function from rows to
[R, L] bool. Probabilities are float32, every visible key in the denominator.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from effivlm.ops.numbers import matrix_rank, parts, triangular, whole
from effivlm.ops.precision import working, working_dtype

Queries = Float[Tensor, "H R d"]
Keys = Float[Tensor, "KV L d"]
Rows = Int[Tensor, "R"]
Sums = Float[Tensor, "H L"]  # over rows: what every key received, per query head
RowMask = Callable[[Rows], Bool[Tensor, "R L"]] | None


def _logits(
    q: Queries, k: Keys, positions: Rows, scaling: float, mask: RowMask, keys: int
) -> Float[Tensor, "H R {keys}"]:
    """Float32 logits of rows against the first ``keys`` keys; hidden ones are -inf."""
    heads, rows, width = q.shape
    grouped = working(q.reshape(k.shape[0], -1, width))
    out = (grouped @ working(k[:, :keys]).transpose(1, 2)).view(heads, rows, keys) * scaling
    if mask is not None:
        return out.masked_fill(~mask(positions)[:, :keys], -torch.inf)
    return out.masked_fill(torch.arange(keys, device=k.device) > positions[:, None], -torch.inf)


def _blocks(
    q: Queries, k: Keys, positions: Rows, scaling: float, mask: RowMask, block: int
) -> Iterator[tuple[int, int, Tensor]]:
    """(KV head, first row, [G, r, keys] logits) block by block; what a block of rows cannot see is
    never computed.

    One KV head at a time, the G query heads of its group stacked as rows: few wide products. The
    logits live in one buffer that the next block overwrites.
    """
    groups, (heads, rows, width) = k.shape[0], q.shape
    ends = whole(positions)
    q, k = q.detach().view(groups, heads // groups, rows, width), k.detach()
    buffer = torch.empty(
        heads // groups * min(block, rows) * k.shape[1], dtype=working_dtype(q), device=q.device
    )
    for h in range(groups):
        keys_t = working(k[h]).T
        for start in range(0, rows, block):
            at = positions[start : start + block]
            part = working(q[h, :, start : start + block].reshape(-1, width)) * scaling
            keys = k.shape[1] if mask is not None else ends[min(start + block, rows) - 1] + 1
            flat = buffer[: len(part) * keys].view(len(part), keys)
            logits = torch.mm(part, keys_t[:, :keys], out=flat).view(-1, len(at), keys)
            if mask is not None:
                logits.masked_fill_(~mask(at), -torch.inf)
            else:  # columns up to the first row's own are visible to every row of the block
                edge = ends[start] + 1
                logits[..., edge:].masked_fill_(
                    torch.arange(edge, keys, device=k.device) > at[:, None], -torch.inf
                )
            yield h, start, logits


def _per_head(x: Tensor, groups: int) -> Tensor:
    """[H, ...] seen as [KV, G, ...]."""
    return x.view(groups, -1, *x.shape[1:])


def row_probabilities(
    q: Queries, k: Keys, positions: Rows, scaling: float, mask: RowMask = None
) -> Float[Tensor, "H R L"]:
    """Attention probabilities of chosen rows."""
    return _logits(q, k, positions, scaling, mask, k.shape[1]).softmax(-1).nan_to_num()


def row_sums(
    q: Queries, k: Keys, positions: Rows, scaling: float, mask: RowMask = None, block: int = 256
) -> Sums:
    """Attention received from chosen rows, summed over them; one block of rows at a time,
    causal half skipped.

    Exact: every row's softmax is complete within its block, so blocks and prompt chunks add up.
    """
    out = torch.zeros(q.shape[0], k.shape[1], dtype=working_dtype(q), device=q.device)
    by_group = _per_head(out, k.shape[0])
    for h, _, logits in _blocks(q, k, positions, scaling, mask, block):
        weights = torch.softmax(logits, -1, out=logits)
        if mask is not None:
            weights.nan_to_num_()  # rows that see nothing
        ones = weights.new_ones(
            len(weights), 1, weights.shape[1]
        )  # a product sums over rows faster than sum does on CPUs
        by_group[h, :, : weights.shape[-1]] += torch.bmm(ones, weights)[:, 0]
    return out


def freed_sums(
    q: Queries,
    k: Keys,
    positions: Rows,
    place: Int[Tensor, "L"],
    scaling: float,
    theta: float,
    mask: RowMask = None,
    block: int = 256,
) -> Sums:
    """As `row_sums`, every probability divided by `gravity` at its distance in ``place``, the
    keys' positions in the prompt.
    """
    out = torch.zeros(q.shape[0], k.shape[1], dtype=working_dtype(q), device=q.device)
    by_group, place = _per_head(out, k.shape[0]), place - place.min()
    reach = torch.arange(int(place.max()) + 1, device=q.device)
    table = gravity(reach, q.shape[-1], theta)
    for h, start, logits in _blocks(q, k, positions, scaling, mask, block):
        at = positions[start : start + logits.shape[1]]
        distance = (place[at][:, None] - place[: logits.shape[-1]]).abs()
        weights = torch.softmax(logits, -1, out=logits).nan_to_num_().div_(table[distance])
        by_group[h, :, : weights.shape[-1]] += weights.sum(1)
    return out


def gravity(distance: Real[Tensor, "*n"], width: int, theta: float) -> Float[Tensor, "*n"]:
    """What rotary embedding alone gives the logit of all-ones query and key at a distance;
    clamped above zero.

    Args:
        distance: in tokens.
        width: of a head.
        theta: base of the rotary frequencies.
    """
    frequency = theta ** (
        -torch.arange(0, width, 2, device=distance.device, dtype=torch.float32) / width
    )
    out = torch.zeros(distance.shape, device=distance.device)
    for f in frequency:
        out += 2 * torch.cos(working(distance) * f)
    return (out / width**0.5).clamp(min=1e-3)


def mutual_sums(
    q: Queries, k: Keys, positions: Rows, scaling: float, mask: RowMask = None, block: int = 256
) -> Sums:
    """As `row_sums`, each row weighed, per head, by what it gives to and gets from all
    chosen rows, itself counted once. Two passes: what a row gets is known after the first.
    """
    got = row_sums(q, k, positions, scaling, mask, block)[:, positions]
    out = torch.zeros(q.shape[0], k.shape[1], dtype=working_dtype(q), device=q.device)
    by_group, got = _per_head(out, k.shape[0]), _per_head(got, k.shape[0])
    for h, start, logits in _blocks(q, k, positions, scaling, mask, block):
        weights = torch.softmax(logits, -1, out=logits).nan_to_num_()
        span = slice(start, start + weights.shape[1])
        given = weights[..., positions[positions < weights.shape[-1]]].sum(-1)
        own = weights[:, torch.arange(weights.shape[1], device=q.device), positions[span]]
        weigh = given + got[h, :, span] - own
        by_group[h, :, : weights.shape[-1]] += torch.bmm(weigh[:, None], weights)[:, 0]
    return out


@functools.cache
def fused_column_sums() -> Callable[[Queries, Keys, float], Sums] | None:
    """The Triton kernel of `column_sums`, or None where Triton is not installed."""
    try:
        from effivlm.ops.kernels import column_sums as kernel
    except ImportError:
        return None
    return kernel.column_sums


def column_sums(
    q: Float[Tensor, "H L d"], k: Keys, scaling: float, mask: RowMask = None, block: int = 256
) -> Sums:
    """Attention each key receives from all rows of its prompt; each head's
    sums total L.

    Fused on CUDA for plainly causal 16-bit queries, which is what a model in use has; blocked
    otherwise.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda and half and mask is None and (fused := fused_column_sums()) is not None:
        return fused(q, k, scaling)
    return row_sums(q, k, torch.arange(k.shape[1], device=k.device), scaling, mask, block)


def log_sum_exp(
    q: Queries, k: Keys, positions: Rows, scaling: float, mask: RowMask = None, block: int = 256
) -> Float[Tensor, "H R"]:
    """Log of every chosen row's softmax denominator; -inf for a row that sees nothing."""
    out = torch.empty(q.shape[:2], dtype=working_dtype(q), device=q.device)
    by_group = _per_head(out, k.shape[0])
    for h, start, logits in _blocks(q, k, positions, scaling, mask, block):
        by_group[h, :, start : start + logits.shape[1]] = logits.logsumexp(-1)
    return out


def head_max_sums(
    q: Queries, k: Keys, positions: Rows, scaling: float, mask: RowMask = None, block: int = 256
) -> Float[Tensor, "L"]:
    """Sum over chosen rows of the largest probability over heads."""
    out = torch.zeros(k.shape[1], dtype=working_dtype(q), device=q.device)
    for rows in _row_blocks(q, k, positions, scaling, mask, block):
        out += rows.amax(0).sum(0)
    return out


def _row_blocks(
    q: Queries, k: Keys, positions: Rows, scaling: float, mask: RowMask, block: int
) -> Iterator[Tensor]:
    """[H, r, L] probabilities of chosen rows, block by block."""
    for rows, at in zip(parts(q, block, 1), parts(positions, block), strict=True):
        yield row_probabilities(rows, k, at, scaling, mask)


def peaks(
    q: Queries, k: Keys, positions: Rows, scaling: float, mask: RowMask = None, block: int = 64
) -> Float[Tensor, "L"]:
    """The largest probability, mean over heads, that any of the chosen rows gives."""
    out = torch.zeros(k.shape[1], dtype=working_dtype(q), device=q.device)
    for rows in _row_blocks(q, k, positions, scaling, mask, block):
        out = torch.maximum(out, rows.mean(0).amax(0))
    return out


def row_rank(
    q: Queries,
    k: Keys,
    positions: Rows,
    columns: Int[Tensor, "N"],
    scaling: float,
    mask: RowMask = None,
    block: int = 64,
) -> Int[Tensor, ""]:
    """Rank of the chosen rows' probabilities, mean over heads, at ``columns``.

    `torch.linalg.matrix_rank`'s of the whole [R, N] matrix and with its tolerance, but what is held
    of it is folded into its triangular factor, which has the same singular values: 3 N rows at
    most.
    """
    n, size = len(columns), max(len(positions), len(columns))
    held = torch.empty(0, n, dtype=working_dtype(q), device=q.device)
    for rows in _row_blocks(q, k, positions, scaling, mask, min(block, n)):
        held = torch.cat([held, rows.mean(0)[:, columns]])
        if len(held) > 2 * n:
            held = triangular(held)
    return matrix_rank(held, rtol=size * torch.finfo(held.dtype).eps)


def threshold_share(
    q: Queries,
    k: Keys,
    positions: Rows,
    scaling: float,
    p: float,
    mask: RowMask = None,
    block: int = 256,
) -> Float[Tensor, "H"]:
    """Share of the visible entries of chosen rows whose probability lies below ``p`` times
    their row's largest.

    Compared as logits, which is the same comparison without the softmax.
    """
    below = torch.zeros(q.shape[0], dtype=torch.float64, device=q.device)
    by_group = _per_head(below, k.shape[0])
    visible = 0
    edge = float(torch.tensor(p, dtype=working_dtype(q)).log())
    for h, _, logits in _blocks(q, k, positions, scaling, mask, block):
        seen = logits > -torch.inf
        by_group[h] += (seen & (logits - logits.amax(-1, keepdim=True) < edge)).sum((1, 2))
        visible += int(seen[0].sum()) if h == 0 else 0
    return (below / max(visible, 1)).to(working_dtype(q))


def fold(scores: Sums, heads: int, how: str = "mean") -> Float[Tensor, "{heads} L"]:
    """Numbers per query head -> per KV head: ``mean`` or ``max`` over the group; ``shared``:
    mean over all heads.
    """
    grouped = scores.view(heads, -1, scores.shape[-1])
    if how == "shared":
        return scores.mean(0, keepdim=True).expand(heads, -1)
    return grouped.amax(1) if how == "max" else grouped.mean(1)


def pool(scores: Float[Tensor, "*n L"], size: int, how: str = "avg") -> Float[Tensor, "*n L"]:
    """1-D pooling along the last axis, stride 1, same length; averages count zeros at the edges, as
    published codes do.
    """
    if size <= 1 or how == "none" or scores.shape[-1] == 0:
        return scores
    if how == "max":
        return torch.nn.functional.max_pool1d(scores, size, stride=1, padding=size // 2)
    return torch.nn.functional.avg_pool1d(scores, size, stride=1, padding=size // 2)


def rotate(
    x: Float[Tensor, "*n d"], cos: Float[Tensor, "... d"], sin: Float[Tensor, "... d"]
) -> Float[Tensor, "*n d"]:
    """Rotary embedding of the half-split kind; pass ``-sin`` to undo it."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def future_queries(
    q: Float[Tensor, "H L d"],
    cos: Float[Tensor, "L d"],
    sin: Float[Tensor, "L d"],
    frequencies: Float[Tensor, "d//2"],
    start: Tensor | int,
    sinks: int,
    future: int,
) -> Float[Tensor, "H d d+1"]:
    """Covariance and, in the last column, mean of queries moved to the next
    ``future`` positions.

    Args:
        q: post-RoPE queries of the prompt.
        cos: their rotary table.
        sin: likewise.
        frequencies: rotary angle per position.
        start: next position, [] long or a number.
        sinks: first rows left out of the statistics.
        future: positions looked ahead.
    """
    plain = rotate(working(q), working(cos), -working(sin))[:, min(sinks, q.shape[1] - 1) :]
    mean = plain.mean(1)
    centred = plain - mean[:, None]
    cov = centred.transpose(1, 2) @ centred / plain.shape[1]
    coming = start + torch.arange(future, device=q.device)
    angle = coming[:, None] * working(frequencies.to(q.device))
    c, s = (torch.cat([t, t], -1).mean(0) for t in (angle.cos(), angle.sin()))
    half = q.shape[-1] // 2
    turn = torch.diag(c)
    turn[:half, half:] -= torch.diag(s[:half])
    turn[half:, :half] += torch.diag(s[half:])
    return torch.cat([turn @ cov @ turn.T, (mean @ turn.T)[..., None]], -1)
