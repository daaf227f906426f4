"""Hand-made `LayerTokens`: random features, attention computed densely from random queries and keys."""

import torch
from method_contexts import features

from effivlm.methods.base import LayerTokens
from effivlm.methods.signals import (
    ColumnSums,
    FreedTextSums,
    HeadMaxSums,
    InputEmbeds,
    Keys,
    LastRow,
    MutualTextSums,
    NormedHidden,
    TextPeaks,
    TextRank,
    TextSums,
)
from effivlm.ops.statistics import gravity


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
        ColumnSums(): probabilities.sum(1),
        HeadMaxSums(rows="text"): top[text].sum(0),
        HeadMaxSums(rows="visual"): top[visual].sum(0),
        Keys(): keys,
        NormedHidden(): x / x.float().norm(dim=-1, keepdim=True).clamp(min=1e-6).to(x.dtype),
        InputEmbeds(): x,
    }


class Dense:
    """The source of a context: signals of a table, and those of text rows from dense [H, T, M] ``rows``, the slow twin
    of what the runtime streams."""

    def __init__(self, table, rows, text, visual, width):
        self.table, self.rows, self.text, self.visual, self.width = (
            table,
            rows,
            text,
            visual,
            width,
        )

    def __call__(self, signal):
        if signal in self.table:
            return self.table[signal]
        return self.dense(signal, self.rows.double()).to(self.rows)

    def dense(self, signal, a):
        at = slice(None) if getattr(signal, "rows", None) is None else list(signal.rows)
        if isinstance(signal, TextSums):
            return a[:, at].sum(1)
        if isinstance(signal, TextPeaks):
            return a.mean(0).amax(0)
        if isinstance(signal, TextRank):
            return torch.linalg.matrix_rank(a[:, at][..., self.visual].mean(0))
        if isinstance(signal, FreedTextSums):
            distance = (self.text[at][:, None] - torch.arange(a.shape[-1])).abs()
            return (a[:, at] / gravity(distance, self.width, signal.theta)).sum(1)
        assert isinstance(signal, MutualTextSums), signal
        inside = a[..., self.text]
        weight = inside.sum(1) + inside.sum(2) - inside.diagonal(dim1=1, dim2=2)
        return (weight[..., None] * a).sum(1)


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
    rows=None,
):
    """One image of ``n`` tokens between ``before`` and ``after`` text tokens; features of ``kind``.

    ``values`` override signals, ``rows`` [H, T, M] the attention of the text.
    """
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
    rows = probabilities[:, text] if rows is None else rows
    return LayerTokens(
        Dense(signals, rows, text, visual, keys.shape[-1]),
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
