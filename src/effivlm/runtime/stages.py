"""Applies decisions: what happens to a prompt before the LLM, before a decoder layer, and to a
layer's cache.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effivlm.budget import Budget, BudgetError, split
from effivlm.methods.base import (
    EncoderReducer,
    Entries,
    ImageTokens,
    IntraLLM,
    KVCache,
    LayerCache,
    LayerTokens,
    PreLLM,
    Selection,
)
from effivlm.methods.signals import TextEmbeds
from effivlm.runtime.audit import PlannedCut, Promise, check_entries, check_selection
from effivlm.runtime.cache import SlotLayer, apply_entries
from effivlm.runtime.encoder import Encoded
from effivlm.runtime.signals import LayerSource
from effivlm.runtime.tokens import Image, Prompt, merge_rows
from effivlm.setting import Part, Setting

Notes = dict[
    tuple[str, int], dict[str, Any]
]  # (method, row) -> that method's scratch for that prompt


# ----------------------------------------------------------------------------------- before the LLM
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
    if encoded is None or encoded.kept is None:
        return full
    if not full:
        return full
    flags = {id(p): kept for p, kept in zip(encoded.pieces, encoded.kept, strict=True)}
    alive = [torch.cat([flags[id(p)] for p in i.pieces]) for i in prompt.images]  # of every beam
    return [o[a.to(o.device)] for o, a in zip(full, alive, strict=True)]


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
    k = method.image_budget(layers, n, part.budget)
    content = offsets[~image.newline[offsets]]
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
    shares = split(min(k, len(content)), [len(u) for u in units], [len(u) for u in units])
    chosen = []
    for where, tokens, share in zip(units, contexts, shares, strict=True):
        if share in (0, len(where)):
            chosen.append(where[:share])
            continue
        selection = method.select_image(tokens, share)
        check_selection(method, selection.keep, selection.merged, share, len(where))
        _merge_before_llm(prompt, image, where, selection)
        chosen.append(where[selection.keep.to(where.device)])
    newlines = offsets[image.newline[offsets]][
        : max(0, k - len(content))
    ]  # only once all content is kept
    return torch.cat([*chosen, newlines]).sort().values


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
            return prompt.embeds[row][prompt.real[row] & ~prompt.visual[row]]
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


def _merge_before_llm(prompt: Prompt, image: Image, where: Tensor, selection: Selection) -> None:
    if selection.merged is None or not len(selection.merged.target):
        return
    row, slots = image.row, image.slots[where]
    embeds = prompt.embeds.clone()
    embeds[row] = merge_rows(prompt.embeds[row], slots, selection.merged)
    prompt.embeds = embeds
    if (levels := prompt.side.get("deepstack_visual_embeds")) is not None:
        rank = (prompt.visual.flatten().long().cumsum(0) - 1).view_as(prompt.visual)[row, slots]
        prompt.side["deepstack_visual_embeds"] = [
            merge_rows(f, rank, selection.merged) for f in levels
        ]


# ----------------------------------------------------------------------------------- inside the LLM
def plan_cuts(prompt: Prompt, kept: list[Tensor], parts: Sequence[Part], layers: int) -> Promise:
    """Ask every intra-LLM part for its schedule, image by image.

    Raises:
        BudgetError: if a cut lies outside the model or grows a token count.
    """
    promise = Promise([len(k) for k in kept])
    now = list(promise.before)
    for part in parts:
        assert isinstance(part.method, IntraLLM)
        for number, n in enumerate(list(now)):
            previous = n
            for cut in part.method.schedule(layers, n, _left_over(part, prompt.images[number])):
                if not 0 <= cut.layer < layers or cut.keep > previous or cut.keep < 0:
                    raise BudgetError(
                        f"{part.method.name}: cut {cut} does not fit {layers} layers and {previous}"
                        " tokens in play"
                    )
                promise.cuts.setdefault(cut.layer, []).append(
                    PlannedCut(part.method, number, cut.keep)
                )
                previous = cut.keep
            now[number] = previous
    return promise


def first_cuts(
    prompt: Prompt, kept: list[Tensor], settings: Sequence[Setting], layers: int
) -> frozenset[int]:
    """The layers from which ``settings`` resume; one whose budget this prompt cannot meet is told
    so when it resumes.
    """
    out = set()
    for setting in settings:
        with contextlib.suppress(BudgetError):
            out.add(min(plan_cuts(prompt, kept, setting.stage(IntraLLM), layers).cuts, default=0))
    return frozenset(out)


def _left_over(part: Part, image: Image) -> Budget | None:
    """The budget a schedule is asked to meet: for methods that cut earlier too, in tokens of what
    their first stage was given.
    """
    if part.budget is None or not (part.at(PreLLM) or part.at(EncoderReducer)):
        return part.budget
    n = image.entered.get(part.method.name, len(image.slots))
    return replace(part.budget, share=None, tokens=part.budget.count(n))


def at_layer(
    prompt: Prompt,
    cuts: list[PlannedCut],
    hidden: Tensor,
    layer: int,
    source: Any,
    notes: Notes,
    before: list[int],
) -> tuple[Tensor, Tensor | None]:
    """Apply the cuts of one layer.

    Args:
        prompt: with the tokens in play before this layer.
        cuts: of this layer, in order; counts of methods that are not exact are corrected in place.
        hidden: [B, M, D] input of the layer.
        layer: the layer about to run.
        source: (row, alive, **place) -> LayerSource.
        notes: every method's scratch, filled on the way.
        before: per image, visual tokens that entered the LLM.

    Returns:
        hidden [B, M', D] and the chosen positions [B, M'] among the M, or None where nothing was
        dropped.
    """
    keep = torch.ones_like(prompt.index, dtype=torch.bool)
    merged = hidden
    for number, cut in enumerate(cuts):
        image = prompt.images[cut.image]
        row, alive = image.row, prompt.alive(image.row)
        index = prompt.index[row, alive]
        mine = torch.isin(index, image.slots) & keep[row, alive]
        visual = mine.nonzero()[:, 0]
        # a method with a rule of its own may have kept less at an earlier cut than was promised: it
        # still decides here
        k = cut.keep if cut.method.exact else min(cut.keep, max(1, len(visual) - 1))
        if k >= len(visual):
            continue
        text = (~prompt.visual[row, index] & (index > image.slots[-1])).nonzero()[:, 0]
        text = text if len(text) else torch.tensor([len(index) - 1], device=index.device)
        read: LayerSource = source(
            row, alive, number=image.number, hidden=merged, visual=visual, text=text
        )
        method = cut.method
        assert isinstance(method, IntraLLM)
        tokens = LayerTokens(
            read,
            method.signals,
            hash((prompt.keys[row], image.number, layer)),
            notes.setdefault((method.name, row), {}),
            merged[row, alive],
            visual,
            text,
            index,
            layer,
            before[cut.image],
            image.number,
        )
        selection = method.select_layer(tokens, k)
        check_selection(method, selection.keep, selection.merged, k, len(visual))
        cuts[number] = replace(
            cut, keep=len(selection.keep)
        )  # methods that are not exact may keep fewer than promised
        if selection.merged is not None and len(selection.merged.target):
            merged = merged.clone()
            merged[row] = merge_rows(merged[row], alive[visual], selection.merged)
        gone = torch.ones_like(visual, dtype=torch.bool)
        gone[selection.keep.to(gone.device)] = False
        keep[row, alive[visual[gone]]] = False
    if bool(keep.all()):
        return merged, None
    return (
        merged,
        keep if prompt.valid is None else keep & prompt.valid,
    )  # padding of an earlier cut is not kept


# ---------------------------------------------------------------------------------------- the cache
@dataclass
class Scored:
    """One cache method's reading of one layer: per row, scores [KV, M], a statistic, and the
    layer's own budget.
    """

    scores: list[Tensor]
    statistics: list[float]
    budgets: list[int]


def layer_caches(
    prompt: Prompt,
    layer: SlotLayer,
    number: int,
    layers: int,
    part: Part,
    notes: Notes,
    source: Any = None,
) -> list[LayerCache]:
    """One context per row; padding of either kind is left out."""
    method, out = part.method, []
    index, valid = prompt.kept[number]
    for row in range(len(index)):
        alive = alive_slots(prompt, index, valid, row)
        keys, values = (_pick(x[row], alive) for x in layer.stored())
        where = index[row, alive]
        image = torch.full_like(where, -1)
        for picture in prompt.images:
            if picture.row == row:
                image[torch.isin(where, picture.slots)] = picture.number
        read = source(row, alive, image) if source is not None else _no_signals
        out.append(
            LayerCache(
                read,
                method.signals,
                hash((prompt.keys[row], number)),
                notes.setdefault((method.name, row), {}),
                keys,
                values,
                image,
                where,
                number,
                layers,
            )
        )
    return out


def needs_all_layers(part: Part) -> bool:
    """Whether a cache method must see every layer before it can compress the first."""
    allocator = part.method.allocator if isinstance(part.method, KVCache) else None
    return allocator is not None and allocator.needs_statistics


def score_layer(part: Part, caches: list[LayerCache]) -> Scored:
    """Ask a cache method for its scores while the layer's queries are at hand."""
    method = part.method
    assert isinstance(method, KVCache)
    budgets = [method.layer_budget(c, part.budget) for c in caches]
    needs = needs_all_layers(part)
    return Scored(
        [method.score(c, k) for c, k in zip(caches, budgets, strict=True)],
        [method.statistic(c) if needs else 0.0 for c in caches],
        budgets,
    )


def allocate(part: Part, scored: list[Scored], lengths: list[list[int]]) -> list[list[int]]:
    """Entries per KV head: [layers][rows], from the method's allocator or its own layer budgets."""
    method = part.method
    assert isinstance(method, KVCache)
    if method.allocator is None:
        return [s.budgets for s in scored]
    columns = []
    for row in range(len(lengths[0])):
        held = [layer[row] for layer in lengths]
        share = part.budget.as_share(held[0]) if part.budget is not None else None
        statistics = (
            [s.statistics[row] for s in scored] if method.allocator.needs_statistics else None
        )
        columns.append(method.allocator(held, share, statistics))
    return [list(layer) for layer in zip(*columns, strict=True)]


def compress_layer(
    prompt: Prompt,
    layer: SlotLayer,
    number: int,
    part: Part,
    caches: list[LayerCache],
    scored: Scored,
    budgets: list[int],
) -> None:
    """Choose entries and narrow the layer to them; a layer whose rows all keep everything is left
    alone.
    """
    method = part.method
    assert isinstance(method, KVCache)
    chosen = []
    for cache, scores, k in zip(caches, scored.scores, budgets, strict=True):
        heads, length = cache.keys.shape[:2]
        if k >= length:
            chosen.append(
                Entries(torch.ones(heads, length, dtype=torch.bool, device=cache.keys.device))
            )
            continue
        entries = method.choose(cache, scores, k)
        check_entries(method, entries, k, length, heads)
        chosen.append(entries)
    if all(bool(e.keep.all()) for e in chosen):
        return
    index, valid = prompt.kept[number]
    apply_entries(
        layer, [alive_slots(prompt, index, valid, row) for row in range(len(index))], chosen
    )


def alive_slots(prompt: Prompt, index: Tensor, valid: Tensor | None, row: int) -> Tensor:
    """[M] long: slots of a row that are neither batch padding nor budget padding."""
    ok = prompt.real[row].gather(0, index[row])
    return (ok if valid is None else ok & valid[row]).nonzero()[:, 0]


def _pick(x: Tensor, slots: Tensor) -> Tensor:
    """X [KV, S, d] at slots; a view where nothing is left out or only a prefix is."""
    if len(slots) and int(slots[-1]) - int(slots[0]) + 1 == len(slots):
        return x[:, int(slots[0]) : int(slots[-1]) + 1]
    return x[:, slots]


def _no_signals(signal: Any) -> Tensor:
    raise RuntimeError(f"{signal!r} was read while choosing entries: read signals in `score`")
