"""Blocked attention statistics against the dense float64 L x L attention, whatever the blocks and chunks."""

import pytest
import torch
from kv_contexts import dense
from layer_contexts import Dense

from effivlm.methods.signals import MutualTextSums, TextPeaks, TextRank, TextSums
from effivlm.ops import statistics
from effivlm.ops.tails import tail_statistics

torch.set_num_threads(1)
SHAPES = [(4, 2, 70), (3, 3, 41), (7, 1, 33), (2, 2, 1)]


def tensors(heads, groups, length, d=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(heads * 100 + length)
    return (torch.randn(heads, length, d, generator=g) * 2).to(dtype), torch.randn(
        groups, length, d, generator=g
    ).to(dtype)


def near(got, want, rtol=1e-5):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(("heads", "groups", "length"), SHAPES)
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_column_sums_any_block(heads, groups, length, block):
    q, k = tensors(heads, groups, length)
    got = statistics.column_sums(q, k, 0.3, block=block)
    near(got, dense(q, k, 0.3).sum(1))
    near(got.sum(1), torch.full((heads,), float(length)))


def test_float64_stays_float64():
    """What the contract compares in float64 is computed in it, to far below float32's last bit."""
    q, k = tensors(4, 2, 90, dtype=torch.float64)
    got = statistics.column_sums(q, k, 0.3, block=16)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, dense(q, k, 0.3).sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_column_sums_half_precision_input(dtype):
    q, k = tensors(4, 2, 90, dtype=dtype)
    near(statistics.column_sums(q, k, 0.3, block=16), dense(q, k, 0.3).sum(1))


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def test_column_sums_are_fused_on_cuda(monkeypatch):
    """The kernel runs where it applies, and nowhere else; without Triton the blocked twin does."""
    q, k = tensors(4, 2, 40, dtype=torch.bfloat16)
    want, seen = dense(q, k, 0.3).sum(1), []

    def kernel(q, k, scaling):
        seen.append((q.shape, k.shape, scaling))
        return torch.full((4, 40), 7.0)

    monkeypatch.setattr(statistics, "fused_column_sums", lambda: kernel)
    assert (statistics.column_sums(q.as_subclass(OnCuda), k, 0.3) == 7).all()
    assert seen == [(q.shape, k.shape, 0.3)]
    causal = torch.ones(40, 40).tril().bool()
    near(statistics.column_sums(q, k, 0.3), want)
    near(
        statistics.column_sums(q.as_subclass(OnCuda), k, 0.3, causal.__getitem__).as_subclass(
            torch.Tensor
        ),
        want,
    )
    near(
        statistics.column_sums(q.float().as_subclass(OnCuda), k, 0.3).as_subclass(torch.Tensor),
        want,
    )
    monkeypatch.setattr(statistics, "fused_column_sums", lambda: None)
    near(statistics.column_sums(q.as_subclass(OnCuda), k, 0.3).as_subclass(torch.Tensor), want)
    assert len(seen) == 1


def test_column_sums_of_strided_views():
    q, k = tensors(4, 2, 60)
    views = (x.transpose(0, 1).contiguous().transpose(0, 1)[:, 3:50] for x in (q, k))
    near(statistics.column_sums(*views, 0.3, block=16), dense(q[:, 3:50], k[:, 3:50], 0.3).sum(1))


@pytest.mark.parametrize("chunks", [(30, 40), (1, 69), (23, 23, 24), (70,)])
def test_chunked_prefill_adds_up(chunks):
    """A chunk's rows against the keys so far, added over chunks, are the sums of the whole prompt."""
    q, k = tensors(4, 2, 70)
    total, lse, start = torch.zeros(4, 70), [], 0
    for size in chunks:
        rows = torch.arange(start, start + size)
        part = statistics.row_sums(q[:, rows], k[:, : start + size], rows, 0.3, block=9)
        total[:, : start + size] += part
        lse.append(statistics.log_sum_exp(q[:, rows], k[:, : start + size], rows, 0.3, block=9))
        start += size
    near(total, dense(q, k, 0.3).sum(1))
    near(torch.cat(lse, 1), statistics.log_sum_exp(q, k, torch.arange(70), 0.3))


@pytest.mark.parametrize(("heads", "groups", "length"), SHAPES)
def test_chosen_rows(heads, groups, length):
    q, k = tensors(heads, groups, length)
    rows = torch.arange(length)[length // 3 :: 2]
    want = dense(q, k, 0.3)[:, rows]
    got = statistics.row_probabilities(q[:, rows], k, rows, 0.3)
    near(got, want)
    near(statistics.row_sums(q[:, rows], k, rows, 0.3, block=5), want.sum(1))
    near(statistics.head_max_sums(q[:, rows], k, rows, 0.3, block=5), want.amax(0).sum(0))


@pytest.mark.parametrize(("heads", "groups", "length"), SHAPES)
@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_what_text_rows_look_at(heads, groups, length, block, masked):
    """Streamed, what methods read of text rows is the dense twin's, whatever the blocks."""
    q, k = tensors(heads, groups, length)
    rows = torch.arange(length)[length // 3 :: 2]
    place = torch.arange(length) * 2 + 5  # half of the prompt was dropped
    visible = torch.ones(length, length).tril().bool()
    if masked:
        visible &= ~torch.ones(length, length).tril(-9).bool()
        visible[rows[-1]] = False
    a = dense(q, k, 0.3, visible).nan_to_num()
    columns = torch.arange(length // 4, length // 2 + 1)
    twin = Dense({}, a[:, rows], rows, columns, q.shape[-1])
    given = (q[:, rows], k, rows)
    how = {"mask": visible.__getitem__ if masked else None, "block": block}
    near(statistics.row_sums(*given, 0.3, **how), twin(TextSums()))
    near(statistics.mutual_sums(*given, 0.3, **how), twin(MutualTextSums()), rtol=1e-4)
    near(statistics.peaks(*given, 0.3, **how), twin(TextPeaks()))
    freed = statistics.freed_sums(*given, place, 0.3, 1e4, **how)
    table = statistics.gravity((place[rows][:, None] - place).abs(), q.shape[-1], 1e4)
    near(freed, (a[:, rows] / table).sum(1), rtol=1e-4)
    assert statistics.row_rank(*given, columns, 0.3, **how) == twin(TextRank())


@pytest.mark.parametrize("rank", [1, 3, 11])
def test_rank_of_many_rows(rank):
    """Many more rows than columns, few of them different: the factor keeps the singular values."""
    q, k = tensors(2, 2, 300)
    rows, columns = torch.arange(30, 300), torch.arange(4, 24)
    q = q[:, torch.arange(300) % rank]
    all_but_text = torch.arange(300) < 30
    mask = all_but_text.expand(300, -1).__getitem__
    want = torch.linalg.matrix_rank(dense(q, k, 0.3, mask(torch.arange(300)))[:, 30:, 4:24].mean(0))
    got = statistics.row_rank(q[:, rows], k, rows, columns, 0.3, mask, block=7)
    assert int(want) == rank and int(got) == rank


def test_log_sum_exp():
    q, k = tensors(4, 2, 70)
    logits = q.double() @ k.double().repeat_interleave(2, 0).transpose(1, 2) * 0.3
    logits = logits.masked_fill(~torch.ones(70, 70).tril().bool(), -torch.inf)
    near(statistics.log_sum_exp(q, k, torch.arange(70), 0.3, block=11), logits.logsumexp(-1))


@pytest.mark.parametrize("block", [4, 100])
@pytest.mark.parametrize("p", [0.01, 0.3])
def test_threshold_share(block, p):
    """The comparison in logits is the comparison in probabilities."""
    q, k = tensors(4, 2, 70)
    rows = torch.arange(50, 70)
    part = dense(q, k, 0.3)[:, rows]
    seen = torch.arange(70) <= rows[:, None]
    want = ((part < p * part.amax(-1, keepdim=True)) & seen).sum((1, 2)) / seen.sum()
    got = statistics.threshold_share(q[:, rows], k, rows, 0.3, p, block=block)
    assert 0 < float(got.mean()) < 1
    near(got, want)


def image_and_window(length, window=20):
    """Causal with a window, an image whose tokens see each other, and one row that sees nothing."""
    visible = (
        torch.ones(length, length).tril().bool() & ~torch.ones(length, length).tril(-window).bool()
    )
    visible[10:25, 10:25] = True
    visible[40] = False
    return visible


def test_masks_that_are_not_causal():
    q, k = tensors(4, 2, 70)
    visible = image_and_window(70)
    want = dense(q, k, 0.3, visible).nan_to_num()
    near(statistics.column_sums(q, k, 0.3, visible.__getitem__, block=13), want.sum(1))
    rows = torch.arange(12, 60)
    near(
        statistics.row_sums(q[:, rows], k, rows, 0.3, visible.__getitem__, block=13),
        want[:, rows].sum(1),
    )
    near(
        statistics.head_max_sums(q[:, rows], k, rows, 0.3, visible.__getitem__),
        want[:, rows].amax(0).sum(0),
    )
    assert (
        statistics.log_sum_exp(q, k, torch.arange(70), 0.3, visible.__getitem__)[0, 40]
        == -torch.inf
    )


def test_rows_that_underflow():
    """Logits far apart: exact zeros, no NaN, rows still sum to one."""
    q, k = tensors(4, 2, 50)
    got = statistics.column_sums(q * 100, k, 1.0)
    assert bool(got.isfinite().all())
    near(got.sum(1), torch.full((4,), 50.0))


def test_fold_and_pool():
    x = torch.rand(6, 20)
    assert torch.allclose(statistics.fold(x, 2), torch.stack([x[:3].mean(0), x[3:].mean(0)]))
    assert torch.equal(statistics.fold(x, 2, "max"), torch.stack([x[:3].amax(0), x[3:].amax(0)]))
    assert torch.allclose(statistics.fold(x, 2, "shared"), x.mean(0).expand(2, -1))
    assert torch.allclose(
        statistics.pool(torch.ones(1, 8), 5)[0], torch.tensor([0.6, 0.8, 1, 1, 1, 1, 0.8, 0.6])
    )
    with_peak = torch.zeros(1, 9)
    with_peak[0, 4] = 1
    assert statistics.pool(with_peak, 3, "max")[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert torch.equal(statistics.pool(x, 5, "none"), x)


def test_future_queries_are_rotated_moments():
    """Mean and covariance of un-rotated queries, turned by the mean rotation of the coming positions."""
    d, length, ahead = 8, 30, 16
    g = torch.Generator().manual_seed(0)
    plain = torch.randn(2, length, d, generator=g)
    frequencies = 10000 ** (-torch.arange(0, d, 2).float() / d)
    angle = torch.arange(length)[:, None] * frequencies
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    got = statistics.future_queries(
        statistics.rotate(plain, cos, sin), cos, sin, frequencies, length, 4, ahead
    )
    coming = torch.arange(length, length + ahead)[:, None] * frequencies
    turned = torch.stack(
        [
            statistics.rotate(plain[:, 4:], torch.cat([a, a]).cos(), torch.cat([a, a]).sin())
            for a in coming
        ]
    ).mean(0)
    near(got[..., -1], turned.mean(1), 1e-4)
    centred = turned - turned.mean(1, keepdim=True)
    torch.testing.assert_close(
        got[..., :-1], centred.transpose(1, 2) @ centred / (length - 4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("heads", "groups", "length"), SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("buffer", [1, 400, 2**20])
@pytest.mark.parametrize("masked", [False, True])
def test_one_pass_over_the_last_rows(heads, groups, length, rows, buffer, masked):
    """Sums and shares below two thresholds equal the dense twin's, whatever the blocks."""
    q, k = tensors(heads, groups, length, dtype=torch.float64)
    rows = min(rows, length)
    at = torch.arange(length - rows, length)
    visible = torch.ones(length, length).tril().bool()
    if masked:
        visible &= torch.arange(length)[:, None] - torch.arange(length) < 5
    full = dense(q, k, 0.3)
    full = (full * visible) / (full * visible).sum(-1, keepdim=True)
    full, seen = full[:, at], visible[at]
    mask = visible.__getitem__ if masked else None
    got = tail_statistics(q[:, at], k, 0.3, (0.2, 0.7), mask, buffer)
    torch.testing.assert_close(got.sums, full.sum(1), rtol=1e-10, atol=1e-12)
    for p, small in zip((0.2, 0.7), got.small, strict=True):
        below = (full < p * full.amax(-1, keepdim=True)) & seen
        torch.testing.assert_close(small, below.sum((1, 2)).double() / seen.sum())
