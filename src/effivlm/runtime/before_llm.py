"""Before the LLM: which visual tokens of every image enter it."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effivlm.budget import split
from effivlm.methods.base import EncoderReducer, ImageTokens, PreLLM, Selection
from effivlm.methods.signals import TextEmbeds
from effivlm.runtime.audit import check_selection
from effivlm.runtime.counts import entering
from effivlm.runtime.tokens import Image, Prompt
from effivlm.runtime.vision import Encoded
from effivlm.setting import Part

Notes = dict[
    tuple[str, int], dict[str, Any]
]  # (method, row) -> that method's scratch for that prompt


def before_llm(
    prompt: Prompt, encoded: Encoded | None, parts: Sequence[Part], layers: int, notes: Notes
) -> list[Tensor]:
    """Run the pre-LLM parts over every image; rewrites merged rows of ``prompt.embeds``.

    Returns:
        Per image, the placeholders kept, as ascending offsets into ``image.slots``.
    """
    kept = []
    survivors = _survivors(prompt, encoded)
    for image, offsets in zip(prompt.images, survivors, strict=True):
        for part in parts:
            offsets = _reduce_image(prompt, encoded, image, offsets, part, layers, notes)
        kept.append(offsets)
    return kept


def _survivors(prompt: Prompt, encoded: Encoded | None) -> list[Tensor]:
    """Offsets of every image that the encoder left in play."""
    full = [torch.arange(len(i.slots), device=i.slots.device) for i in prompt.images]
    if encoded is None or encoded.kept is None or not full:
        return full
    flags = {id(p): kept for p, kept in zip(encoded.pieces, encoded.kept, strict=True)}
    out = []
    for image, offsets in zip(prompt.images, full, strict=True):  # of every beam
        alive = torch.cat([flags[id(p)] for p in image.pieces]).to(offsets.device)
        if image.last and not bool(alive[-1]):  # the row that predicts must exist
            alive = alive.clone()
            alive[offsets[alive][-1]], alive[-1] = False, True
        out.append(offsets[alive])
    return out


def _reduce_image(
    prompt: Prompt,
    encoded: Encoded | None,
    image: Image,
    offsets: Tensor,
    part: Part,
    layers: int,
    notes: Notes,
) -> Tensor:
    method = part.method
    assert isinstance(method, PreLLM)
    n = len(offsets)
    image.entered[method.name] = len(image.slots) if part.at(EncoderReducer) else n
    k = entering(part, PreLLM, layers, n)
    if k >= n and not method.observes:
        return offsets
    pinned = offsets[n - 1 :] if image.last else offsets[:0]  # the row that predicts stays
    free = offsets[: n - len(pinned)]
    content = free[~image.newline[free]]
    units = [content[image.unit[content] == u] for u in image.unit[content].unique().tolist()]
    contexts = [
        _image_tokens(prompt, encoded, image, where, u, part, notes)
        for u, where in enumerate(units)
    ]
    if method.observes:
        for tokens in contexts:
            method.observe_image(tokens)
    if k >= n:
        return offsets
    k -= len(pinned)
    shares = split(min(k, len(content)), [len(u) for u in units], [len(u) for u in units])
    chosen = []
    for where, tokens, share in zip(units, contexts, shares, strict=True):
        if share in (0, len(where)):
            chosen.append(where[:share])
            continue
        where_asked = (method, share, image.row, image.number, tokens.unit)
        ask = functools.partial(method.select_image, tokens, share)
        selection = prompt.decisions.of(where_asked, ask)
        check_selection(method, selection.keep, selection.merged, share, len(where))
        _merge_before_llm(prompt, image, where, selection)
        chosen.append(where[selection.keep.to(where.device)])
    newlines = free[image.newline[free]][: max(0, k - len(content))]  # once all content is kept
    return torch.cat([*chosen, newlines, pinned]).sort().values


def _image_tokens(
    prompt: Prompt,
    encoded: Encoded | None,
    image: Image,
    where: Tensor,
    unit: int,
    part: Part,
    notes: Notes,
) -> ImageTokens:
    row, slots = image.row, image.slots[where]

    def source(signal: Any) -> Tensor:
        if isinstance(signal, TextEmbeds):
            said = instruction(prompt.visual[row], prompt.real[row], *prompt.markers)
            return prompt.embeds[row][said]
        if encoded is None or signal not in encoded.values:
            raise RuntimeError(f"{signal!r} was not gathered: encode the images inside the session")
        return encoded.values[signal][image.source[where].to(encoded.values[signal].device)]

    key = hash((prompt.keys[row], image.number, unit))
    return ImageTokens(
        source,
        part.method.signals,
        key,
        notes.setdefault((part.method.name, row), {}),
        prompt.embeds[row, slots],
        image.place[where],
        image.number,
        unit,
        slots,
    )


def instruction(visual: Tensor, real: Tensor, before: int, after: int) -> Tensor:
    """[L] bool: what a prompt says in words: no padding, no placeholders, no markers.

    Found by place, for a prompt may come as embeddings, and not every configuration names them.

    Args:
        visual: [L] bool, placeholders.
        real: [L] bool, False for padding.
        before: markers in front of every run of placeholders.
        after: markers behind it.
    """
    taken = visual.clone()
    for step in range(1, before + 1):
        taken[:-step] |= visual[step:]
    for step in range(1, after + 1):
        taken[step:] |= visual[:-step]
    return real & ~taken


def _merge_before_llm(prompt: Prompt, image: Image, where: Tensor, selection: Selection) -> None:
    if selection.merged is None or not len(selection.merged.target):
        return
    row, slots = image.row, image.slots[where]
    prompt.merge(row, slots, selection.merged)
