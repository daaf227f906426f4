"""Hand-made `LayerTokens`: random features, attention computed densely from random queries and keys."""

import torch
from method_contexts import features

from effivlm.methods.base import LayerTokens
from effivlm.methods.signals import (
    ColumnSums,
    HeadMaxSums,
    InputEmbeds,
    Keys,
    LastRow,
    NormedHidden,
    TextRows,
)


def attention(heads, length, d=8, seed=0):
    """[H, L, L] causal attention and its keys [H, L, d]."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(heads, length, d, generator=g), torch.randn(heads, length, d, generator=g)
    logits = (q @ k.transpose(1, 2)) * 2 * d**-0.5
    return logits.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf).softmax(-1), k


def table(probabilities, keys, x, visual, text):
    """Signal -> tensor for one dense attention [H, M, M]."""
    top = probabilities.amax(0)
    return {
        LastRow(): probabilities[:, -1],
        LastRow(of="next"): probabilities[:, -1],
        TextRows(): probabilities[:, text],
        ColumnSums(): probabilities.sum(1),
        HeadMaxSums(rows="text"): top[text].sum(0),
        HeadMaxSums(rows="visual"): top[visual].sum(0),
        Keys(): keys,
        NormedHidden(): x / x.float().norm(dim=-1, keepdim=True).clamp(min=1e-6).to(x.dtype),
        InputEmbeds(): x,
    }


def layer_tokens(
    method,
    kind="random",
    n=40,
    before=5,
    after=6,
    width=16,
    heads=4,
    seed=0,
    dtype=torch.float32,
    values=None,
    notes=None,
    layer=3,
):
    """One image of ``n`` tokens between ``before`` and ``after`` text tokens; features of ``kind``; ``values`` override signals."""
    total = before + n + after
    visual = torch.arange(before, before + n)
    text = torch.arange(before + n, total) if after else torch.tensor([total - 1])
    x = torch.cat(
        [
            features("random", before, width, seed + 3),
            features(kind, n, width, seed),
            features("random", after, width, seed + 4),
        ]
    ).to(dtype)
    probabilities, keys = attention(heads, total, seed=seed)
    if kind in (
        "duplicated",
        "constant",
    ):  # tokens of equal features receive equal attention, exactly
        groups = torch.arange(n) % 7 if kind == "duplicated" else torch.zeros(n, dtype=torch.long)
        coarse = (
            torch.rand(heads, total, 7, generator=torch.Generator().manual_seed(seed)) * 16
        ).round() / 1024
        probabilities[:, :, visual] = coarse[:, :, groups]
        keys[:, visual] = ((keys[:, visual][:, :7] * 4).round() / 4)[:, groups]
    signals = table(probabilities, keys.to(dtype), x, visual, text) | (values or {})
    return LayerTokens(
        signals.__getitem__,
        method.signals,
        7,
        {} if notes is None else notes,
        x,
        visual,
        text,
        torch.arange(total),
        layer,
        n,
        0,
    )
