"""Hybrid methods against outputs of the official codes, by index."""

import torch
from layer_contexts import layer_tokens
from method_contexts import grid
from test_intra_llm_golden import cases, read

from effivlm.methods.base import BlockTokens
from effivlm.methods.hybrid.must_drop import MustDrop, dual_filter, uniformity, windows
from effivlm.methods.hybrid.vscan import scans
from effivlm.ops import merge
from effivlm.ops.cluster import nearest_kept
from effivlm.ops.select import ranked

torch.set_num_threads(1)


@cases("mustdrop_stage1")
def test_mustdrop_windows(case):
    """The windows that merge, and their means; the official order (windows first) is put back for the comparison."""
    p, t = read("mustdrop_stage1", case)
    side, w = p["grid"], p["window"][0]
    x, place = t["x"][1:], grid(p["grid"], p["grid"])
    number = windows(place, w)
    similarity = uniformity(x, number)
    torch.testing.assert_close(similarity, t["window_similarity"].flatten(), rtol=1e-4, atol=1e-5)
    chosen = ranked(similarity)[: len(t["merged_windows"])]
    assert chosen.tolist() == t["merged_windows"].tolist()
    k = len(t["unmerged"]) + len(chosen)
    tokens = BlockTokens(
        str, frozenset(), 7, {}, x, x, torch.ones(side * side), torch.ones(side * side), place, 1
    )
    got = MustDrop(window=w).reduce_block(tokens, k)
    written = got.merged.target.unique()
    assert got.keep[~torch.isin(got.keep, written)].tolist() == t["unmerged"].tolist()
    rows = merge.apply(x, (got.merged.target, got.merged.source, got.merged.weight))
    middles = torch.stack([(number == c).nonzero()[w * w // 2, 0] for c in chosen])
    assert middles.sort().values.tolist() == written.tolist()
    torch.testing.assert_close(
        rows[middles], t["output"][1 : 1 + len(chosen)], rtol=1e-4, atol=1e-5
    )


@cases("mustdrop_stage2")
def test_mustdrop_filter(case):
    """The budgeted ranking, asked for as many as the official thresholds keep, keeps the same."""
    p, t = read("mustdrop_stage2", case)
    attention = t["attn"].mean(0)
    torch.testing.assert_close(attention.sum(0), t["global_score"], rtol=1e-4, atol=1e-6)
    protected = torch.zeros(p["n"], dtype=torch.bool)
    protected[t["key_set"].long()] = True
    given, thresholds = (
        (attention.sum(0), attention.amax(0), protected),
        (p["global_thr"], p["individual_thr"]),
    )
    keep = dual_filter(*given, torch.rand(p["n"]), p["kept"], *thresholds)
    assert keep.tolist() == t["kept_sorted"].tolist()
    method = MustDrop(global_threshold=p["global_thr"], individual_threshold=p["individual_thr"])
    rows = torch.zeros(*t["attn"].shape[:2], p["S"] + p["n"] + p["T"])
    rows[..., p["S"] : p["S"] + p["n"]] = t["attn"]
    notes = {"saliency": {p["S"] + i: 1.0 for i in t["key_set"].tolist()}}
    tokens = layer_tokens(method, n=p["n"], before=p["S"], after=p["T"], notes=notes, rows=rows)
    assert method.select_layer(tokens, p["kept"]).keep.tolist() == t["kept_sorted"].tolist()
    assert notes["final"][0].tolist() == [p["S"] + i for i in t["kept_sorted"].tolist()]


@cases("vscan_stage1")
def test_vscan(case):
    p, t = read("vscan_stage1", case)
    keep = scans(t["attn_deep"].mean(0), t["attn_l5"].mean(0), grid(24, 24), p["total"], 6)
    assert keep.tolist() == t["kept_sorted"].tolist()
    dropped, heir = nearest_kept(t["y"], keep)
    assert dropped.tolist() == t["dropped_sorted"].tolist()
    assert heir.tolist() == keep[t["assign"].long()].tolist()
    rows = merge.apply(t["y"], merge.mean_into(heir, dropped))
    torch.testing.assert_close(rows[keep], t["output"], rtol=1e-4, atol=1e-5)
