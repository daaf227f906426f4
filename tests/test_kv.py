"""Cache methods against naive loops over dense attention, allocators' totals, mergers, and properties of every scorer."""

import dataclasses
import math
import typing

import pytest
import torch
from kv_contexts import kept, layer_cache, spans

from effivlm.budget import BudgetError, parse_budget, split
from effivlm.methods.base import KVCache, Room
from effivlm.methods.baselines import RandomKV
from effivlm.methods.kv_cache import allocators, scoring
from effivlm.methods.kv_cache.adakv import AdaKV
from effivlm.methods.kv_cache.criticalkv import CriticalKV
from effivlm.methods.kv_cache.expected_attention import ExpectedAttention
from effivlm.methods.kv_cache.h2o import H2O
from effivlm.methods.kv_cache.keydiff import KeyDiff
from effivlm.methods.kv_cache.knorm import Knorm
from effivlm.methods.kv_cache.layer_adaptive import LayerAdaptive
from effivlm.methods.kv_cache.look_m import LookM
from effivlm.methods.kv_cache.plphp import PLPHP
from effivlm.methods.kv_cache.pyramidkv import PyramidKV
from effivlm.methods.kv_cache.snapkv import SnapKV
from effivlm.methods.kv_cache.streaming_llm import StreamingLLM
from effivlm.methods.kv_cache.tova import Tova
from effivlm.methods.kv_cache.vl_cache import VLCache
from effivlm.ops.allocate import bounded, head_counts
from effivlm.ops.kv_merge import MERGERS, merge_entries, nearest_kept
from effivlm.registry import methods

torch.set_num_threads(1)
EVERY = [
    cls for cls in methods().values() if issubclass(cls, KVCache) and cls.units[0] == "prompt_kv"
]
SCORERS = [
    ExpectedAttention(value_norms=False),
    H2O(),
    KeyDiff(),
    Knorm(),
    LookM(merge="none"),
    SnapKV(),
    SnapKV(rows=32, kernel=7, pooling="max"),
    Tova(shared=False),
    VLCache(),
    PyramidKV(),
]
WRAPPED = [
    *(AdaKV(s) for s in SCORERS),
    AdaKV(normalize=True),
    *(CriticalKV(s) for s in SCORERS if s.amounts),
    *(LayerAdaptive(s) for s in SCORERS if not s.spreads),
]
ALL = [cls() for cls in EVERY] + WRAPPED
SHARED = [
    SnapKV,
    PyramidKV,
    H2O,
    LookM,
    VLCache,
    Tova,
    PLPHP,
    ExpectedAttention,
    Knorm,
    KeyDiff,
    RandomKV,
]
FOLDED = [
    cls for cls in SHARED if cls not in (Knorm, KeyDiff, RandomKV)
]  # those that read query heads


def name_of(method):
    held = getattr(method, "scorer", None)
    return f"{method.name}-{held.name}" if held else method.name


def best(scores, k):
    """Indices of the k highest, ties by lower index."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])


def windowed(scores, k, window):
    past = len(scores) - window
    return best(scores[:past], k - window) + list(range(past, len(scores)))


def heads_of(entries):
    return [row.nonzero()[:, 0].tolist() for row in entries.keep]


# ------------------------------------------------------------------------------------------------------ naive twins
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "k"), [(80, 20), (80, 1), (41, 40), (33, 7)])
def test_window_methods_are_their_formulas(length, k, dtype):
    w = max(1, int(0.1 * k))
    got, a = kept(H2O(), length, k, dtype=dtype)
    for h, row in enumerate(heads_of(got)):
        column = [float(a[2 * h : 2 * h + 2, :, j].sum()) for j in range(length)]
        assert row == windowed(column, k, w)
    got, a = kept(SnapKV(kernel=3), length, k, dtype=dtype)
    for h, row in enumerate(heads_of(got)):
        seen = [float(a[2 * h : 2 * h + 2, length - w :, j].sum()) for j in range(length - w)]
        pooled = [sum(seen[max(0, j - 1) : j + 2]) / 3 for j in range(length - w)]
        assert row == windowed(pooled + [0] * w, k, w)
    got, a = kept(SnapKV(rows=16, pooling="none", fold="max"), length, k, dtype=dtype)
    for h, row in enumerate(heads_of(got)):
        seen = [max(float(a[i, -16:, j].sum()) for i in (2 * h, 2 * h + 1)) for j in range(length)]
        assert row == windowed(seen, k, w)
    got, a = kept(VLCache(), length, k, dtype=dtype, image=spans(length, ((3, 25),)))
    for h, row in enumerate(heads_of(got)):
        assert row == windowed(
            [float(a[2 * h : 2 * h + 2, 25:, j].sum()) for j in range(length)], k, w
        )
    got, a = kept(Tova(), length, k, dtype=dtype)
    assert all(
        row == best([float(a[:, -1, j].sum()) for j in range(length)], k) for row in heads_of(got)
    )


@pytest.mark.parametrize("k", [3, 20, 45])
def test_look_m_keeps_text_first(k):
    image = spans(80)
    got, a = kept(LookM(), 80, k)
    w, text = max(1, int(0.1 * k)), (image < 0).tolist()
    for h, row in enumerate(heads_of(got)):
        column = [float(a[2 * h : 2 * h + 2, :, j].sum()) + 1e6 * text[j] for j in range(80)]
        assert row == windowed(column, k, w)


def test_streaming_llm_positions():
    for k in (1, 3, 4, 5, 20):
        first = min(4, k - 1)
        assert (
            heads_of(kept(StreamingLLM(), 80, k)[0])
            == [[*range(first), *range(80 - (k - first), 80)]] * 2
        )
    assert heads_of(kept(StreamingLLM(variant="effivlm"), 80, 20)[0]) == [[*range(18), 78, 79]] * 2


def test_h2o_with_nothing_but_a_window():
    assert heads_of(kept(H2O(window=1.0), 80, 9)[0]) == [list(range(71, 80))] * 2


def test_keydiff_formula():
    got, _ = kept(KeyDiff(), 60, 12)
    cache, _ = layer_cache(KeyDiff(), 60)
    for h, row in enumerate(heads_of(got)):
        units = cache.keys[h].double() / cache.keys[h].double().norm(dim=-1, keepdim=True)
        anchor = units.mean(0)
        assert row == best([-float(u @ anchor / anchor.norm()) for u in units], 12)


def test_criticalkv_formula():
    """Loops over the dense attention: means over the two observing rows, epsilon added, times norms."""
    method = CriticalKV(SnapKV(pooling="none"), epsilon=0.02)
    cache, attention = layer_cache(method, 80)
    scores = attention[:, -2:].mean(1).view(2, 2, 80).mean(1)
    scores[:, -2:] = torch.inf
    norms = cache.values.double().abs().sum(-1) * 3
    got = heads_of(method.choose(cache, method.score(cache, 21), 21))
    for h, row in enumerate(got):
        first = best(scores[h].tolist(), 10)
        rest = [
            -math.inf if j in first else (float(scores[h, j]) + 0.02) * float(norms[h, j])
            for j in range(80)
        ]
        assert row == sorted(first + best(rest, 11))


@pytest.mark.parametrize("method", [H2O(), SnapKV(pooling="none"), VLCache(), Tova()])
def test_amounts_are_means_over_observing_rows(method):
    """What is added to a score, and compared between heads, does not depend on how many rows observe."""
    cache, attention = layer_cache(method, 80, image=spans(80, ((3, 25),)))
    first = {"h2o": 0, "snapkv": 80 - 2, "vl_cache": 25, "tova": 79}[method.name]
    want = attention[:, first:].mean(1).view(2, -1, 80).mean(1).float()
    if method.name == "tova":
        want = want.mean(0).expand(2, -1)
    got = method.score(cache, 20)
    seen = got < torch.inf
    assert method.amounts and int(seen.sum()) >= 2 * 78
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-5, atol=1e-7)


def test_criticalkv_protects_entries_whose_values_are_zero():
    v = torch.randn(2, 80, 8, generator=torch.Generator().manual_seed(0))
    v[:, 60:] = 0
    keep = kept(CriticalKV(SnapKV(window=0.5), first=0.1), 80, 20, v=v)[0].keep
    assert bool(keep[:, 70:].all()) and keep.sum(1).tolist() == [20, 20]


def test_criticalkv_halves_the_count_a_layer_gets():
    """With layer budgets of the scorer's the count is known after scoring: half of that one is chosen by score alone."""
    method = CriticalKV(PyramidKV(pooling="none", window=0.0), first=0.5)
    cache, _ = layer_cache(method, 80)
    scores = method.score(cache, 20)
    for k in (6, 20, 44):
        keep = method.choose(cache, scores, k).keep
        best_half = method.scorer.choose(cache, scores[0], k // 2).keep
        assert bool((keep | ~best_half).all()) and keep.sum(1).tolist() == [k, k]


@pytest.mark.parametrize("wrapper", [AdaKV, CriticalKV])
def test_wrappers_keep_the_layer_budgets_of_their_scorer(wrapper):
    for scorer in (PyramidKV(beta=7), VLCache(uniform=0.4)):
        method = wrapper(scorer)
        room = Room(KVCache, (80,) * 4, 4, (0.9, 0.5, 0.2, 0.01) if scorer.waits else None)
        budget = parse_budget("0.2", "prompt_kv")
        assert method.counts(room, budget) == scorer.counts(room, budget)
        assert method.signals >= scorer.signals and method.waits == scorer.waits and method.spreads
        cache, _ = layer_cache(method, 80)
        if method.waits:
            assert method.statistic(cache) == scorer.statistic(cache) > 0


def test_adakv_formula():
    method = AdaKV(floor=0.2)
    cache, _ = layer_cache(method, 80, heads=6, groups=3)
    scores, k, w = method.score(cache, 20), 20, 2
    pairs = [(-float(scores[h, j]), h, j) for h in range(3) for j in range(78)]
    counts = [0, 0, 0]
    for _, h, _ in sorted(pairs)[: 3 * (k - w)]:
        counts[h] += 1
    entries = heads_of(method.choose(cache, scores, k))
    assert sum(map(len, entries)) == 3 * k and len(set(map(len, entries))) > 1
    for h, row in enumerate(entries):
        assert abs(len(row) - w - (0.8 * counts[h] + 0.2 * (k - w))) < 1
        assert row == windowed(scores[h].tolist(), len(row), w)


# ----------------------------------------------------------------------------------------------- every method, edges
@pytest.mark.parametrize("method", ALL, ids=name_of)
@pytest.mark.parametrize(("length", "k"), [(64, 6), (64, 63), (40, 1), (12, 5), (2, 1)])
@pytest.mark.parametrize("images", [((5, 30), (33, 60)), (), ((1, 10**6),)])
def test_counts_are_exact(method, length, k, images):
    """Short prompts, one entry, no image, image to the end: ``KV * k`` entries, none twice, window where there is one."""
    entries = kept(method, length, k, image=spans(length, images))[0]
    per_head = entries.keep.sum(1)
    assert int(per_head.sum()) == 2 * k
    if method.name != "adakv":
        assert per_head.tolist() == [k, k]
    if (window := getattr(method, "window", None)) is not None and method.name not in (
        "layer_adaptive",
        "random_kv",
    ):
        assert bool(entries.keep[:, length - max(1, int(window * k)) :].all())


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_grouped_and_ungrouped_heads(method):
    """Four query heads that are two pairs of twins over two KV heads choose as two heads over two (MHA)."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 70, 8, generator=g) for _ in range(3))
    one = kept(method, 70, 15, q=q, k=k, v=v)[0].keep
    two = kept(method, 70, 15, q=q.repeat_interleave(2, 0), k=k, v=v)[0].keep
    assert torch.equal(one, two)


@pytest.mark.parametrize("cls", SHARED)
def test_shared_and_head_adaptive(cls):
    """Shared: one set for all heads. Identical heads: both choose the same."""
    shared, apart = cls(shared=True), cls(shared=False)
    keep = kept(shared, 80, 20)[0].keep
    assert torch.equal(keep[0], keep[1])
    assert not torch.equal(*kept(apart, 80, 20)[0].keep)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 80, 8, generator=g) for _ in range(3))
    same = {"q": q.repeat(4, 1, 1), "k": k.repeat(2, 1, 1), "v": v.repeat(2, 1, 1)}
    if cls is not RandomKV:
        assert torch.equal(
            kept(shared, 80, 20, **same)[0].keep, kept(apart, 80, 20, **same)[0].keep
        )


def test_every_scorer_can_be_shared_and_names_its_fold():
    """StreamingLLM keeps the same everywhere; the wrappers take their scorer's choice."""
    assert {cls for cls in EVERY if "shared" in cls.__dataclass_fields__} == set(SHARED)
    assert {cls for cls in EVERY if "fold" in cls.__dataclass_fields__} == set(FOLDED)
    assert {cls.name for cls in EVERY if cls not in SHARED} == {
        "streaming_llm",
        "adakv",
        "criticalkv",
        "layer_adaptive",
    }


@pytest.mark.parametrize("cls", FOLDED)
def test_fold_of_query_heads(cls):
    """Mean and max over the query heads of a KV head are different votes."""
    apart = {} if cls is not Tova else {"shared": False}
    mean, largest = (kept(cls(fold=f, **apart), 80, 40)[0].keep for f in ("mean", "max"))
    assert not torch.equal(mean, largest)
    assert torch.equal(mean.sum(1), largest.sum(1))


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: s.name)
def test_adakv_spreads_unevenly_over_any_scorer(scorer):
    """One KV head with sharp attention, small keys and small values, one flat: they do not keep the same count."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(4, 80, 8, generator=g),
        torch.randn(2, 80, 8, generator=g),
        torch.randn(2, 80, 8, generator=g),
    )
    q[:2], k[1], v[1] = 6 * q[:2], 0.2 * k[1] + 0.2, 0.2 * v[1]
    image = torch.full((80,), -1)
    image[5:70] = 0
    entries = kept(AdaKV(scorer), 80, 30, q=q, k=k, v=v, image=image)[0].keep.sum(1).tolist()
    assert sum(entries) == 60 and entries[0] != entries[1]


def test_constant_scores_keep_the_lowest_positions():
    flat = torch.full((4, 30, 30), 1 / 30)
    assert heads_of(kept(H2O(), 30, 10, attention=flat)[0]) == [[*range(9), 29]] * 2
    assert heads_of(kept(Tova(), 30, 10, attention=flat)[0]) == [list(range(10))] * 2


def test_max_pooling_keeps_the_peak_of_a_plateau():
    """One peak at 20 spreads over 18..22; of equal pooled scores the higher own score wins, then the lower position."""
    attention = torch.full((4, 60, 60), 1e-3)
    attention[..., 20], attention[..., 22] = 0.5, 0.4
    for k, want in (
        (2, [20, 59]),
        (3, [20, 22, 59]),
        (4, [18, 20, 22, 59]),
        (5, [18, 19, 20, 22, 59]),
    ):
        got = heads_of(kept(SnapKV(pooling="max", window=0.0), 60, k, attention=attention)[0])
        assert got == [want] * 2, k


# -------------------------------------------------------------------------------------------------------- allocators
SHARES = (0.01, 0.05, 0.1, 0.2, 0.4)
ALLOCATORS = [
    allocators.Pyramid(20, 0.1),
    allocators.Density(0.1),
    allocators.Density(0.1, 0.4),
    allocators.Density(0.1, 0.8),
    allocators.Proportional(),
    allocators.Hybrid(allocators.Proportional(), 0.4),
    allocators.Hybrid(allocators.Density(0.1), 0.8),
]


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
@pytest.mark.parametrize("length", [1, 2, 7, 40, 75, 640, 8000])
@pytest.mark.parametrize("layers", [1, 2, 28])
def test_totals_are_exact(allocator, length, layers):
    g = torch.Generator().manual_seed(layers)
    densities = [
        [0.5] * layers,
        [1.0] + [1e-6] * (layers - 1),
        torch.rand(layers, generator=g).tolist(),
        [0.0] * layers,
    ]
    for share in SHARES:
        for density in densities:
            counts = allocator([length] * layers, share, density)
            assert sum(counts) == layers * max(1, math.floor(length * share + 1e-9)), (
                share,
                density,
            )
            assert all(1 <= c <= length for c in counts)


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_layers_of_unequal_length(allocator):
    lengths = [400] * 4 + [150] * 4
    counts = allocator(lengths, 0.3, [0.9, 0.1] * 4)
    assert sum(counts) == 4 * 120 + 4 * 45 and all(
        1 <= c <= n for c, n in zip(counts, lengths, strict=True)
    )


def test_pyramid_falls_and_density_follows():
    counts = allocators.Pyramid(20, 0.1)([1000] * 28, 0.1, None)
    assert counts == sorted(counts, reverse=True) and counts[0] > 180 and counts[-1] < 20
    even = allocators.Density(0.1)([1000] * 6, 0.2, [0.3] * 6)
    assert even == [200] * 6
    steep = allocators.Density(0.1)([1000] * 6, 0.1, [1.0, 0, 0, 0, 0, 0])
    assert steep == [10 + 495] + [10 + 9] * 5
    mixed = allocators.Density(0.1, 0.8)([1000] * 6, 0.1, [1.0, 0, 0, 0, 0, 0])
    assert steep[0] > mixed[0] > 100 > mixed[1] > steep[1]
    assert (
        allocators.Density(0.1, 0.8)([10000] * 6, 0.1, [1.0, 0, 0, 0, 0, 0])
        == [100 + 1800] + [100 + 720] * 5
    )
    assert allocators.Density(0.1)([1000] * 6, 0.4, [1.0, 0.1, 0.1, 0.1, 0.1, 0.1])[0] == 1000


def lengths_behind_cuts(seed):
    """A random profile of layer lengths that never rises, as cuts inside the LLM leave it."""
    g = torch.Generator().manual_seed(seed)
    layers, cuts = int(torch.randint(2, 40, (), generator=g)), 1 + seed % 3
    places = torch.randint(1, layers, (cuts,), generator=g).tolist()
    held = sorted(torch.randint(1, 900, (cuts + 1,), generator=g).tolist(), reverse=True)
    return [held[sum(p <= layer for p in places)] for layer in range(layers)]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4, 0.7, 0.97])
@pytest.mark.parametrize("beta", [1, 20])
def test_pyramid_falls_behind_any_cut(share, beta):
    """Counts never rise and spend the whole budget, whatever the layers hold."""
    for lengths in ([640] * 14 + [64] * 14, *map(lengths_behind_cuts, range(60))):
        counts = allocators.Pyramid(beta, 0.1)(lengths, share, None)
        assert counts == sorted(counts, reverse=True), lengths
        assert sum(counts) == sum(allocators.uniform_counts(lengths, share)), lengths
        assert all(1 <= c <= n for c, n in zip(counts, lengths, strict=True)), lengths
        windows = [scoring.recent(c, 0.1) for c in allocators.uniform_counts(lengths, share)]
        assert all(w <= c for w, c in zip(windows, counts, strict=True)), lengths
        # lengths that rise: only a layer that keeps all it holds may keep less than a later one
        lengths = lengths[::-1]
        counts = allocators.Pyramid(beta, 0.1)(lengths, share, None)
        assert sum(counts) == sum(allocators.uniform_counts(lengths, share)), lengths
        open_ = [c for c, n in zip(counts, lengths, strict=True) if c < n]
        assert open_ == sorted(open_, reverse=True), lengths


def test_pyramid_behind_a_cut_is_as_steep_as_without():
    """`vtw@0.5 + pyramidkv@0.4` on 28 layers: the whole front half falls, and so does the back."""
    counts = allocators.Pyramid(20, 0.1)([640] * 14 + [64] * 14, 0.4, None)
    assert counts[0] > 1.7 * counts[13] > 1.7 * 64 and counts[14] == 64 > counts[-1]


def test_hybrid_mixes_any_adaptive_allocator():
    """U-0 is the adaptive split, U-100 the even one, U-80 in proportion between; without a budget nothing can be even."""
    inner, shares = allocators.Proportional(), [1.0, 0.5, 0.25, 0.25]
    own = inner([1000] * 4, 0.1, shares)
    assert own == [200, 100, 50, 50]
    for uniform, want in (
        (0, own),
        (0.4, [160, 100, 70, 70]),
        (0.8, [120, 100, 90, 90]),
        (1, [100] * 4),
    ):
        assert allocators.Hybrid(inner, uniform)([1000] * 4, 0.1, shares) == want
    own_rule = inner([1000] * 4, None, shares)
    assert allocators.Hybrid(inner, 0)([1000] * 4, None, shares) == own_rule
    with pytest.raises(BudgetError, match=r"uniform=0\.8 spreads a budget, and none was given"):
        allocators.Hybrid(inner, 0.8)([1000] * 4, None, shares)
    room = Room(KVCache, (1000,) * 4, 4, tuple(shares))
    spread = PLPHP(uniform=0.8).counts(room, parse_budget("0.1", "prompt_kv"))
    assert spread == allocators.Hybrid(inner, 0.8)([1000] * 4, 0.1, shares)


def test_vl_cache_one_hot_layer_is_sparse_and_flat_is_dense():
    hot, flat = torch.zeros(4, 60, 60), torch.ones(4, 60, 60).tril()
    hot[..., 0] = 1
    assert VLCache().statistic(layer_cache(VLCache(), 60, attention=hot)[0]) < 0.03
    assert VLCache().statistic(layer_cache(VLCache(), 60, attention=flat)[0]) == 1


def test_bounded_keeps_bounds_and_total():
    assert bounded(10, [1, 0, 0], [0, 2, 2], [10, 10, 10]) == [6, 2, 2]
    assert bounded(10, [1, 0, 0], [0, 0, 0], [4, 10, 10]) == [4, 3, 3]
    assert sum(bounded(2, [1, 1, 1], [1, 1, 1], [5, 5, 5])) == 2


def test_head_counts_sum():
    scores = torch.rand(5, 37) ** torch.tensor([1.0, 2, 4, 8, 30])[:, None]
    none = torch.zeros(5, 37, dtype=torch.bool)
    for floor in (0, 0.2, 1):
        counts = head_counts(scores, none, torch.tensor(7), floor).tolist()
        assert sum(counts) == 35 and all(c >= int(floor * 7) for c in counts)
    assert head_counts(scores, none, torch.tensor(7), 1.0).tolist() == [7] * 5


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.37])
def test_head_counts_equal_the_largest_remainder(floor):
    """The slow twin: one ranking in Python, then `split`; protected entries take no part."""
    scores = torch.rand(4, 29, dtype=torch.float64) ** torch.tensor([1.0, 2, 5, 9])[:, None]
    protected = torch.arange(29).expand(4, -1) >= 26
    for base in (0, 1, 6, 26):
        flat = scores[:, :26].flatten().tolist()
        best = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[: 4 * base]
        won = [sum(i // 26 == h for i in best) for h in range(4)]
        want = split(4 * base, [(1 - floor) * w + floor * base for w in won], [26] * 4)
        given = scores.masked_fill(protected, torch.inf)
        assert head_counts(given, protected, torch.tensor(base), floor).tolist() == want


# ------------------------------------------------------------------------------------------------------------- plphp
def attention_to_images(share, length=80):
    """[H, L, L] whose last row pays ``share`` to the images of `spans`, unevenly, in sums that float32 holds exactly."""
    image = spans(length)
    row = torch.rand(4, length, generator=torch.Generator().manual_seed(2)) + 0.1
    row[:, image >= 0] *= share / row[:, image >= 0].sum(1, keepdim=True)
    row[:, image < 0] *= (1 - share) / row[:, image < 0].sum(1, keepdim=True)
    full = torch.zeros(4, length, length)
    full[:, -1] = row
    return full


@pytest.mark.parametrize(("attention", "r"), [(0.9, 0.7), (0.2, 0.4), (0.05, 0.1)])
def test_plphp_keeps_its_share_of_every_image(attention, r):
    method, image = PLPHP(), spans(80)
    cache, a = layer_cache(method, 80, attention=attention_to_images(attention))
    (count,) = method.counts(Room(KVCache, (80,), 1, (float(method.statistic(cache)),)), None)
    keep = method.choose(cache, method.score(cache, 80), count).keep
    for h in range(2):
        assert bool(keep[h, image < 0].all())
        for number, size in ((0, 25), (1, 27)):
            members = (image == number).nonzero()[:, 0]
            scores = [float(a[2 * h : 2 * h + 2, -1, j].sum()) for j in members]
            want = best(scores, max(1, math.floor(r * size + 1e-9)))
            assert keep[h, members].nonzero()[:, 0].tolist() == want


def test_plphp_small_images_keep_their_best_entry():
    """A share that rounds to nothing keeps one entry of the image."""
    image = spans(80, ((5, 8), (20, 60)))
    method = PLPHP(alpha=0.99, beta=0.98)  # every layer is indifferent: a tenth of each image
    cache, a = layer_cache(method, 80, attention=attention_to_images(0.01), image=image)
    (count,) = method.counts(Room(KVCache, (80,), 1, (float(method.statistic(cache)),)), None)
    keep = method.choose(cache, method.score(cache, 80), count).keep
    assert count == 37 + 1 + 4
    assert keep[:, 5:8].sum(1).tolist() == [1, 1] and keep[:, 20:60].sum(1).tolist() == [4, 4]
    for h in range(2):
        assert int(keep[h, 5:8].int().argmax()) == int(
            a[2 * h : 2 * h + 2, -1, 5:8].sum(0).argmax()
        )


def test_plphp_thresholds_layers_and_errors():
    method = PLPHP()
    shares = method.retention(torch.tensor([0.25, 0.1, 0.0999], dtype=torch.float64))
    assert shares.tolist() == pytest.approx([0.7, 0.4, 0.1])
    statistics = [method.statistic(layer_cache(method, 80, layer=i, layers=6)[0]) for i in range(6)]
    assert [s == 1 for s in statistics] == [True, True, False, False, False, True]
    assert method.statistic(layer_cache(method, 80, image=torch.full((80,), -1))[0]) == 1
    with pytest.raises(ValueError, match="dr <= r <= 1 - dr"):
        PLPHP(r=0.2)


# ------------------------------------------------------------------------------------------------------------ merging
def apply(x, how, keep, kind=None):
    target, source, weight = merge_entries(x, keep, how, kind)
    out = x.clone()
    out[target] = 0
    return out.index_add(0, target, weight[:, None] * x[source])


@pytest.mark.parametrize("how", MERGERS)
@pytest.mark.parametrize("kind", ["random", "duplicated", "constant", "zero"])
def test_merge_is_its_formula(how, kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=g)
    x = {
        "random": x,
        "duplicated": x[torch.arange(30) // 3],
        "constant": x[:1].repeat(30, 1),
        "zero": x * (torch.arange(30) % 4 > 0)[:, None],
    }[kind]
    keep = torch.rand(30, generator=g) < 0.3
    kept_index = keep.nonzero()[:, 0].tolist()
    source, target, cosine = nearest_kept(x, keep, block=7)
    want = x.double().clone()
    for c in kept_index:
        members = [
            (e, cos)
            for e, t, cos in zip(source.tolist(), target.tolist(), cosine.tolist(), strict=True)
            if t == c
        ]
        total = x[c].double().clone()
        for e, cos in members:
            add = {"averaged": x[e], "pivotal": (x[e] + x[c]) / 2, "weighted": cos * x[e]}[how]
            total += add.double()
        want[c] = total / (len(members) + 1)
    torch.testing.assert_close(apply(x, how, keep).double(), want, rtol=1e-5, atol=1e-6)
    if kind == "random":
        for e, t in zip(source.tolist(), target.tolist(), strict=True):
            cosines = [float(torch.cosine_similarity(x[e], x[c], 0)) for c in kept_index]
            assert t == kept_index[max(range(len(cosines)), key=lambda i: cosines[i])]
    if kind == "constant":
        assert set(target.tolist()) == {kept_index[0]}


@pytest.mark.parametrize("how", MERGERS)
def test_nothing_evicted_is_the_identity(how):
    x = torch.randn(9, 4)
    assert torch.equal(apply(x, how, torch.ones(9, dtype=torch.bool)), x)


def test_modality_merge_never_mixes():
    """Changing an evicted visual value changes no text entry; a kind without a kept entry is dropped."""
    cache, _ = layer_cache(LookM(modality=True), 80)
    entries = LookM(modality=True).choose(cache, LookM(modality=True).score(cache, 45), 45)
    m, image = entries.merged, cache.image
    assert bool(((image[m.source] < 0) == (image[m.target] < 0)).all())
    assert bool(entries.keep[m.head, m.target].all())
    mixed = LookM().choose(cache, LookM().score(cache, 45), 45).merged
    assert not bool(((image[mixed.source] < 0) == (image[mixed.target] < 0)).all()), (
        "the plain merge mixes: the test can fail"
    )
    few = LookM(modality=True).choose(cache, LookM(modality=True).score(cache, 10), 10).merged
    assert bool((image[few.source] < 0).all())


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaKV("snapkv"), "not a scorer"),
        (lambda: AdaKV(StreamingLLM()), "not a scorer"),
        (lambda: AdaKV(Tova()), r"adakv\(tova\): heads compete.* write tova:shared=false"),
        (lambda: AdaKV(LookM()), "dropped, not merged: write look_m:merge=none"),
        (lambda: AdaKV(Knorm(), normalize=True), "amounts of attention .* leave normalize out"),
        (lambda: AdaKV(LookM(merge="none"), normalize=True), "amounts of attention"),
        (lambda: CriticalKV(Knorm()), r"criticalkv\(knorm\): .* amounts of attention"),
        (lambda: CriticalKV(KeyDiff()), "wrap for example snapkv"),
        (lambda: CriticalKV(LookM(merge="none")), "amounts of attention"),
        (
            lambda: CriticalKV(ExpectedAttention()),
            "weighed twice: write expected_attention:value_norms=false",
        ),
        (lambda: CriticalKV(epsilon=-1), "epsilon=-1 >= 0"),
        (lambda: LayerAdaptive(VLCache()), "layer budgets of its own"),
        (lambda: LayerAdaptive(PyramidKV()), "layer budgets of its own"),
        (lambda: CriticalKV(first=2), "must be in"),
        (lambda: LayerAdaptive(uniform=-1), "must be in"),
        (lambda: H2O(window=1.5), "share of the budget"),
        (lambda: SnapKV(kernel=4), "odd"),
        (lambda: PyramidKV(beta=0), "at least 1"),
        (lambda: VLCache(p=0), "must be in"),
        (lambda: PLPHP(uniform=1.1), "must be in"),
        (lambda: StreamingLLM(sinks=-1), "at least 0"),
        (lambda: LayerAdaptive(window=0.05), "less than the 0.1 that snapkv always keeps"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ----------------------------------------------------------------------------------------- fields that would do nothing
OTHER = {  # values that a changed field gets; numbers without a line here are doubled
    "seed": 1,
    "rows": 32,
    "kernel": 7,
    "uniform": 0.4,
    "sinks": 9,
    "epsilon": 0.05,
    "normalize": True,
    "floor": 0.9,
    "p": 0.3,
    "r": 0.5,
    "dr": 0.1,
    "alpha": 0.99,
    "beta": {"pyramidkv": 3, "plphp": 0.9},
}


def choices(cls, name):
    """Other values of a field: all of a Literal or bool, one of a number; none for a held scorer."""
    hint, default = typing.get_type_hints(cls)[name], getattr(cls, name)
    if isinstance(default, KVCache):
        return []
    if typing.get_origin(hint) is typing.Literal:
        return [v for v in typing.get_args(hint) if v != default]
    if isinstance(default, bool):
        return [not default]
    other = OTHER.get(name, 2 * default)
    return [other[cls.name] if isinstance(other, dict) else other]


def fingerprint(method):
    """All that a method decides on one cache of mixed attention, and how it spreads two budgets over layers."""
    cache, _ = layer_cache(method, 80, layer=3, seed=5, image=spans(80, ((5, 30), (33, 70))))
    scores = method.score(cache, 40)
    entries = method.choose(cache, scores, 40)
    merged = entries.merged and (entries.merged.target.tolist(), entries.merged.weight.tolist())
    statistic = method.statistic(cache) if method.waits else None
    room = Room(KVCache, (80,) * 4, 4, (0.9, 0.5, 0.2, 0.01) if method.waits else None)
    spread = [method.counts(room, parse_budget(b, "prompt_kv")) for b in ("0.1", "0.6")]
    return scores.tolist(), entries.keep.tolist(), merged, spread, statistic, method.signals


@pytest.mark.parametrize("cls", EVERY)
def test_every_field_does_something_or_is_refused(cls):
    """Each field, alone and beside every other choice of the fields that switch something, changes the decision."""
    fields = [f.name for f in dataclasses.fields(cls)]
    switches = [n for n in fields if isinstance(getattr(cls, n), bool | str)]
    for switch, value in [(None, None), *((n, v) for n in switches for v in choices(cls, n))]:
        given = {} if switch is None else {switch: value}
        try:
            base = fingerprint(cls(**given))
        except ValueError:  # refused as it stands: with some other field it may act
            continue
        for name in fields:
            for other in choices(cls, name) if name != switch else ():
                try:
                    changed = cls(**given, **{name: other})
                except ValueError:
                    continue
                assert fingerprint(changed) != base, f"{name}={other} does nothing beside {given}"
