"""Inside the LLM: which visual tokens every cut leaves in play."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effivlm.budget import Budget, BudgetError
from effivlm.methods.base import EncoderReducer, IntraLLM, LayerTokens, PreLLM
from effivlm.runtime.audit import check_selection
from effivlm.runtime.before_llm import Notes
from effivlm.runtime.counts import in_layers
from effivlm.runtime.merges import Merged
from effivlm.runtime.promise import PlannedCut, Promise
from effivlm.runtime.rows import Row
from effivlm.runtime.signals import LayerSource
from effivlm.runtime.tokens import Image, Prompt, merge_rows
from effivlm.setting import Part, Setting


def plan_cuts(prompt: Prompt, kept: list[Tensor], parts: Sequence[Part], layers: int) -> Promise:
    """Ask every intra-LLM part for its counts, image by image.

    Raises:
        BudgetError: if they are not one a layer, or grow.
    """
    promise = Promise([len(k) for k in kept])
    now = list(promise.before)
    for part in parts:
        assert isinstance(part.method, IntraLLM)
        for number, n in enumerate(list(now)):
            image = prompt.images[number]
            previous = n
            for layer, count in enumerate(in_layers(part, layers, n, _left_over(part, image))):
                if count == previous:
                    continue
                keep = max(count, int(image.last))  # the row that predicts stays
                promise.cuts.setdefault(layer, []).append(PlannedCut(part.method, number, keep))
                previous = count
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


@dataclass(frozen=True)
class Place:
    """Where a cut happens: before decoder layer ``layer``.

    Attributes:
        prompt: with the tokens in play before this layer.
        before: per image, visual tokens that entered the LLM.
        source: (row, tokens of that row, **place) -> LayerSource.
        notes: every method's scratch, filled on the way.
    """

    prompt: Prompt
    layer: int
    before: list[int]
    source: Any
    notes: Notes


def cut_layer(place: Place, cuts: list[PlannedCut], hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Apply the cuts of one layer.

    Args:
        place: the prompt before the layer.
        cuts: of this layer, in order; counts of methods that are not exact are corrected in place.
        hidden: [B, M, D] input of the layer.

    Returns:
        hidden [B, M, D] with merges written, and [B, M] bool of what stays, or None where nothing
        is dropped.
    """
    prompt = place.prompt
    keep = torch.ones_like(prompt.index, dtype=torch.bool)
    for number, cut in enumerate(cuts):
        image = prompt.images[cut.image]
        row, held = image.row, prompt.row(image.row)
        alive, index = held.slots, held.index
        mine = torch.isin(index, image.slots) & keep[row, alive]
        pinned = mine & (index == image.slots[-1]) if image.last else None  # it predicts
        visual = (mine if pinned is None else mine & ~pinned).nonzero()[:, 0]
        k = cut.keep - int(image.last)
        # a method with a rule of its own may have kept less at an earlier cut than was promised: it
        # still decides here
        k = k if cut.method.exact else min(k, max(1, len(visual) - 1))
        if k >= len(visual):
            continue
        tokens = _layer_tokens(place, cut, held, visual, hidden)
        assert isinstance(cut.method, IntraLLM)
        where = (cut.method, k, row, image.number, "layer", place.layer)
        ask = functools.partial(cut.method.select_layer, tokens, k)
        selection = prompt.decisions.of(where, ask)
        check_selection(cut.method, selection.keep, selection.merged, k, len(visual))
        cuts[number] = replace(cut, keep=len(selection.keep) + int(image.last))
        if selection.merged is not None and len(selection.merged.target):
            hidden = hidden.clone()
            hidden[row] = merge_rows(hidden[row], alive[visual], selection.merged)
            at = visual[selection.merged.target.to(visual.device)]
            prompt.written.append((place.layer, row, index[at], hidden[row, alive[at]]))
            prompt.merges.append(Merged.at(place.layer, row, index[visual], selection.merged))
        gone = torch.ones_like(visual, dtype=torch.bool)
        gone[selection.keep.to(gone.device)] = False
        keep[row, alive[visual[gone]]] = False
    if bool(keep.all()):
        return hidden, None
    return hidden, keep if prompt.valid is None else keep & prompt.valid  # nor earlier padding


def _layer_tokens(
    place: Place, cut: PlannedCut, held: Row, visual: Tensor, hidden: Tensor
) -> LayerTokens:
    prompt, method, image = place.prompt, cut.method, place.prompt.images[cut.image]
    row, index = image.row, held.index
    text = (~prompt.visual[row, index] & (index > image.slots[-1])).nonzero()[:, 0]
    text = text if len(text) else torch.tensor([len(index) - 1], device=index.device)
    read: LayerSource = place.source(
        row, held, number=image.number, hidden=hidden, visual=visual, text=text
    )
    return LayerTokens(
        read,
        method.signals,
        hash((prompt.keys[row], image.number, place.layer)),
        place.notes.setdefault((method.name, row), {}),
        held.pick(hidden[row]),
        visual,
        text,
        index,
        place.layer,
        place.before[cut.image],
        image.number,
    )
