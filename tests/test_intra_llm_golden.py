"""Intra-LLM methods against outputs of the official codes: indices exactly, clusters to rounding."""

import json
from pathlib import Path

import pytest
import torch
from layer_contexts import layer_tokens
from safetensors import safe_open

from effivlm.calibration import withdrawal_divergence, withdrawal_layer
from effivlm.methods.intra_llm.adaptinfer import AdaptInfer
from effivlm.methods.intra_llm.dart import DART, least_similar
from effivlm.methods.intra_llm.fastv import FastV
from effivlm.methods.intra_llm.fitprune import FitPrune
from effivlm.methods.intra_llm.pyramiddrop import PyramidDrop
from effivlm.methods.intra_llm.sparsevlm import SparseVLM, kept_of, raters
from effivlm.methods.signals import HeadMaxSums, Keys, LastRow, MutualTextSums, NormedHidden
from effivlm.ops import merge, statistics
from effivlm.ops.recycle import cluster_means
from effivlm.ops.select import others, ranked

torch.set_num_threads(1)
ROOT = Path(__file__).parent / "golden"


def cases(method):
    return pytest.mark.parametrize(
        "case", sorted(p.stem for p in (ROOT / method).glob("*.safetensors"))
    )


def read(method, case):
    with safe_open(ROOT / method / f"{case}.safetensors", "pt") as f:
        return json.loads(f.metadata()["params"]), {k: f.get_tensor(k) for k in f.keys()}


@cases("fastv")
def test_fastv(case):
    p, t = read("fastv", case)
    tokens = layer_tokens(
        FastV(), n=p["n"], before=p["S"], after=p["T"], values={LastRow(): t["last_row"]}
    )
    got = FastV().select_layer(tokens, len(t["kept_sorted"]))
    assert got.keep.tolist() == t["kept_sorted"].tolist()


@cases("sparsevlm")
def test_sparsevlm(case):
    """Stage by stage: raters, kept tokens, cluster means; the next stage sees what the official code hands on."""
    p, t = read("sparsevlm", case)
    s, n, text = p["S"], p["n"], p["T"]
    embeds = t["embeds"]
    assert raters(embeds[s : s + n], embeds[s + n :]).tolist() == t["raters"].tolist()
    method, notes = SparseVLM(), {"raters": {0: t["raters"].long()}}
    for stage in range(len(p["layers"])):
        attention, out = t[f"s{stage}_attn_text_vis"], t[f"s{stage}_layer_out"]
        now = attention.shape[-1]
        kept = t[f"s{stage}_kept_sorted"].long()
        clusters = t[f"s{stage}_merged"]
        k = len(kept) + len(clusters)
        rows = torch.zeros(*attention.shape[:2], s + now + text)
        rows[..., s : s + now] = attention
        if k == now:  # the runtime does not ask where nothing is dropped
            continue
        tokens = layer_tokens(
            method,
            n=now,
            before=s,
            after=text,
            width=out.shape[1],
            notes=notes,
            rows=rows,
        )
        tokens.hidden[:] = out
        got = method.select_layer(tokens, k)
        assert kept_of(now, k) == len(kept)
        written = got.merged.target.unique()
        assert got.keep[~torch.isin(got.keep, written)].tolist() == kept.tolist()
        result = merge.apply(
            out[s : s + now], (got.merged.target, got.merged.source, got.merged.weight)
        )
        if len(clusters) > 1:
            recycled, centers = t[f"s{stage}_recycled"].long(), t[f"s{stage}_centers"].long()
            torch.testing.assert_close(result[recycled[centers]], clusters, rtol=1e-4, atol=1e-5)
            assert written.tolist() == recycled[centers].sort().values.tolist()
            centre, triple = cluster_means(out[s : s + now], recycled, len(clusters))
            assert centre.tolist() == recycled[centers].tolist()
            assert (
                triple[0].tolist() == recycled[centers][t[f"s{stage}_cluster_of"].long()].tolist()
            )
            score = attention[:, t["raters"].long()].mean((0, 1))
            rest = others(kept, now)
            assert rest[ranked(score[rest])[: len(recycled)]].tolist() == recycled.tolist()


@cases("dart")
def test_dart(case):
    """The pick loop in the official (hash table) order; the method's own order keeps the same count and pivots."""
    p, t = read("dart", case)
    s, n = p["S"], p["n"]
    x, order = t["x"], t["pivot_order"].long()
    kept = t["kept_sorted"].tolist()
    own = t["pivot_vis"].long().sort().values
    assert least_similar(x[s : s + n], x[order], own, len(kept)).tolist() == kept
    values = {Keys(): t["keys"], NormedHidden(): x}
    tokens = layer_tokens(DART(), n=n, before=s, after=len(x) - s - n, values=values)
    got = DART().select_layer(tokens, len(kept)).keep
    assert set(own.tolist()) <= set(got.tolist()) and len(got) == len(kept)
    assert len(set(got.tolist()) & set(kept)) > 0.8 * len(kept)


@cases("pyramiddrop")
def test_pyramiddrop(case):
    """Official projections and re-packed rotary positions make the attention; stages are chained."""
    p, t = read("pyramiddrop", case)
    s, n, heads, d = p["S"], p["n"], p["H"], p["head_dim"]
    x, alive = t["features"][0], torch.arange(n)
    for stage in range(len(p["layer_list"])):
        q, k = (
            rope(project(x, t[f"norm{stage}"], t[f"w{w}{stage}"], heads), d, p["rope_theta"])
            for w in "qk"
        )
        last = torch.tensor([len(x) - 1])
        row = statistics.row_probabilities(q[:, -1:], k, last, d**-0.5)[:, 0]
        tokens = layer_tokens(
            PyramidDrop(), n=len(alive), before=s, after=p["T"], values={LastRow(of="next"): row}
        )
        keep = PyramidDrop().select_layer(tokens, t[f"kept{stage}"].shape[1]).keep
        alive = alive[keep]
        assert alive.tolist() == t[f"kept{stage}"][0].tolist()
        x = torch.cat([x[:s], x[s + keep], x[-p["T"] :]])


def project(x, norm, weight, heads):
    x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * norm
    return (x @ weight.T).view(len(x), heads, -1).transpose(0, 1)


def rope(x, d, theta):
    angle = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    return statistics.rotate(x, *(torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin)))


@cases("fitprune")
def test_fitprune(case):
    p, t = read("fitprune", case)
    s, n = p["system_tokens"], p["n"]
    visual, text = torch.arange(s, s + n), torch.arange(s + n, s + n + p["T"])
    values = {
        HeadMaxSums(rows=name): statistics.head_max_sums(
            t["q"][:, rows], t["k"], rows, t["q"].shape[-1] ** -0.5
        )
        for name, rows in (("text", text), ("visual", visual))
    }
    torch.testing.assert_close(
        values[HeadMaxSums(rows="text")][visual], t["cross"], rtol=1e-4, atol=1e-7
    )
    tokens = layer_tokens(FitPrune(), n=n, before=s, after=p["T"], values=values)
    assert (
        FitPrune().select_layer(tokens, n - p["delete_count"]).keep.tolist()
        == t["kept_sorted"].tolist()
    )


@cases("adaptinfer")
def test_adaptinfer(case):
    p, t = read("adaptinfer", case)
    rows = torch.zeros(p["H"], p["T"], p["S"] + p["n"] + p["T"])
    rows[..., p["S"] : p["S"] + p["n"]], rows[..., p["S"] + p["n"] :] = (
        t["attn_text_vis"],
        t["attn_text_text"],
    )
    tokens = layer_tokens(AdaptInfer(), n=p["n"], before=p["S"], after=p["T"], rows=rows)
    score = tokens[MutualTextSums()].sum(0)[tokens.visual]
    torch.testing.assert_close(score, t["score"], rtol=1e-4, atol=1e-6)
    assert (
        AdaptInfer().select_layer(tokens, len(t["kept_sorted"])).keep.tolist()
        == t["kept_sorted"].tolist()
    )


@cases("vtw")
def test_vtw_search(case):
    p, t = read("vtw", case)
    samples = [
        (full, list(rows))
        for full, rows in zip(t["logits_full"], t["logits_withdrawn"], strict=True)
    ]
    for i, (full, rows) in enumerate(samples):
        torch.testing.assert_close(
            torch.tensor([withdrawal_divergence(full, r) for r in rows]),
            t["kl"][i],
            rtol=1e-3,
            atol=1e-6,
        )
    layers = range(p["first_layer"], p["L"])
    found = withdrawal_layer(
        ((full, dict(zip(layers, rows, strict=True))) for full, rows in samples), eta=p["eta"]
    )
    assert found.layer == int(t["k_star"])
