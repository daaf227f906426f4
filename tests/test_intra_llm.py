"""Every intra-LLM method against a naive transcription of its formula, with loops; and what all must keep."""

import itertools
import math

import pytest
import torch
from layer_contexts import layer_tokens
from method_contexts import image_tokens
from tiny import batch, build, generate, prompt

from effivlm.methods.base import IntraLLM
from effivlm.methods.contexts import UndeclaredSignal
from effivlm.methods.hybrid.illava import ILLaVA
from effivlm.methods.hybrid.must_drop import MustDrop
from effivlm.methods.hybrid.polymorphic import Polymorphic
from effivlm.methods.hybrid.vscan import VScan
from effivlm.methods.intra_llm.adaptinfer import AdaptInfer
from effivlm.methods.intra_llm.dart import DART
from effivlm.methods.intra_llm.fastv import FastV, FastVSink
from effivlm.methods.intra_llm.fitprune import FitPrune
from effivlm.methods.intra_llm.pyramiddrop import PyramidDrop
from effivlm.methods.intra_llm.sparsevlm import SparseVLM, SparseVLMRank, raters
from effivlm.methods.intra_llm.vtw import VTW
from effivlm.methods.signals import (
    ColumnSums,
    HeadMaxSums,
    InputEmbeds,
    Keys,
    LastRow,
    NormedHidden,
    Saliency,
)
from effivlm.ops.statistics import gravity
from effivlm.runtime.audit import check_selection
from effivlm.runtime.session import Session

torch.set_num_threads(1)
KINDS = pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "constant"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
COUNTS = pytest.mark.parametrize("k", [1, 3, 8, 20, 39])
ALL = [
    FastV(),
    FastV(rows="all"),
    FastV(rows="text"),
    FastVSink(),
    FastVSink(sinks="keep"),
    DART(),
    DART(pivots=0, text_pivots=3),
    PyramidDrop(),
    AdaptInfer(),
    FitPrune(),
    SparseVLM(),
    SparseVLM(variant="plus"),
    MustDrop(),
    Polymorphic(),
    Polymorphic(normed=True),
    VScan(),
    ILLaVA(),
    ILLaVA(variant="official"),
]
EACH = pytest.mark.parametrize(
    "method", ALL, ids=[f"{type(m).__name__}{i}" for i, m in enumerate(ALL)]
)


def order(scores):
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))


def best(scores, k):
    return sorted(order(scores)[:k])


def cos(a, b):
    a, b = a.double(), b.double()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def dense(selection, n):
    """The merge as a matrix [n, n]; identity rows where nothing is merged."""
    out = torch.eye(n, dtype=torch.float64)
    if selection.merged is not None:
        m = selection.merged
        out[m.target] = 0.0
        for t, s, w in zip(m.target.tolist(), m.source.tolist(), m.weight.tolist(), strict=True):
            out[t, s] += w
    return out


def average(rows):
    """Sum in double precision, in the same order for every column."""
    return sum(rows) / len(rows)


# ------------------------------------------------------------------------------------------------------ twins by score
def fastv_twin(tokens, rows):
    a = {
        "last": tokens[LastRow()][:, None] if rows == "last" else None,
        "all": tokens[ColumnSums()][:, None] if rows == "all" else None,
        "text": tokens.source.rows if rows == "text" else None,
    }[rows].double()
    return [
        average([average([a[h, i, j] for i in range(a.shape[1])]) for h in range(len(a))])
        for j in tokens.visual.tolist()
    ]


@KINDS
@TYPES
@COUNTS
@pytest.mark.parametrize("rows", ["last", "all", "text"])
def test_fastv(kind, dtype, k, rows):
    tokens = layer_tokens(FastV(rows=rows), kind, dtype=dtype)
    assert FastV(rows=rows).select_layer(tokens, k).keep.tolist() == best(
        fastv_twin(tokens, rows), k
    )


@KINDS
@COUNTS
@pytest.mark.parametrize("sinks", ["drop", "keep"])
def test_fastv_sinks(kind, k, sinks):
    """A1 ranks the others first, A2 the sinks first; tiles are observed one by one and row ends have no saliency."""
    method = FastVSink(sinks=sinks)
    notes: dict = {}
    saliency = torch.rand(38, generator=torch.Generator().manual_seed(1))
    positions = [p for p in range(5, 45) if p not in (14, 24)]
    for part in (slice(0, 20), slice(20, 38)):
        place = torch.tensor(positions[part])
        picture = image_tokens(
            method, rows=1, columns=len(place), values={Saliency(): saliency[part]}
        )
        method.observe_image(type(picture)(**{**vars(picture), "notes": notes, "position": place}))
    tokens = layer_tokens(method, kind, notes=notes)
    known = dict(zip(positions, saliency.tolist(), strict=True))
    z = [known.get(p, -1.0) for p in range(5, 45)]
    s = order(fastv_twin(tokens, "all"))
    sink = order(z)[: math.ceil(0.1 * 40)]
    if sinks == "drop":
        want = [j for j in s if j not in sink] + [j for j in s if j in sink]
    else:
        want = sink + [j for j in s if j not in sink]
    assert method.select_layer(tokens, k).keep.tolist() == sorted(want[:k])


@KINDS
@TYPES
@COUNTS
def test_pyramiddrop(kind, dtype, k):
    tokens = layer_tokens(PyramidDrop(), kind, dtype=dtype)
    row = tokens[LastRow(of="next")].double()
    assert PyramidDrop().select_layer(tokens, k).keep.tolist() == best(
        [average(list(row[:, j])) for j in tokens.visual.tolist()], k
    )


@KINDS
@TYPES
@COUNTS
def test_adaptinfer(kind, dtype, k):
    tokens = layer_tokens(AdaptInfer(), kind, dtype=dtype)
    a, text = tokens.source.rows.double(), tokens.text.tolist()
    score = [0.0] * 40
    for h in range(len(a)):
        for t, at in enumerate(text):
            weight = (
                sum(float(a[h, t, u]) for u in text)
                + sum(float(a[h, i, at]) for i in range(len(text)))
                - float(a[h, t, at])
            )
            for j, v in enumerate(tokens.visual.tolist()):
                score[j] += weight * float(a[h, t, v])
    assert AdaptInfer().select_layer(tokens, k).keep.tolist() == best(score, k)


@KINDS
@TYPES
@COUNTS
def test_fitprune(kind, dtype, k):
    tokens = layer_tokens(FitPrune(), kind, dtype=dtype)
    c, e = tokens[HeadMaxSums(rows="text")], tokens[HeadMaxSums(rows="visual")]
    score = [float(c[j] * e[j]) for j in tokens.visual.tolist()]
    lowest = sorted(range(40), key=lambda j: (score[j], -j))[: 40 - k]
    assert FitPrune().select_layer(tokens, k).keep.tolist() == [
        j for j in range(40) if j not in lowest
    ]


@KINDS
@TYPES
@COUNTS
def test_dart(kind, dtype, k):
    method = DART()
    tokens = layer_tokens(method, kind, dtype=dtype)
    keys, x = tokens[Keys()].float(), tokens[NormedHidden()]
    strength = [sum(float(v) for v in keys[:, j].abs().flatten()) for j in range(keys.shape[1])]
    strength = [
        float(keys[:, j].abs().sum((0, 1))) if kind in ("random", "clustered") else s
        for j, s in enumerate(strength)
    ]
    visual = tokens.visual.tolist()
    own = best([strength[v] for v in visual], min(4, k))
    turns = [visual[i] for i in own] + [
        tokens.text[i].item() for i in best([strength[t] for t in tokens.text.tolist()], 4)
    ]
    free, kept = [i for i in range(40) if i not in own], list(own)
    left = k - len(own)
    for turn, pivot in enumerate(turns):
        count = left // len(turns) + (left % len(turns) if turn == len(turns) - 1 else 0)
        similarity = {i: round(cos(x[visual[i]], x[pivot]), 5) for i in free}
        for i in sorted(free, key=lambda i, s=similarity: (s[i], i))[:count]:
            kept.append(i)
            free.remove(i)
    assert method.select_layer(tokens, k).keep.tolist() == sorted(kept)


# ----------------------------------------------------------------------------------------------------------- SparseVLM
def raters_twin(v, t):
    v, t = v.double(), t.double()
    weight = [0.0] * len(t)
    for row in v:
        e = [math.exp(float(row @ u) - max(float(row @ w) for w in t)) for u in t]
        weight = [w + x / sum(e) / len(v) for w, x in zip(weight, e, strict=True)]
    return [i for i, w in enumerate(weight) if w > 1 / len(t) + 1e-9] or list(range(len(t)))


def clusters_twin(x, members, count):
    """Density peaks, all pairs: centres (indices into x), and the members of each."""
    rows = x[members].double()
    d = [[float((a - b).norm()) / rows.shape[1] ** 0.5 for b in rows] for a in rows]
    density = [math.exp(-sum(v * v for v in sorted(r)[:count]) / min(count, len(r))) for r in d]
    rank = order([round(v, 6) for v in density])
    delta = [
        min((d[i][j] for j in rank[: rank.index(i)]), default=max(map(max, d)))
        for i in range(len(d))
    ]
    centres = order([round(a * b, 6) for a, b in zip(density, delta, strict=True)])[:count]
    groups = {c: [c] for c in centres}
    for i in range(len(d)):
        if i not in groups:
            groups[min(centres, key=lambda c, i=i: (round(d[i][c], 6), centres.index(c)))].append(i)
    return {int(members[c]): [int(members[i]) for i in g] for c, g in groups.items()}


def merged_twin(groups, n):
    out = torch.eye(n, dtype=torch.float64)
    for c, group in groups.items():
        out[c] = 0.0
        for i in group:
            out[c, i] = 1 / len(group)
    return out


@pytest.mark.parametrize("kind", ["random", "clustered"])
@TYPES
@COUNTS
def test_sparsevlm(kind, dtype, k):
    """Raters, scores, the split into kept and clusters, cluster means at their centres."""
    method = SparseVLM()
    tokens = layer_tokens(method, kind, dtype=dtype)
    x, rows = tokens[InputEmbeds()], tokens.source.rows.double()
    chosen = raters_twin(x[tokens.visual], x[tokens.text])
    score = [
        average([average([rows[h, t, j] for t in chosen]) for h in range(len(rows))])
        for j in tokens.visual.tolist()
    ]
    splits = [(p, min((int(0.3 * (40 - p)) + 1) // 10 + 1, k // 4)) for p in range(k + 1)]
    kept = max(p for p, c in splits if p + c == k)
    best_of_dropped = order(score)[kept : kept + int(0.3 * (40 - kept)) + 1]
    groups = (
        clusters_twin(tokens.hidden[tokens.visual], torch.tensor(best_of_dropped), k - kept)
        if kept < k
        else {}
    )
    got = method.select_layer(tokens, k)
    assert got.keep.tolist() == sorted(order(score)[:kept] + list(groups))
    torch.testing.assert_close(dense(got, 40), merged_twin(groups, 40), atol=1e-6, rtol=0)


def test_sparsevlm_raters_are_chosen_once_and_fall_back():
    method, notes = SparseVLM(), {}
    first = layer_tokens(method, seed=1, notes=notes)
    method.select_layer(first, 20)
    want = notes["raters"][0].tolist()
    assert 0 < len(want) < 6 and want == raters_twin(
        first[InputEmbeds()][first.visual], first[InputEmbeds()][first.text]
    )
    method.select_layer(layer_tokens(method, seed=2, notes=notes, n=20), 10)
    assert notes["raters"][0].tolist() == want
    assert raters(torch.randn(5, 4), torch.randn(1, 4)).tolist() == [0]
    assert raters(torch.zeros(5, 4), torch.randn(3, 4)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [1, 7, 39])
@pytest.mark.parametrize("heads", [2, 14])
def test_sparsevlm_plus(k, heads):
    method = SparseVLM(variant="plus", heads=heads)
    tokens = layer_tokens(method)
    x, rows = tokens[InputEmbeds()], tokens.source.rows.double()
    width, at = tokens.source.width, tokens.position.tolist()
    chosen = raters_twin(x[tokens.visual], x[tokens.text])

    def pull(distance):
        value = (
            sum(2 * math.cos(distance * 10000.0 ** (-2 * f / width)) for f in range(width // 2))
            / width**0.5
        )
        return max(value, 1e-3)

    freed = [
        [
            [
                float(rows[h, t, j]) / pull(at[tokens.text[t]] - at[j])
                for j in tokens.visual.tolist()
            ]
            for t in chosen
        ]
        for h in range(4)
    ]
    strongest = order([sum(map(sum, f)) for f in freed])[:heads]
    score = [sum(sum(r[j] for r in freed[h]) for h in strongest) for j in range(40)]
    assert method.select_layer(tokens, k).keep.tolist() == best(score, k)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5, 50.0])
def test_sparsevlm_rank(scale):
    """The rank of raters x visual attention sets the count; the budget caps it."""
    method = SparseVLMRank(scale=scale)
    tokens = layer_tokens(method, seed=1)
    x = tokens[InputEmbeds()]
    chosen = raters_twin(x[tokens.visual], x[tokens.text])
    p = tokens.source.rows[:, chosen][..., tokens.visual].mean(0)
    assert int(torch.linalg.matrix_rank(p)) == len(chosen)
    kept = max(1, min(int(scale * len(chosen)), 39))
    clusters = (int(0.3 * (40 - kept)) + 1) // 10 + 1
    for k in (3, 10, 30):
        got = method.select_layer(tokens, k)
        check_selection(method, got.keep, got.merged, k, 40)
        assert len(got.keep) == min(k, kept + clusters)
        if kept + clusters < k:
            assert set(order(p.mean(0))[:kept]) <= set(got.keep.tolist())
        else:
            assert torch.equal(
                got.keep, SparseVLM().select_layer(layer_tokens(SparseVLM(), seed=1), k).keep
            )


def test_gravity_is_the_logit_of_ones_and_positive():
    d, at = 16, torch.arange(0, 300, 7)
    angle = at[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    q, k = torch.ones(d), torch.ones(d)
    want = []
    for a in angle:
        c, s = torch.cat([a.cos()] * 2), torch.cat([a.sin()] * 2)
        rotated = q * c + torch.cat([-q[d // 2 :], q[: d // 2]]) * s
        want.append(float(rotated @ k) / d**0.5)
    torch.testing.assert_close(
        gravity(at, d, 10000.0), torch.tensor(want).clamp(min=1e-3), rtol=1e-4, atol=1e-4
    )


# ----------------------------------------------------------------------------------------------------------------- all
@EACH
@KINDS
@TYPES
@COUNTS
def test_selection_is_sound(method, kind, dtype, k):
    """Exactly k, ascending, merges on kept tokens with weights that sum to one; the same twice; only declared signals."""
    results = []
    for _ in range(2):
        tokens = layer_tokens(method, kind, dtype=dtype)
        selection = method.select_layer(tokens, k)
        check_selection(method, selection.keep, selection.merged, k, 40)
        weights = dense(selection, 40)
        torch.testing.assert_close(
            weights.sum(1), torch.ones(40, dtype=torch.float64), atol=1e-5, rtol=0
        )
        results.append((selection.keep.tolist(), weights))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    with pytest.raises(UndeclaredSignal):
        tokens[ColumnSums() if ColumnSums() not in method.signals else InputEmbeds()]


@EACH
@pytest.mark.parametrize("after", [0, 1])
def test_no_text_or_one_text_token(method, after):
    tokens = layer_tokens(method, after=after, seed=3)
    check_selection(method, (s := method.select_layer(tokens, 11)).keep, s.merged, 11, 40)


@EACH
def test_broken_values_still_give_k(method):
    """NaN in the hidden states (an overflow in half precision) and attention rows of zeros."""
    values = {
        s: torch.zeros_like(v)
        for s, v in {
            LastRow(): torch.ones(4, 51),
            LastRow(of="next"): torch.ones(4, 51),
            ColumnSums(): torch.ones(4, 51),
            HeadMaxSums(rows="text"): torch.ones(51),
        }.items()
    }
    tokens = layer_tokens(method, values=values, rows=torch.zeros(4, 6, 51))
    tokens.hidden[7] = torch.nan
    check_selection(method, (s := method.select_layer(tokens, 11)).keep, s.merged, 11, 40)


def test_zero_tokens():
    for method in (VTW(), FastV(), PyramidDrop(), AdaptInfer()):
        assert method.select_layer(layer_tokens(method), 0).keep.tolist() == []


@pytest.mark.parametrize(
    "build",
    [
        lambda: FastV(layer=0),
        lambda: FastV(rows="first"),
        lambda: FastVSink(sinks="x"),
        lambda: FastVSink(share=0.0),
        lambda: DART(pivots=-1),
        lambda: DART(pivots=0, text_pivots=0),
        lambda: VTW(layer=0),
        lambda: PyramidDrop(ratio=1.0),
        lambda: SparseVLM(variant="x"),
        lambda: SparseVLM(heads=0),
        lambda: AdaptInfer(layers=(0, 4)),
        lambda: FitPrune(left=(3, 5)),
        lambda: FitPrune(left=(5, 3), preset="60"),
        lambda: MustDrop(window=1),
        lambda: MustDrop(spatial=0.1),
        lambda: MustDrop(key_share=1.0),
        lambda: VScan(ratio=0.5),
        lambda: VScan(layer=0),
        lambda: Polymorphic(multiple=0.5),
        lambda: Polymorphic(ratio=0.0),
        lambda: ILLaVA(encoder=1.5),
        lambda: ILLaVA(variant="x"),
    ],
)
def test_bad_hyper_parameters_are_refused(build):
    with pytest.raises(ValueError, match=r"[a-z_]+: |mustdrop"):
        build()


def test_all_are_intra_llm():
    assert all(isinstance(m, IntraLLM) and m.paper.deviations for m in ALL)


@pytest.mark.parametrize(
    "text",
    [
        "sparsevlm_rank@0.9:scale=0.7",
        "sparsevlm_rank:scale=1.1",
        "sparsevlm_rank@0.9:scale=0.7 + fastv@0.9:layer=3",
    ],
)
def test_fewer_than_promised_through_a_model(text):
    """Counts that depend on content are audited as they are, single and in a batch with other counts."""
    model = build("llava")
    one, other = prompt("llava", 2, seed=5, before=4, after=3), prompt("llava", 1, after=12)
    accounts, logits = [], []
    for x in (one, other):
        with Session(model, text) as session:
            logits.append(generate(model, x, 4)[1])
            accounts.append(session.accounts[0])
    account = accounts[0]
    assert account.visual_per_layer[-1] < 0.6 * account.visual_tokens, (
        "the rank capped nothing: the test could not fail"
    )
    with Session(model, text) as session:
        both = generate(model, batch("llava", one, other), 4)[1]
    assert session.accounts == accounts
    for i, want in enumerate(logits):
        torch.testing.assert_close(both[i : i + 1], want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "text", ["sparsevlm_rank:scale=0.7,layers=1-2-3", "sparsevlm_rank@0.5:scale=0.7,layers=1-2-3"]
)
def test_the_rank_decides_at_every_stage(text):
    """A stage that keeps less than planned does not silence the ones after it: each drops a token or more, as published."""
    model = build("llava")
    with Session(model, text) as session:
        generate(model, prompt("llava", 2, seed=5, before=4, after=6), 2)
    counts = session.accounts[0].visual_per_layer
    assert all(a > b for a, b in itertools.pairwise(counts)), counts
