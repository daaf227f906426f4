"""Outputs of the official codes, stored as numbers, against the same step here. Selections exactly, floats to 1e-4."""

import json
from pathlib import Path

import pytest
import torch
from method_contexts import grid
from safetensors import safe_open

from effivlm.methods.base import BlockTokens, ImageTokens
from effivlm.methods.encoder.tome import ToMe
from effivlm.methods.pre_llm import cdpruner, gprune, holov, prumerge, vispruner
from effivlm.methods.pre_llm.divprune import DivPrune
from effivlm.methods.pre_llm.fastervlm import FasterVLM
from effivlm.methods.pre_llm.scope import Scope
from effivlm.methods.pre_llm.visionzip import VisionZip
from effivlm.methods.signals import ClsLogits, EncoderFeatures, EncoderKeys, Saliency
from effivlm.ops import merge, select
from effivlm.ops.cluster import dpc_knn
from effivlm.ops.regions import region_mean, segments

torch.set_num_threads(1)
ROOT = Path(__file__).parent / "golden"


def cases(method):
    return [pytest.param(p, id=p.stem) for p in sorted((ROOT / method).glob("*.safetensors"))]


def load(path):
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        tensors["params"] = json.loads(file.metadata()["params"])
    return {
        k: v.long() if isinstance(v, torch.Tensor) and v.dtype == torch.int32 else v
        for k, v in tensors.items()
    }


def tokens(method, embeds, **values):
    table = {
        Saliency(): values.get("saliency"),
        EncoderKeys(): values.get("keys"),
        EncoderFeatures(): values.get("features"),
        ClsLogits(): values.get("logits"),
        EncoderKeys("last", "concat"): values.get("keys"),
    }
    return ImageTokens(table.__getitem__, method.signals, 0, {}, embeds, grid(len(embeds), 1), 0, 0)


@pytest.mark.parametrize("path", cases("divprune"))
def test_divprune(path):
    g = load(path)
    keep = DivPrune().select_image(tokens(DivPrune(), g["y"]), len(g["kept_sorted"])).keep
    assert torch.equal(keep, g["kept_sorted"])


@pytest.mark.parametrize("path", cases("fastervlm"))
def test_fastervlm(path):
    g = load(path)
    for attention, kept in zip(g["attn"], g["kept_sorted"], strict=True):
        method = FasterVLM()
        got = method.select_image(
            tokens(method, attention.T, saliency=attention.mean(0)), len(kept)
        )
        assert torch.equal(got.keep, kept)


@pytest.mark.parametrize("path", cases("vispruner"))
def test_vispruner(path):
    g = load(path)
    p = g["params"]
    method = vispruner.VisPruner(important_ratio=p["important_ratio"])
    for x, attention, kept, order in zip(
        g["x"], g["attn"], g["kept_sorted"], g["diverse_order"], strict=True
    ):
        got = method.select_image(
            tokens(method, x, saliency=attention.mean(0), features=x), len(kept)
        )
        assert torch.equal(got.keep, kept)
        rest = select.ranked(attention.mean(0))[p["T_imp"] :]
        assert torch.equal(vispruner.thin_out(x, rest, p["T_div"], p["step"]), order)


@pytest.mark.parametrize("path", cases("cdpruner"))
def test_cdpruner(path):
    """The official relevance is that of CLIP with its sign; the selection follows from it."""
    g = load(path)
    for y, image, want, order in zip(
        g["y"], g["image_embeds"], g["relevance"], g["selected_order"], strict=True
    ):
        if len(g["y"]) == 1:
            torch.testing.assert_close(
                cdpruner.relevance(image, -g["text_embeds"]), want, atol=1e-5, rtol=1e-4
            )
        assert torch.equal(select.log_det(y, want, len(order)), order)


@pytest.mark.parametrize("path", cases("holov"))
def test_holov(path):
    """Variant official keeps the official tokens, and fills the rows that are zero there."""
    g = load(path)
    p = g["params"]
    want = g["output_index"][g["output_index"] >= 0]
    method = holov.HoloV(num_patches=p["num_patches"], alpha=p["alpha"], variant="official")
    keep = method.select_image(
        tokens(method, g["y"], saliency=g["attn"]), len(g["output_index"])
    ).keep
    region = segments(len(g["attn"]), p["num_patches"])
    mean, _ = region_mean(g["attn"], region)
    torch.testing.assert_close((mean / mean.sum()).float(), g["chunk_weight"], atol=1e-5, rtol=1e-4)
    assert torch.equal(holov.official_quota(mean, len(g["output_index"])), g["allocated"])
    assert len(keep) == len(g["output_index"]) and bool(torch.isin(want, keep).all())


@pytest.mark.parametrize("path", cases("scope"))
def test_scope(path):
    g = load(path)
    for hidden, attention, order in zip(g["hidden"], g["attn"], g["selected_order"], strict=True):
        weight = attention.sum(0)[1:] ** g["params"]["ALPHA"]
        assert torch.equal(select.coverage(hidden[1:], weight, len(order)), order)
        method = Scope(alpha=g["params"]["ALPHA"])
        got = method.select_image(
            tokens(method, hidden[1:], saliency=attention.mean(0)[1:], features=hidden[1:]),
            len(order),
        )
        assert torch.equal(got.keep, order.sort().values)


@pytest.mark.parametrize("path", cases("gprune"))
def test_gprune(path):
    g = load(path)
    for unit, kept, score in (("y", "kept_sorted1", "score1"), ("y2", "kept_sorted2", "score2")):
        method = gprune.GPrune()
        torch.testing.assert_close(
            gprune.walk(g[unit], 0.5, 0.03, 5), g[score], atol=1e-5, rtol=1e-4
        )
        assert torch.equal(method.select_image(tokens(method, g[unit]), len(g[kept])).keep, g[kept])


@pytest.mark.parametrize("path", cases("visionzip"))
def test_visionzip(path):
    """Variant official: dominant, targets, assignment and contextual rows; the [CLS] row is not ours."""
    g = load(path)
    saliency, keys, x = g["cls_attn"].mean(0)[1:], g["metric"][1:], g["hidden"][1:]
    dominant, contextual = len(g["dominant_sorted"]), len(g["target_patch"])
    method = VisionZip(ratio=dominant / contextual, variant="official")
    got = method.select_image(
        tokens(method, x, saliency=saliency, keys=keys), dominant + contextual
    )
    assert torch.equal(got.keep, torch.cat([g["dominant_sorted"], g["target_patch"]]).sort().values)
    targets, merged, heir = method.assign(keys, g["dominant_sorted"], contextual)
    assert torch.equal(targets, g["target_patch"]) and torch.equal(merged, g["merged_patch"])
    assert torch.equal(heir, g["target_patch"][g["assign"]])
    rows = merge.apply(x, (got.merged.target, got.merged.source, got.merged.weight))
    want = torch.cat([x[g["dominant_sorted"]], g["contextual"]])
    torch.testing.assert_close(
        rows[torch.cat([g["dominant_sorted"], g["target_patch"]])], want, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("path", [*cases("prumerge"), *cases("prumerge_plus")])
def test_prumerge(path):
    """Outliers, their order, and the official merge of the official tokens (its extra last row is not ours)."""
    g = load(path)
    a, keys, x, kept, top = g["attn"], g["keys"][1:], g["x"], g["kept_order"], int(g["n_top"])
    if g["params"]["adaptive"]:
        flagged = prumerge.outliers(a)
        assert (
            int(len(a) * (flagged / len(a))) == top
        )  # the official product is rounded down and may lose one
    assert torch.equal(select.ranked(a)[:top], kept[:top])
    logits = keys @ g["q_cls"] / keys.shape[1] ** 0.5
    torch.testing.assert_close(logits.softmax(0), a / a.sum(), atol=1e-6, rtol=1e-4)
    # Official quirk of the training variant: tokens kept twice see their own copy, and as many of the first pruned ones vanish.
    twice = len(kept) - len(kept.unique())
    seen = torch.cat([kept, select.others(kept.unique(), len(a))[twice:]])
    rows = merge.apply(
        x[seen], prumerge.attention_sum(a[seen], keys[seen], torch.arange(len(kept)), 32)
    )
    torch.testing.assert_close(rows[: len(kept)], g["output"][:-1], atol=1e-5, rtol=1e-4)
    method = prumerge.PruMerge(variant="official")
    got = method.select_image(tokens(method, x, logits=logits, keys=keys), top)
    assert torch.equal(got.keep, kept[:top].sort().values)


@pytest.mark.parametrize("path", cases("tome"))
def test_tome(path):
    """Every layer of the method, given what the encoder would give it: the same patches merge into the same ones.

    The rows stand in the official layout (unmerged even tokens, then odd tokens), [CLS] first and not shown.
    """
    g = load(path)
    prefix = int(g["params"]["class_token"])
    x, size = g["x"], torch.ones(len(g["x"]))
    for layer, r in enumerate(g["params"]["r"]):
        r = min(r, (len(x) - prefix) // 2)
        keys, place = g[f"metric{layer}"][prefix:], torch.zeros(len(x) - prefix, 2)
        block = BlockTokens(
            str, frozenset(), 0, {}, x[prefix:], keys, keys[:, 0], size[prefix:], place, 1, prefix
        )
        got = ToMe().reduce_block(block, len(keys) - r)
        source, target = 2 * g[f"src{layer}"], 2 * g[f"dst{layer}"] + 1
        assert torch.equal(got.keep + prefix, select.others(source, len(x))[prefix:])
        owner = torch.arange(len(x)).index_put((source,), target)[prefix:] - prefix
        assert torch.equal(got.merged.target[got.merged.source.argsort()], owner)
        rows = x.clone()
        rows[prefix:] = merge.apply(x[prefix:], (owner, torch.arange(len(owner)), _weights(got)))
        size = size.clone().index_add_(0, target, size[source])
        order = torch.cat([2 * g[f"unm{layer}"], torch.arange(1, len(x), 2)])
        x, size = rows[order], size[order]
        torch.testing.assert_close(size, g[f"size{layer + 1}"])
    torch.testing.assert_close(x, g[f"x{layer + 1}"], atol=1e-5, rtol=1e-4)


def _weights(selection):
    """[N] weight of every token in the mean that it joins."""
    return selection.merged.weight[selection.merged.source.argsort()]


@pytest.mark.parametrize("path", cases("dpc_knn"))
def test_dpc_knn(path):
    g = load(path)
    count = g["params"]["cluster_num"]
    got = dpc_knn(g["x"], count, k=count)
    torch.testing.assert_close(
        got.density, g["density"], atol=1e-6, rtol=1e-4
    ) if "density" in g else None
    if "centers" in g:
        torch.testing.assert_close(got.delta, g["delta"], atol=1e-6, rtol=1e-4)
        assert torch.equal(got.centres, g["centers"])
    assert torch.equal(got.assign, g["assign"])
    every = torch.arange(len(g["x"]))
    rows = merge.apply(g["x"], merge.average(got.centres[got.assign], every))
    torch.testing.assert_close(rows[got.centres], g["merged"], atol=1e-5, rtol=1e-4)
