"""Every pre-LLM method against a naive transcription of its formula, in float64 and with loops; and what all must keep."""

import dataclasses
import math

import pytest
import torch
from method_contexts import features, grid, image_tokens

from effivlm import registry
from effivlm.budget import parse_budget, split
from effivlm.methods.base import ImageTokens, PreLLM, Room
from effivlm.methods.baselines import Downsample, Pool, RandomPre, Uniform
from effivlm.methods.pre_llm.cdpruner import CDPruner
from effivlm.methods.pre_llm.divprune import DivPrune
from effivlm.methods.pre_llm.fastervlm import FasterVLM
from effivlm.methods.pre_llm.gprune import GPrune
from effivlm.methods.pre_llm.gridprune import GridPrune
from effivlm.methods.pre_llm.holov import HoloV
from effivlm.methods.pre_llm.prumerge import PruMerge, PruMergePlus
from effivlm.methods.pre_llm.scope import Scope
from effivlm.methods.pre_llm.visionzip import VisionZip
from effivlm.methods.pre_llm.vispruner import VisPruner
from effivlm.methods.signals import ClsLogits, EncoderFeatures, EncoderKeys, Saliency, TextEmbeds
from effivlm.runtime.audit import check_selection

torch.set_num_threads(1)
KINDS = ("random", "clustered", "duplicated", "constant")
DTYPES = (torch.float32, torch.bfloat16)
METHODS = [
    DivPrune(),
    FasterVLM(),
    GPrune(),
    GridPrune(),
    HoloV(),
    HoloV(variant="official"),
    CDPruner(),
    Scope(),
    VisPruner(),
    VisionZip(),
    VisionZip(variant="official"),
    PruMerge(),
    PruMerge(variant="official"),
    PruMergePlus(),
    PruMergePlus(variant="official"),
    PruMergePlus(variant="effivlm"),
    RandomPre(),
    Uniform(),
    Pool(),
]
GRIDS = pytest.mark.parametrize("kind", KINDS)
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
COUNTS = pytest.mark.parametrize("k", [1, 2, 9, 30, 71])


# ------------------------------------------------------------------------------------------------- naive building blocks
def order(scores):
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))


def first(values, tolerance):
    best = max(values)
    return next(i for i, v in enumerate(values) if v >= best - tolerance)


def cosines(x, y=None):
    x = [r.double() for r in x]
    y = x if y is None else [r.double() for r in y]

    def cos(a, b):
        norm = float(a.norm() * b.norm())
        return float(a @ b) / norm if norm > 0 else 0.0

    return [[cos(a, b) for b in y] for a in x]


def dense(selection, n):
    """The merge as a matrix [n, n]; identity rows where nothing is merged."""
    out = torch.eye(n, dtype=torch.float64)
    if selection.merged is not None:
        m = selection.merged
        out[m.target] = 0.0
        for t, s, w in zip(m.target.tolist(), m.source.tolist(), m.weight.tolist(), strict=True):
            out[t, s] += w
    return out[selection.keep]


def scale_to_one(values):
    low, high = min(values), max(values)
    return [
        (v - low) / (high - low) if high - low > 1e-6 * max(abs(low), abs(high), 1e-30) else 1.0
        for v in values
    ]


# ----------------------------------------------------------------------------------------------------------------- twins
@GRIDS
@TYPES
@COUNTS
def test_divprune(kind, dtype, k):
    tokens = image_tokens(DivPrune(), kind, dtype=dtype)
    cos, n = cosines(tokens.embeds), len(tokens.embeds)
    picked = [first([min(1 - cos[i][j] for j in range(n) if j != i) for i in range(n)], 1e-6)]
    while len(picked) < k:
        picked.append(
            first(
                [
                    -math.inf if i in picked else min(1 - cos[i][j] for j in picked)
                    for i in range(n)
                ],
                1e-6,
            )
        )
    assert DivPrune().select_image(tokens, k).keep.tolist() == sorted(picked)


@GRIDS
@COUNTS
def test_fastervlm(kind, k):
    tokens = image_tokens(FasterVLM(), kind)
    assert FasterVLM().select_image(tokens, k).keep.tolist() == sorted(
        order(tokens[Saliency()])[:k]
    )


@GRIDS
@TYPES
@COUNTS
def test_vispruner(kind, dtype, k):
    tokens = image_tokens(VisPruner(), kind, dtype=dtype)
    cos, rank = cosines(tokens[EncoderFeatures()]), order(tokens[Saliency()])
    keep, rest = rank[: k // 2], rank[k // 2 :]
    while len(rest) > k - k // 2:
        a, b = rest[0::2], rest[1::2]
        q = min(8, len(rest) - (k - k // 2), max(1, len(a) - 1))
        similar = [max(cos[i][j] for j in b) for i in a]
        similar = [round(s, 5) if kind in ("duplicated", "constant") else s for s in similar]
        rest = [a[i] for i in order(similar)[q:]] + b
    assert VisPruner().select_image(tokens, k).keep.tolist() == sorted(keep + rest)


@GRIDS
@TYPES
@COUNTS
def test_cdpruner(kind, dtype, k):
    tokens = image_tokens(CDPruner(), kind, dtype=dtype, text=4)
    n, cos = len(tokens.embeds), cosines(tokens.embeds)
    text = cosines(tokens.embeds, tokens[TextEmbeds()])
    r = scale_to_one([round(sum(row) / len(row), 7) for row in text])
    kernel = torch.tensor(
        [[r[i] * cos[i][j] * r[j] for j in range(n)] for i in range(n)], dtype=torch.float64
    )
    picked = []
    while len(picked) < k:
        gains = []
        for j in range(n):  # residual variance of j given the picked, from scratch
            if j in picked:
                gains.append(-math.inf)
                continue
            inner = kernel[picked][:, picked]
            cross = kernel[picked, j]
            gains.append(
                float(kernel[j, j] - (cross @ torch.linalg.solve(inner, cross) if picked else 0.0))
            )
        if max(gains) <= 1e-6:
            picked += [j for j in order(r) if j not in picked][: k - len(picked)]
            break
        picked.append(first(gains, 1e-6))
    got = CDPruner().select_image(tokens, k).keep.tolist()
    if kind == "random" and k > 24:  # beyond the rank of 24 features the rest follows relevance
        assert set(got) >= set(picked[:20])
    else:
        assert got == sorted(picked)


@GRIDS
@TYPES
@COUNTS
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_scope(kind, dtype, k, alpha):
    tokens = image_tokens(Scope(), kind, dtype=dtype)
    cos = torch.tensor(cosines(tokens[EncoderFeatures()]), dtype=torch.float64)
    n, weight = len(cos), tokens[Saliency()].double() ** alpha
    covered, picked = torch.zeros(n, dtype=torch.float64), []
    while len(picked) < k:
        gains = [
            -math.inf
            if j in picked
            else float(weight[j] * (cos[:, j] - covered).clamp(min=0).sum())
            for j in range(n)
        ]
        best = first(gains, 1e-6 * max(gains))
        if gains[best] <= 1e-7 * n * float(weight[best]):
            picked += [j for j in order(weight) if j not in picked][: k - len(picked)]
            break
        picked.append(best)
        covered = torch.maximum(covered, cos[best])
    assert Scope(alpha=alpha).select_image(tokens, k).keep.tolist() == sorted(picked)


@GRIDS
@TYPES
@COUNTS
def test_gprune(kind, dtype, k):
    tokens = image_tokens(GPrune(), kind, dtype=dtype)
    cos = cosines(tokens.embeds)
    n = len(cos)
    walk = [[0.0] * n for _ in range(n)]
    for i in range(n):
        near = [j for j in range(n) if cos[i][j] >= 0.5 or j == i]
        top = max(cos[i][j] for j in near)
        mass = sum(math.exp((cos[i][j] - top) / 0.03) for j in near)
        for j in near:
            walk[i][j] = math.exp((cos[i][j] - top) / 0.03) / mass
    flow = [float(row.double().norm()) for row in tokens.embeds]
    for _ in range(5):
        flow = [sum(flow[i] * walk[i][j] for i in range(n)) for j in range(n)]
    score = [f / sum(p > 0 for p in walk[j]) for j, f in enumerate(flow)]
    assert GPrune().select_image(tokens, k).keep.tolist() == sorted(
        order([round(s / max(score), 5) for s in score])[:k]
    )


def test_gprune_does_not_hang_on_one_outlier():
    """A token a million times longer, alone: the others are still told apart by what gathers on them."""
    tokens = image_tokens(GPrune(), "clustered")
    plain = GPrune().select_image(tokens, 20).keep
    x = tokens.embeds.clone()
    free = next(i for i in range(len(x)) if i not in plain.tolist())
    side = torch.zeros(len(x), 1)
    side[free], x[free] = 1e7, 0.0  # at a right angle to all, in a direction of its own
    alone = dataclasses.replace(tokens, embeds=torch.cat([x, side], 1))
    quiet = dataclasses.replace(tokens, embeds=torch.cat([x, side / 1e12], 1))
    kept = set(GPrune().select_image(alone, 21).keep.tolist())
    assert kept - {free} == set(GPrune().select_image(quiet, 20).keep.tolist())


def naive_regions(tokens, side):
    size = [int(v) + 1 for v in tokens.place.amax(0).tolist()]
    return [
        int(r) * side // size[0] * side + int(c) * side // size[1] for r, c in tokens.place.tolist()
    ]


@GRIDS
@TYPES
@COUNTS
def test_holov(kind, dtype, k):
    tokens = image_tokens(HoloV(), kind, dtype=dtype)
    region, cos, n = naive_regions(tokens, 4), cosines(tokens.embeds), len(tokens.embeds)
    spread = []
    for i in range(n):
        peers = [cos[i][j] for j in range(n) if region[j] == region[i] and j != i]
        mean = sum(peers) / len(peers)
        spread.append(sum((c - mean) ** 2 for c in peers) / len(peers))
    attention = tokens[Saliency()].double().tolist()
    score = [
        a * n / sum(attention) + 0.09 * (v * n / sum(spread) if sum(spread) > 1e-9 else 0.0)
        for a, v in zip(attention, spread, strict=True)
    ]
    score = [round(s / max(score), 6) for s in score]
    members = [[i for i in range(n) if region[i] == r] for r in range(16)]
    quota = split(
        k, [sum(score[i] for i in m) / len(m) for m in members], [len(m) for m in members]
    )
    want = [
        i
        for m, q in zip(members, quota, strict=True)
        for i in sorted(m, key=lambda i: (-score[i], i))[:q]
    ]
    assert HoloV().select_image(tokens, k).keep.tolist() == sorted(want)


@GRIDS
@TYPES
@COUNTS
def test_gridprune(kind, dtype, k):
    tokens = image_tokens(GridPrune(), kind, dtype=dtype)
    text = torch.stack([t / t.norm() for t in tokens[TextEmbeds()].double()]).mean(0)
    relevance = [row[0] for row in cosines(tokens.embeds, [text])]
    saliency = scale_to_one(tokens[Saliency()].double().tolist())
    score = [0.5 * (r + 1) / 2 + 0.5 * s for r, s in zip(relevance, saliency, strict=True)]
    score = [round(s / max(score), 6) for s in score]
    region = naive_regions(tokens, 4)
    members = [[i for i in range(len(score)) if region[i] == r] for r in range(16)]
    weight = [math.exp(sum(relevance[i] for i in m) / len(m)) for m in members]
    quota = split(k, [w / sum(weight) for w in weight], [len(m) for m in members])
    want = [
        i
        for m, q in zip(members, quota, strict=True)
        for i in sorted(m, key=lambda i: (-score[i], i))[:q]
    ]
    assert GridPrune().select_image(tokens, k).keep.tolist() == sorted(want)


@GRIDS
@COUNTS
@pytest.mark.parametrize("variant", ["", "official"])
def test_visionzip(kind, k, variant):
    tokens = image_tokens(VisionZip(), kind)
    n, score, cos = len(tokens.embeds), tokens[Saliency()], cosines(tokens[EncoderKeys()])
    c = min(max(1, int(k / 6.4)), k - 1)
    dominant = order(score)[: k - c]
    rest = [i for i in range(n) if i not in dominant]
    step = max(1, len(rest) // c) if c else 1
    at = (
        [t * step for t in range(c)]
        if variant
        else [int((t + 0.5) * len(rest) / c) for t in range(c)]
    )
    targets = [rest[i] for i in at]
    want = torch.eye(n, dtype=torch.float64)
    groups = {t: [] for t in targets}
    for i in rest if targets else []:
        if i not in targets:
            groups[
                targets[
                    first(
                        [cos[i][t] for t in targets],
                        1e-9 if kind in ("duplicated", "constant") else 0.0,
                    )
                ]
            ].append(i)
    for t, members in groups.items():
        for i in members:
            want[t, i] = 1 / len(members) if variant else 1 / (len(members) + 1)
        want[t, t] = 1.0 if variant else 1 / (len(members) + 1)
    got = VisionZip(variant=variant).select_image(tokens, k)
    assert got.keep.tolist() == sorted(dominant + targets)
    torch.testing.assert_close(dense(got, n), want[got.keep], atol=1e-6, rtol=1e-5)


@GRIDS
@COUNTS
@pytest.mark.parametrize(
    "method",
    [
        PruMerge(),
        PruMerge(variant="official"),
        PruMergePlus(),
        PruMergePlus(variant="effivlm"),
        PruMerge(neighbours=3),
    ],
    ids=repr,
)
def test_prumerge(kind, k, method):
    tokens = image_tokens(method, kind)
    a = tokens[ClsLogits()].double().softmax(0)
    n, cos, rank = len(a), cosines(tokens[EncoderKeys("last", "concat")]), order(a)
    keep = rank[:k]
    if isinstance(method, PruMergePlus):
        s = sorted(a.tolist())

        def quantile(q):
            at = q * (n - 1)
            return s[int(at)] + (at - int(at)) * (s[int(at) + 1] - s[int(at)])

        low, high = quantile(0.25), quantile(0.75)
        top = rank[: min(k, max(1, sum(v > high + 1.5 * (high - low) for v in a.tolist())))]
        rest, fill = [i for i in range(n) if i not in top], k - len(top)
        if method.variant == "effivlm":
            strided = [i for i in range(0, n, max(1, n // k)) if i not in top][:fill]
            keep = top + strided
            keep += [i for i in rank if i not in keep][: k - len(keep)]
        else:
            keep = top + [rest[int((t + 0.5) * len(rest) / fill)] for t in range(fill)]
    want = torch.eye(n, dtype=torch.float64)
    for i in keep:
        near = [j for j in range(n) if j != i and (method.variant or j not in keep)]
        near = sorted(
            near,
            key=lambda j: (
                -round(cos[i][j], 6) if kind in ("duplicated", "constant") else -cos[i][j],
                j,
            ),
        )[: method.neighbours]
        for j in near:
            want[i, j] = a[j]
        if not method.variant:
            want[i, i] = a[i]
            want[i] /= want[i].sum()
    got = method.select_image(tokens, k)
    assert got.keep.tolist() == sorted(keep)
    torch.testing.assert_close(dense(got, n), want[got.keep], atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- baselines
@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [(8, 9, 30), (24, 24, 57), (3, 40, 17), (5, 5, 24), (7, 1, 3), (27, 27, 291)],
)
def test_pool_is_adaptive_average_pooling(rows, columns, k):
    tokens = image_tokens(Pool(), rows=rows, columns=columns)
    got = Pool().select_image(tokens, k)
    n, width = tokens.embeds.shape
    a, b = Downsample().resize(rows, columns, k)
    assert len(got.keep) == a * b <= k
    want = (
        torch.nn.functional.adaptive_avg_pool2d(
            tokens.embeds.T.view(1, width, rows, columns), (a, b)
        )
        .view(width, -1)
        .T
    )
    rows_of = dense(got, n) @ tokens.embeds.double()
    torch.testing.assert_close(
        rows_of.float(), want, atol=1e-5, rtol=1e-5
    )  # raster order of cells = order of their places


@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [(8, 9, 30), (24, 24, 57), (3, 40, 17), (5, 5, 24), (7, 1, 3), (27, 27, 291)],
)
def test_uniform_is_even(rows, columns, k):
    tokens = image_tokens(Uniform(), rows=rows, columns=columns)
    keep = Uniform().select_image(tokens, k).keep
    assert len(keep) == k
    per_row = torch.bincount(keep // columns, minlength=rows)
    used = per_row[per_row > 0]
    assert int(used.max() - used.min()) <= 1
    gaps = [
        torch.diff((keep[keep // columns == r]) % columns) for r in range(rows) if per_row[r] > 1
    ]
    assert all(int(g.max() - g.min()) <= 1 for g in gaps)


@pytest.mark.parametrize(
    ("rows", "columns", "k", "want"),
    [(24, 24, 57, 49), (24, 24, 144, 144), (10, 40, 100, 96), (5, 5, 1, 1), (3, 40, 12, 12)],
)
def test_downsample_keeps_aspect_within_budget(rows, columns, k, want):
    a, b = Downsample().resize(rows, columns, k)
    assert 1 <= a <= rows and 1 <= b <= columns and want <= a * b <= k
    assert 0.5 <= (a * columns) / (b * rows) <= 2 or min(a, b) == 1


def test_random_depends_on_seed_and_prompt_only():
    state = torch.get_rng_state()
    pick = [
        RandomPre(seed).select_image(image_tokens(RandomPre(), key=key), 20).keep.tolist()
        for seed, key in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert pick[0] == pick[1] != pick[2] and pick[0] != pick[3]
    assert torch.equal(state, torch.get_rng_state())


# ----------------------------------------------------------------------------------------------------------- all methods
@pytest.mark.parametrize("method", METHODS, ids=repr)
@GRIDS
def test_selections_are_sound(method, kind):
    for rows, columns in ((8, 9), (1, 40), (2, 2)):
        for dtype in DTYPES:
            tokens = image_tokens(method, kind, rows, columns, dtype=dtype)
            n = rows * columns
            for k in sorted({1, 2, 3, n // 3, n - 2, n - 1} & set(range(1, n))):
                got = method.select_image(tokens, k)
                check_selection(method, got.keep, got.merged, k, n)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_bad_numbers_and_missing_grids(method):
    """Zero and NaN rows, NaN signals, tokens without a place, a prompt without text: still a sound selection."""
    tokens = image_tokens(method)
    for row, value in ((0, 0.0), (5, 0.0), (9, float("nan"))):
        tokens.embeds[row] = value
        for signal in (
            EncoderFeatures(),
            EncoderKeys(),
            EncoderKeys("last", "concat"),
            Saliency(),
            ClsLogits(),
        ):
            tokens.source(signal)[row] = value
    blank = torch.full_like(tokens.place, float("nan"))
    empty = {TextEmbeds(): torch.zeros(0, tokens.embeds.shape[1])}
    silent = image_tokens(method, values=empty)
    for case in (tokens, dataclasses.replace(tokens, place=blank), silent):
        got = method.select_image(case, 20)
        check_selection(method, got.keep, got.merged, 20, 72)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_only_declared_signals_are_read(method):
    read = []
    tokens = image_tokens(method)
    spied = dataclasses.replace(tokens, source=lambda s: (read.append(s), tokens.source(s))[1])
    method.select_image(spied, 20)
    assert set(read) == method.signals


def test_every_pre_llm_method_is_tested():
    """Whoever adds a method to this package adds its twin here."""
    here = {
        n
        for n, c in registry.methods().items()
        if issubclass(c, PreLLM) and ".pre_llm." in c.__module__
    }
    assert here <= {m.name for m in METHODS}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: VisionZip(variant="x"), "variant must be one of"),
        (lambda: VisionZip(ratio=0), "above 0"),
        (lambda: PruMerge(variant="effivlm"), "prumerge: variant must be one of"),
        (lambda: PruMergePlus(neighbours=-1), "prumerge_plus: neighbours"),
        (lambda: VisPruner(important_ratio=2), "share of the budget in [0, 1], got 2"),
        (lambda: VisPruner(step=0), "at least 1 token"),
        (lambda: Scope(alpha=-1), "must not be negative, got -1"),
        (lambda: GPrune(temperature=0), "temperature > 0"),
        (lambda: HoloV(num_patches=0), "num_patches >= 1"),
        (lambda: HoloV(variant="clean"), "variant must be one of"),
        (lambda: GridPrune(alpha=2), "alpha in [0, 1]"),
    ],
)
def test_messages(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert words in str(error.value)


def test_budgets_count_the_same_for_every_method():
    for method in METHODS:
        room = Room(PreLLM, (576,), 32)
        assert method.counts(room, parse_budget("0.1", "visual")) == [57]


def test_encoder_features_not_embeddings_decide_diversity():
    """VisPruner and SCOPE compare encoder features: other embeddings change nothing, other features do."""
    for method in (VisPruner(), Scope()):
        base = image_tokens(method)
        other = dataclasses.replace(base, embeds=torch.randn_like(base.embeds))
        assert torch.equal(method.select_image(base, 20).keep, method.select_image(other, 20).keep)
        moved = image_tokens(method, values={EncoderFeatures(): features("clustered", 72, 24, 99)})
        assert not torch.equal(
            method.select_image(base, 20).keep, method.select_image(moved, 20).keep
        )


def test_holov_variety_counts():
    """In the released code the variety term cancels; here a varied region gets more."""
    place = grid(8, 8)
    embeds = torch.ones(64, 24)
    left = place[:, 1] < 2
    embeds[left] = features("random", int(left.sum()), 24, 3)
    flat = torch.full((64,), 1 / 64)
    table = {Saliency(): flat}
    tokens = ImageTokens(table.__getitem__, HoloV().signals, 0, {}, embeds, place, 0, 0)
    share = [
        float(left[HoloV(alpha=a).select_image(tokens, 16).keep].float().mean()) for a in (0.0, 2.0)
    ]
    assert share[1] > share[0] + 0.2
