"""Hand-made caches for method tests: random queries and keys, signals from the dense float64 L x L attention."""

import torch

from effivlm.methods.base import LayerCache
from effivlm.methods.signals import (
    ColumnSums,
    FutureQueries,
    LastRow,
    PostVisionRows,
    ThresholdCounts,
    ValueOutputNorms,
    WindowRows,
)


def dense(q, k, scaling=None, mask=None, positions=None):
    """[H, R, L] float64 attention; ``mask`` [R, L] bool, causal by default."""
    k = k.double().repeat_interleave(len(q) // len(k), 0)
    logits = q.double() @ k.transpose(1, 2) * (scaling or q.shape[-1] ** -0.5)
    if mask is None:
        positions = torch.arange(q.shape[1]) if positions is None else positions
        mask = torch.arange(k.shape[1]) <= positions[:, None]
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


def spans(length, images=((5, 30), (33, 60))):
    """[L] image number of every entry, -1 for text; spans are cut to fit."""
    image = torch.full((length,), -1)
    for number, (a, b) in enumerate(images):
        image[a : min(b, length - 1)] = number
    return image


def after_vision(image):
    seen, length = (image >= 0).nonzero(), len(image)
    start = int(seen[-1]) + 1 if len(seen) and int(seen[-1]) + 1 < length else max(0, length - 32)
    return slice(start, length)


def threshold(attention, rows, p):
    """[H] share of causal entries of ``rows`` below ``p`` times their row's largest."""
    part = attention[:, rows]
    seen = torch.arange(part.shape[2]) <= torch.arange(attention.shape[2])[rows][:, None]
    return ((part < p * part.amax(-1, keepdim=True)) & seen).sum((1, 2)).float() / seen.sum()


def future(q, sinks):
    x = q.double()[:, min(sinks, q.shape[1] - 1) :]
    centred = x - x.mean(1, keepdim=True)
    return torch.cat(
        [centred.transpose(1, 2) @ centred / x.shape[1], x.mean(1)[..., None]], -1
    ).float()


def layer_cache(
    method,
    length=80,
    heads=4,
    groups=2,
    d=8,
    seed=0,
    image=None,
    layer=3,
    layers=8,
    q=None,
    k=None,
    v=None,
    dtype=torch.float32,
    attention=None,
):
    """A `LayerCache` for one method, and the dense attention [H, L, L] behind its signals."""
    g = torch.Generator().manual_seed(seed)
    q = 1.5 * torch.randn(heads, length, d, generator=g) if q is None else q
    k = torch.randn(groups, length, d, generator=g).to(dtype) if k is None else k
    v = torch.randn(*k.shape, generator=g).to(dtype) if v is None else v
    image = spans(length) if image is None else image
    attention = dense(q, k) if attention is None else attention
    rows = after_vision(image)
    read = {
        ColumnSums: lambda s: attention.sum(1),
        WindowRows: lambda s: attention[:, -s.size :].sum(1),
        LastRow: lambda s: attention[:, -1],
        PostVisionRows: lambda s: attention[:, rows].sum(1),
        ThresholdCounts: lambda s: threshold(attention, rows, s.p),
        ValueOutputNorms: lambda s: v.double().abs().sum(-1) * 3,
        FutureQueries: lambda s: future(q, s.sinks),
    }
    cache = LayerCache(
        lambda s: read[type(s)](s).float(),
        method.signals,
        11 + layer,
        {},
        k,
        v,
        image,
        torch.arange(length),
        layer,
        layers,
    )
    return cache, attention


def kept(method, length, count, **kwargs):
    """Scores, then entries, of one layer: the `Entries` and the dense attention."""
    cache, attention = layer_cache(method, length, **kwargs)
    return method.choose(cache, method.score(cache, count), count), attention
