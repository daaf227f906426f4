"""Hand-made contexts for methods: random features whose signals are computed densely from random queries and keys."""

import torch

from effivlm.methods.base import BlockTokens, ImageTokens
from effivlm.methods.signals import ClsLogits, EncoderFeatures, EncoderKeys, Saliency, TextEmbeds


def grid(rows, columns):
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()


def features(kind, n, width, seed=0):
    """Random, clustered, duplicated or constant rows.

    Duplicated and constant rows have four entries of +-1/2, so that all cosines are exact and ties are real ties.
    """
    g = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randn(n, width, generator=g)
    if kind == "clustered":
        centres = torch.randn(6, width, generator=g)
        return centres[torch.randint(6, (n,), generator=g)] + 0.2 * torch.randn(
            n, width, generator=g
        )
    base = torch.zeros(7, width)
    for row in base:
        row[torch.randperm(width, generator=g)[:4]] = (
            torch.randint(2, (4,), generator=g).float() - 0.5
        )
    return (
        base[torch.randint(7, (n,), generator=g)] if kind == "duplicated" else base[:1].repeat(n, 1)
    )


def coarse(x, steps=64):
    """Values rounded to multiples of 1 / steps, so that equal scores occur and sums are exact."""
    return (x * steps).round() / steps


def signals(n, width, text, seed=0, heads=4, d=8, exact=False):
    """Signal -> tensor, from a dense [CLS] attention over random keys."""
    g = torch.Generator().manual_seed(seed + 1)
    q, k = torch.randn(heads, d, generator=g), torch.randn(heads, n + 1, d, generator=g)
    logits = (k @ q[..., None])[..., 0] * d**-0.5 * 2
    saliency = logits.softmax(-1).mean(0)[1:]
    if exact:
        saliency = coarse(saliency / saliency.max(), 8)
    return {
        Saliency(): saliency,
        EncoderKeys(): k.mean(0)[1:],
        EncoderKeys(at="last", heads="concat"): k.transpose(0, 1).flatten(1)[1:],
        ClsLogits(): (k.transpose(0, 1).flatten(1) @ q.flatten())[1:] * (heads * d) ** -0.5,
        EncoderFeatures(): torch.randn(n, width, generator=g),
        TextEmbeds(): torch.randn(text, width, generator=g),
    }


def image_tokens(
    method,
    kind="random",
    rows=8,
    columns=9,
    width=24,
    seed=0,
    text=5,
    dtype=torch.float32,
    values=None,
    key=7,
):
    """An `ImageTokens` for one method; features and embeddings of ``kind``."""
    n = rows * columns
    table = signals(n, width, text, seed, exact=kind in ("duplicated", "constant"))
    table[EncoderFeatures()] = features(kind, n, width, seed)
    if kind in ("duplicated", "constant"):
        table[EncoderKeys()] = features(kind, n, 16, seed + 2)
        table[EncoderKeys(at="last", heads="concat")] = features(kind, n, 32, seed + 2)
        table[TextEmbeds()] = features("duplicated", text, width, seed + 3)
    table |= values or {}
    table = {
        s: v.to(dtype) if isinstance(s, EncoderFeatures | TextEmbeds) else v
        for s, v in table.items()
    }
    embeds = features(kind, n, width, seed + 5).to(dtype)
    return ImageTokens(
        table.__getitem__, method.signals, key, {}, embeds, grid(rows, columns), 0, 0
    )


def block_tokens(
    kind="random", rows=8, columns=9, width=24, seed=0, block=2, dtype=torch.float32, prefix=0
):
    """A `BlockTokens`: states, keys, attention received and sizes of a block in the middle of the encoder."""
    n = rows * columns
    g = torch.Generator().manual_seed(seed + 11)
    received = torch.rand(n, generator=g)
    sizes = torch.randint(1, 4, (n,), generator=g).float()
    return BlockTokens(
        _nothing,
        frozenset(),
        7,
        {},
        features(kind, n, width, seed).to(dtype),
        features(kind, n, 16, seed + 2).to(dtype),
        received / received.sum(),
        sizes,
        grid(rows, columns),
        block,
        prefix,
    )


def _nothing(signal):
    raise KeyError(signal)
