"""The stages of a run as functions: encode, prefill, compress, decode. Sharing (`plan`) and
measuring stand on them.

They drive the same hooks as the context manager: a session must be open around them.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effivlm.methods.base import IntraLLM
from effivlm.runtime.account import Account
from effivlm.runtime.cache import CACHE, fork, stack
from effivlm.runtime.in_cache import store
from effivlm.runtime.in_llm import plan_cuts
from effivlm.runtime.prefill import Prefill
from effivlm.runtime.session import Session
from effivlm.runtime.slots import SlotLayer
from effivlm.runtime.tokens import Prompt
from effivlm.runtime.vision import Encoded
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
    state: Prefill
    accounts: list[Account]


@torch.inference_mode()
def encode(session: Session, inputs: Mapping[str, Any]) -> Encoded | None:
    """Run the vision encoder under the session's encoder stage; None for a text-only prompt."""
    call = session.host.image_call(inputs)
    if call.get("pixel_values") is None:
        return None
    session.host.base.get_image_features(**call, return_dict=True)
    return session.turn.take_encoded()


@torch.inference_mode()
def prefill(session: Session, inputs: Mapping[str, Any], encoded: Encoded | None) -> Prefilled:
    """Run the prompt through the LLM under the session's setting.

    Args:
        session: the open session whose setting applies.
        inputs: what the processor gave, for one or several prompts (left-padded).
        encoded: from `encode`, or None for a prompt without images.
    """
    host, given = session.host, dict(inputs)
    if encoded is not None and host.encodes_apart:  # transformers 5.18 and later
        for name in host.image_call(inputs):
            if name == "pixel_values":
                given.pop(name)
        given["mm_encoder_outputs"] = {"image": copy.copy(encoded.output)}
    if not hasattr(host.base, "get_rope_index"):
        # generate() counts positions from the mask; forward() does not
        counted = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        given["position_ids"] = counted + host.family.first_position
    with session.turn.given(encoded):
        out = host.model(**given, use_cache=True, logits_to_keep=1)
    return _prefilled(out.logits[:, -1], getattr(out, CACHE), session.current)


def _prefilled(logits: Tensor, cache: Any, done: Prefill) -> Prefilled:
    position = done.position if done.delta is None else done.position - done.delta
    cache.layers[0].repack(None)  # explicit positions from here on
    return Prefilled(logits, cache, position, done.prompt.real, done, done.accounts)


@torch.inference_mode()
def resume(
    session: Session, trunk: Prefilled, setting: Setting, watch: Sequence[Part] = ()
) -> Prefilled:
    """Redo a recorded prefill from the first decoder layer at which ``setting`` cuts; earlier
    layers are shared.

    ``session`` is the open trunk session; ``setting`` may differ from its own in what happens
    inside the LLM and after.
    """
    inside, prompt = setting.stage(IntraLLM), trunk.state.entered()
    kept = [_offsets(prompt, i) for i in range(len(prompt.images))]
    promise = plan_cuts(prompt, kept, inside, session.layers)
    first = min(promise.cuts, default=0)
    recorded = [k for k, x in trunk.state.inputs.items() if k <= first and x.hidden is not None]
    if not recorded:
        raise RuntimeError(
            f"no decoder layer up to {first} was recorded: open the trunk session with branches"
            " that cut there"
        )
    recipe = dataclasses.replace(
        session.recipe, inside=inside, live=None, watch=tuple(watch), branches=()
    )
    state, cache = trunk.state.again(recipe, promise, max(recorded)), fork(trunk.cache)
    with session.running(state):
        hidden = _rerun(session, trunk, state, cache, max(recorded))
        state.finish(cache)
    text = session.host.text
    logits = session.host.model.lm_head(text.norm(hidden[:, -1:]))[:, -1]
    return _prefilled(logits, cache, state)


def _rerun(session: Session, trunk: Prefilled, state: Prefill, cache: Any, start: int) -> Tensor:
    inputs, side, text = trunk.state.inputs, state.prompt.side, session.host.text
    hidden, call = inputs[start].hidden, inputs[start].call
    assert hidden is not None
    if call is not None:
        session.tap.put(start - 1, call)
    side = None if side is None else side.at(state.prompt.index)
    for i in range(start, session.layers):
        cache.layers[i] = SlotLayer()
        out = text.layers[i](hidden, **{**inputs[i].kwargs, CACHE: cache})
        hidden = out[0] if isinstance(out, tuple) else out
        if side is not None and i < len(side.levels):
            hidden = text._deepstack_process(hidden, side.visual, side.levels[i])
    return hidden


def _offsets(prompt: Prompt, number: int) -> Tensor:
    """Offsets of an image's placeholders that entered the LLM."""
    image = prompt.images[number]
    return torch.isin(image.slots, prompt.row(image.row).index).nonzero()[:, 0]


@torch.inference_mode()
def compress(
    session: Session, done: Prefilled, part: Part | None, form: Part | None = None
) -> Prefilled:
    """A fork of a prefill whose cache is compressed by ``part`` (None: left whole) and stored as
    ``form`` says (None: as it is); the original stays as it is.
    """
    cache, state = fork(done.cache), done.state
    if part is not None and not part.full:
        state.compress(cache, part)
    if form is not None:
        store(state.prompt, cache, form)
    return dataclasses.replace(done, cache=cache, accounts=state.account(cache))


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
        logits = session.host.model(
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
