"""Outputs of the official codes, stored as numbers, against the same step here. Selections exactly, floats to 1e-4."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kv_contexts import kept, layer_cache
from safetensors import safe_open

from effivlm.methods.kv_cache.adakv import AdaKV
from effivlm.methods.kv_cache.allocators import Density, Pyramid
from effivlm.methods.kv_cache.expected_attention import ExpectedAttention
from effivlm.methods.kv_cache.h2o import H2O
from effivlm.methods.kv_cache.knorm import Knorm
from effivlm.methods.kv_cache.look_m import LookM
from effivlm.methods.kv_cache.scoring import window_and_top
from effivlm.methods.kv_cache.snapkv import SnapKV
from effivlm.methods.kv_cache.streaming_llm import StreamingLLM
from effivlm.methods.kv_cache.tova import Tova
from effivlm.methods.kv_cache.vl_cache import VLCache
from effivlm.ops import statistics
from effivlm.ops.allocate import density_shares, head_counts, pyramid_floor
from effivlm.ops.kv_merge import merge_entries, nearest_kept
from effivlm.ops.select import top_k_mask

torch.set_num_threads(1)
ROOT = Path(__file__).parent / "golden"


def cases(method, *containing):
    paths = [
        p
        for p in sorted((ROOT / method).glob("*.safetensors"))
        if not containing or any(c in p.stem for c in containing)
    ]
    assert paths, f"no golden file of {method}"
    return [pytest.param(p, id=p.stem) for p in paths]


def load(path):
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        tensors["params"] = json.loads(file.metadata()["params"])
    return {
        k: v.long() if isinstance(v, torch.Tensor) and v.dtype == torch.int32 else v
        for k, v in tensors.items()
    }


def places(keep):
    """[KV, k] kept indices of every head."""
    return torch.stack([row.nonzero()[:, 0] for row in keep])


def sums(g):
    return statistics.column_sums(g["q"], g["k"], g["q"].shape[-1] ** -0.5, block=37)


@pytest.mark.parametrize("path", cases("streamingllm"))
def test_streaming_llm(path):
    g = load(path)
    p = g["params"]
    method = StreamingLLM(variant="effivlm") if "cap" in p else StreamingLLM(p["start_size"])
    got = kept(method, p["L"], len(g["kept_sorted"]))[0].keep
    assert torch.equal(places(got), g["kept_sorted"].expand(2, -1))


@pytest.mark.parametrize("path", cases("h2o"))
def test_h2o(path):
    g = load(path)
    p = g["params"]
    column, groups = sums(g), len(g["k"])
    if "col_sum" in g:
        torch.testing.assert_close(column, g["col_sum"], rtol=1e-4, atol=1e-4)
        got = window_and_top(column, p["hh_size"] + p["recent_size"], p["recent_size"]).keep
    else:
        got = kept(H2O(), p["L"], p["cap"], q=g["q"], k=g["k"])[0].keep
        score = statistics.fold(column, groups) * (p["H"] // groups)
        torch.testing.assert_close(score[:, : -p["window"]], g["score"], rtol=1e-4, atol=1e-4)
    assert torch.equal(places(got), g["kept_sorted"])


@pytest.mark.parametrize("path", cases("snapkv"))
def test_snapkv(path):
    g = load(path)
    p = g["params"]
    if "cap" in p:
        got = kept(SnapKV(), p["L"], p["cap"], q=g["q"], k=g["k"])[0].keep
    else:
        w, cap = p["window"], p["max_capacity_prompt"]
        method = SnapKV(window=(w + 0.5) / cap)
        got = kept(method, p["L"], cap, q=g["q"], k=g["k"])[0].keep
        rows = torch.arange(p["L"] - w, p["L"])
        window = statistics.row_sums(g["q"][:, rows], g["k"], rows, p["d"] ** -0.5)
        torch.testing.assert_close(window[:, :-w], g["window_sum"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            statistics.pool(window[:, :-w], 5), g["pooled"], rtol=1e-4, atol=1e-5
        )
    assert torch.equal(places(got), g["kept_sorted"])


@pytest.mark.parametrize("path", cases("pyramidkv"))
def test_pyramidkv(path):
    g = load(path)
    p = g["params"]
    counts = pyramid_floor(
        p["max_capacity_prompt"], p["window"], p["L"], p["num_layers"], p["beta"]
    )
    assert counts[p["layer_idx"]] == p["kept"]
    method = SnapKV(window=(p["window"] + 0.5) / p["max_capacity_prompt"], kernel=p["kernel_size"])
    cache, _ = layer_cache(method, p["L"], q=g["q"], k=g["k"])
    got = method.choose(cache, method.score(cache, p["max_capacity_prompt"]), p["kept"]).keep
    assert torch.equal(places(got), g["kept_sorted"])


def test_pyramid_published_totals():
    """Counts measured on the published integer schedule."""
    plan = Pyramid(20, 0.1, "effivlm")([1000] * 28, 0.1, None)
    assert (plan[0], plan[-1], sum(plan) / 28) == (186, 24, 105.0)
    assert set(Pyramid(20, 0.1, "effivlm")([1000] * 28, 0.01, None)) == {19}
    plan = Pyramid(20, 0.1, "effivlm")([1000] * 28, 0.05, None)
    assert (plan[0], plan[-1], sum(plan) / 28) == (93, 12, 52.5)
    plan = Pyramid(20, 0.1, "effivlm")([1000] * 28, 0.4, None)
    assert (plan[0], plan[-1], sum(plan) / 28) == (742, 67, 404.5)


def merged(x, keep, how, kind=None):
    """[C, d] kept rows of one head after a merge."""
    target, source, weight = merge_entries(x[0], keep, how, kind)
    out = []
    for rows in x:
        new = rows.clone()
        new[target] = 0
        out.append(new.index_add(0, target, weight[:, None] * rows[source])[keep])
    return out


@pytest.mark.parametrize("path", cases("lookm"))
def test_look_m_pairing_and_merge(path):
    g = load(path)
    for h, keys in enumerate(g["k"]):
        keep = torch.zeros(len(keys), dtype=torch.bool)
        keep[g["kept_sorted"][h]] = True
        source, target, cosine = nearest_kept(keys, keep, block=50)
        assert torch.equal(target, g["kept_sorted"][h][g["assign"][h]])
        if "sim" in g:
            torch.testing.assert_close(cosine, g["sim"][h], rtol=1e-4, atol=1e-5)
        if (
            "merge_filter" not in g
        ):  # the official filter mixes the ranks of different heads and is not implemented
            for got, want in zip(
                merged((keys, g["v"][h]), keep, "pivotal"),
                (g["k_out"][h], g["v_out"][h]),
                strict=True,
            ):
                exact = "hh_recent" not in g  # otherwise official outputs went through bfloat16
                torch.testing.assert_close(
                    got, want.float(), rtol=1e-4 if exact else 1e-2, atol=1e-5 if exact else 1e-2
                )
        elif "official_bug" not in path.stem:
            weighted_filtered(g, h, keys, keep, source, target, cosine)


def weighted_filtered(g, h, keys, keep, source, target, cosine):
    """The official weighted merge is ours on the entries its filter lets through."""
    part = g["merge_filter"].bool()
    for x, want in ((keys, g["k_out"][h]), (g["v"][h], g["v_out"][h])):
        total, count = x.clone(), torch.ones(len(x))
        total.index_add_(0, target[part], cosine[part, None] * x[source[part]])
        count.index_add_(0, target[part], torch.ones(int(part.sum())))
        torch.testing.assert_close((total / count[:, None])[keep], want, rtol=1e-4, atol=1e-4)


def test_look_m_selection():
    g = load(ROOT / "lookm" / "effivlm_l200_b10_text_only_kept.safetensors")
    heavy, recent = g["hh_recent"].tolist()
    image = torch.full((200,), -1)
    image[10:160] = 0
    method = LookM(window=(recent + 0.5) / (heavy + recent))
    got = kept(method, 200, heavy + recent, q=g["q"], k=g["k"], v=g["v"], image=image)[0]
    assert torch.equal(places(got.keep), g["kept_sorted"])
    torch.testing.assert_close(statistics.fold(sums(g), 2), g["importance"], rtol=1e-4, atol=1e-4)


def test_vl_cache_budgets():
    g = load(ROOT / "vlcache" / "budgets_28layers_l1000.safetensors")
    for sparsity, (alpha, own_window), budget, count in zip(
        g["sparsity"], g["settings"].tolist(), g["budget"], g["n_kept"], strict=True
    ):
        density, share = (1 - sparsity).tolist(), alpha / 1000
        rest, low = (share, 0.01) if own_window else (0.9 * share, 0.009)
        torch.testing.assert_close(
            torch.tensor(density_shares(density, rest, low)), budget.float(), rtol=1e-4, atol=1e-6
        )
        if not own_window:
            got = torch.tensor(Density(0.1, renormalise=False)([1000] * 28, share, density))
            sharp = (
                (budget * 1000).frac() - 0.5
            ).abs() < 0.499  # the official truncation of 44.99999 to 44 is not reproduced
            assert torch.equal(got[sharp], count[sharp]) and int((got - count).abs().max()) <= 1
            assert sum(Density(0.1)([1000] * 28, share, density)) == 28 * int(share * 1000 + 1e-9)


def test_vl_cache_scores():
    g = load(ROOT / "vlcache" / "l110_6layers_uniform_b10.safetensors")
    for layer, attention in enumerate(g["attn"]):
        full = torch.zeros(4, 110, 110)
        full[:, -6:] = attention
        image = torch.full((110,), -1)
        image[3:104] = 0
        cache, _ = layer_cache(VLCache(), 110, attention=full, image=image)
        assert float(VLCache().statistic(cache)) == pytest.approx(
            1 - float(g["sparsity"][layer]), abs=1e-5
        )
        count = int(g["n_kept"][layer])
        scores = VLCache().score(cache, 11)
        got = top_k_mask(scores, count)
        assert torch.equal(places(got), g["kept"][layer][:, :count])


@pytest.mark.parametrize("path", cases("adakv"))
def test_adakv(path):
    """Scores and order are the official ones; counts differ where the official code rounds each head, at most by one."""
    g = load(path)
    p = g["params"]
    w, cap = p["window"], p["base_capacity_incl_window"]
    rows = torch.arange(p["L"] - w, p["L"])
    fold = p["gqa_func"] or "mean"
    seen = statistics.fold(
        statistics.row_sums(g["q"][:, rows], g["k"], rows, 8**-0.5) / w, p["KV"], fold
    )
    pooled = statistics.pool(seen[:, :-w], p["kernel_size"])
    torch.testing.assert_close(pooled, g["pooled"], rtol=1e-4, atol=1e-6)
    none, base = torch.zeros_like(pooled, dtype=torch.bool), torch.tensor(cap - w)
    counts = head_counts(pooled, none, base, p["floor_alpha"], p["normalize"]).tolist()
    assert sum(counts) == p["KV"] * (cap - w)
    official = g["head_capacity"].tolist()
    assert all(abs(a - b) <= 1 for a, b in zip(counts, official, strict=True))
    ends = g["head_lens"].cumsum(0).tolist()
    for h, end in enumerate(ends):
        want = g["kept_sorted"][end - int(g["head_lens"][h]) : end]
        assert torch.equal(
            window_and_top(pooled_with_window(pooled, w)[h : h + 1], official[h] + w, w)
            .keep[0]
            .nonzero()[:, 0],
            want,
        )
    method = AdaKV(floor=p["floor_alpha"], normalize=p["normalize"])
    keep = method.choose(layer_cache(method, p["L"])[0], pooled_with_window(pooled, w), cap).keep
    assert keep.sum(1).tolist() == [c + w for c in counts]


def pooled_with_window(pooled, w):
    return torch.cat([pooled, torch.full((len(pooled), w), torch.inf)], 1)


@pytest.mark.parametrize("path", [*cases("tova"), *cases("kvpress", "tova")])
def test_tova(path):
    g = load(path)
    last, length = g["attn_last"], g["attn_last"].shape[1]
    attention = torch.zeros(len(last), length, length)
    attention[:, -1] = last
    k = g["kept_sorted"].shape[-1]
    cache, _ = layer_cache(Tova(), length, heads=len(last), attention=attention)
    scores = Tova().score(cache, k).clone()
    want = g["kept_sorted"] if g["kept_sorted"].ndim == 2 else g["kept_sorted"].expand(2, -1)
    if "k" in g:
        scores[:, -1] = torch.inf  # this port forces the last token
    assert torch.equal(places(Tova().choose(cache, scores, k).keep), want)


def test_knorm():
    g = load(ROOT / "kvpress" / "knorm_edge_l40_keep1.safetensors")
    cache, _ = layer_cache(Knorm(), 40, k=g["k"])
    torch.testing.assert_close(Knorm().score(cache, 1), g["score"], rtol=1e-4, atol=1e-5)
    assert torch.equal(
        places(Knorm().choose(cache, Knorm().score(cache, 1), 1).keep), g["kept_sorted"]
    )
    g = load(ROOT / "kvpress" / "adakv_knorm_l240.safetensors")
    cache, _ = layer_cache(Knorm(), 240, k=g["k"], heads=4, groups=4)
    torch.testing.assert_close(Knorm().score(cache, 1), g["score"], rtol=1e-4, atol=1e-5)


def test_observed_attention_sums():
    """The port divides column sums by the rows that see a column and averages over the group."""
    g = load(ROOT / "kvpress" / "observed_attention_l110.safetensors")
    column = g["attn_full"].sum(1)
    seen = torch.arange(110, 0, -1)
    torch.testing.assert_close(statistics.fold(column / seen, 1), g["score"], rtol=1e-4, atol=1e-5)


def test_expected_attention():
    g = load(ROOT / "kvpress" / "expected_attention_l300.safetensors")
    p = g["params"]
    d, length = p["d"], p["L"]
    frequencies = p["rope_theta"] ** (-torch.arange(0, d, 2).float() / d)
    angle = torch.arange(length)[:, None] * frequencies
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    q = statistics.rotate(g["q_pre"], cos, sin)
    future = statistics.future_queries(
        q, cos, sin, frequencies, length, p["n_sink"], p["n_future_positions"]
    )
    method = ExpectedAttention()
    cache, _ = layer_cache(method, length, k=g["k"], v=g["v"])
    cache = replace(cache, source=lambda signal: future)
    scores = method.score(cache, p["kept"])
    torch.testing.assert_close(scores[:, 4:], g["score"][:, 4:], rtol=2e-4, atol=1e-6)
    assert torch.equal(places(method.choose(cache, scores, p["kept"]).keep), g["kept_sorted"])
