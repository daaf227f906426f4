"""The stages of a run as functions: encode, prefill, compress, decode. Sharing (`plan`) and
measuring stand on them.

They drive the same hooks as the context manager: a session must be open around them.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effivlm.methods.base import IntraLLM
from effivlm.runtime.attach import Session
from effivlm.runtime.audit import Account, audit_prompt
from effivlm.runtime.cache import CACHE, SlotLayer, fork, stack
from effivlm.runtime.encoder import Encoded, call_of
from effivlm.runtime.stages import plan_cuts
from effivlm.runtime.state import State, side_rows
from effivlm.runtime.tokens import Prompt
from effivlm.setting import Part, Setting


@dataclass
class Prefilled:
    """A prompt after prefill.

    Attributes:
        logits: [B, V] of the last prompt token. cache: one slot layer per decoder layer.
        position: [B, 1] or [axes, B, 1] of the first generated token. real: [B, L] bool, False for
            batch padding.
        state: what the prefill left for forks and resumption. accounts: cost per row.
    """

    logits: Tensor
    cache: Any
    position: Tensor
    real: Tensor
    state: State
    accounts: list[Account]


@torch.inference_mode()
def encode(session: Session, inputs: Mapping[str, Any]) -> Encoded | None:
    """Run the vision encoder under the session's encoder stage; None for a text-only prompt."""
    call = call_of(inputs, session.base.get_image_features)
    if call.get("pixel_values") is None:
        return None
    session.base.get_image_features(**call, return_dict=True)
    encoded, session.vision.encoded = session.vision.encoded, None
    return encoded


@torch.inference_mode()
def prefill(session: Session, inputs: Mapping[str, Any], encoded: Encoded | None) -> Prefilled:
    """Run the prompt through the LLM under the session's setting.

    Args:
        session: the open session whose setting applies.
        inputs: what the processor gave, for one or several prompts (left-padded).
        encoded: from `encode`, or None for a prompt without images.
    """
    model = session.model
    given = dict(inputs)
    session.vision.encoded = encoded
    known = inspect.signature(model.forward).parameters
    if encoded is not None and "mm_encoder_outputs" in known:
        for name in call_of(inputs, session.base.get_image_features):
            if name == "pixel_values":
                given.pop(name)
        given["mm_encoder_outputs"] = {"image": copy.copy(encoded.output)}
    elif encoded is not None:  # transformers before 5.18
        session.vision.preset = encoded
    if not hasattr(
        session.base, "get_rope_index"
    ):  # generate() counts positions from the mask; forward() does not
        mask = inputs["attention_mask"]
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        out = model(**given, use_cache=True, logits_to_keep=1)
    finally:
        session.vision.preset = None
    state = session.current
    return _prefilled(out.logits[:, -1], getattr(out, CACHE), state, session.accounts)


def _prefilled(logits: Tensor, cache: Any, state: State, accounts: list[Account]) -> Prefilled:
    position = state.position if state.delta is None else state.position - state.delta
    cache.delta = None  # explicit positions from here on
    return Prefilled(logits, cache, position, state.prompt.real, state, accounts)


@torch.inference_mode()
def resume(
    session: Session, trunk: Prefilled, setting: Setting, watch: Sequence[Part] = ()
) -> Prefilled:
    """Redo a recorded prefill from the first decoder layer at which ``setting`` cuts; earlier
    layers are shared.

    ``session`` is the open trunk session; ``setting`` may differ from its own in what happens
    inside the LLM and after.
    """
    old = trunk.state.prompt
    prompt = replace(old, index=old.kept[0][0], valid=old.kept[0][1], rel=None, kept={}, lengths={})
    kept = [_offsets(prompt, i) for i in range(len(prompt.images))]
    promise = plan_cuts(prompt, kept, setting.stage(IntraLLM), session.layers)
    first = min(promise.cuts, default=0)
    start = max(
        (k for k in trunk.state.inputs if k <= first and trunk.state.inputs[k][0] is not None),
        default=None,
    )
    if start is None:
        raise RuntimeError(
            f"no decoder layer up to {first} was recorded: open the trunk session with"
            f" record={{{first}}}"
        )
    prompt.kept = {i: old.kept[i] for i in range(start)}
    prompt.lengths = {i: old.lengths[i] for i in range(start)}
    state = replace(
        trunk.state,
        prompt=prompt,
        promise=promise,
        scores={},
        memo={},
        inputs={},
        notes=copy.deepcopy(trunk.state.notes),
    )
    cache = fork(trunk.cache)
    mine = (session.live, session.watch, session.record, session.state)
    session.live, session.watch, session.record, session.state = (
        None,
        tuple(watch),
        frozenset(),
        state,
    )
    try:
        session.watch_layers()
        for part in watch:
            state.scores[part] = [*trunk.state.scores.get(part, [])[:start]]
        hidden = _rerun(session, trunk, state, cache, start)
        session.finish(state, cache)
    finally:
        session.live, session.watch, session.record, session.state = mine
    logits = session.model.lm_head(session.text.norm(hidden[:, -1:]))[:, -1]
    return _prefilled(logits, cache, state, session.accounts)


def _rerun(session: Session, trunk: Prefilled, state: State, cache: Any, start: int) -> Tensor:
    inputs, side = trunk.state.inputs, state.prompt.side
    hidden, _, call = inputs[start]
    assert hidden is not None
    if call is not None:
        session.tap.calls[("text", start - 1)] = [call]
    embeds = side_rows(side, state.prompt.index) if side else {}
    for i in range(start, session.layers):
        cache.layers[i] = SlotLayer()
        out = session.text.layers[i](hidden, **{**inputs[i][1], CACHE: cache})
        hidden = out[0] if isinstance(out, tuple) else out
        if i < len(embeds.get("deepstack_visual_embeds", ())):
            hidden = session.text._deepstack_process(
                hidden, embeds["visual_pos_masks"], embeds["deepstack_visual_embeds"][i]
            )
    return hidden


def _offsets(prompt: Prompt, number: int) -> Tensor:
    """Offsets of an image's placeholders that entered the LLM."""
    image = prompt.images[number]
    index = prompt.index[image.row, prompt.alive(image.row)]
    return torch.isin(image.slots, index).nonzero()[:, 0]


@torch.inference_mode()
def compress(session: Session, done: Prefilled, part: Part | None) -> Prefilled:
    """A fork of a prefill whose cache is compressed by ``part`` (None: left whole); the original
    stays as it is.
    """
    cache = fork(done.cache)
    if part is None or part.full:
        return replace(
            done,
            cache=cache,
            accounts=audit_prompt(done.state.prompt, done.state.promise, session.layers, cache),
        )
    return replace(done, cache=cache, accounts=session.compress(done.state, cache, part))


@dataclass(frozen=True)
class Generated:
    """One answer. ``tokens``: generated ids, the stop token included if reached. ``finish``:
    ``stop`` or ``length``.
    """

    tokens: list[int]
    finish: str


@torch.inference_mode()
def decode(
    session: Session, done: Sequence[Prefilled], limit: int, stop: Sequence[int]
) -> list[Generated]:
    """Greedy decoding of several prefills of one prompt length side by side; one answer per row, in
    order.

    Args:
        session: an open session on the model, of any setting.
        done: prefills (forks) whose logical prompt length is the same.
        limit: new tokens at most.
        stop: ids that end an answer.
    """
    cache, real = stack([d.cache for d in done]), torch.cat([d.real for d in done])
    position = torch.cat([d.position for d in done], -2)
    token = torch.cat([d.logits for d in done]).argmax(-1, keepdim=True)
    ends = torch.tensor(list(stop), device=token.device)
    out, over = [token], torch.isin(token[:, 0], ends)
    mask = None if bool(real.all()) else real.long()
    for step in range(limit - 1):
        if bool(over.all()):
            break
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = session.model(
            input_ids=token,
            position_ids=position + step,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        ).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        out.append(token)
        over = over | torch.isin(token[:, 0], ends)
    return [finished(row, set(stop)) for row in torch.cat(out, 1).tolist()]


def finished(row: list[int], stop: set[int]) -> Generated:
    """The answer in a row of generated ids: up to and with the first stop token."""
    for i, token in enumerate(row):
        if token in stop:
            return Generated(row[: i + 1], "stop")
    return Generated(row, "length")
