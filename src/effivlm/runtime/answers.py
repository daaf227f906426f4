"""An answer scored under a setting: `labels` in a call of the model.

The prompt is fed and compressed, then the answer's tokens follow, as if they had been generated;
the loss is the model's own, over rows and labels of the caller's indices. A label whose predicting
token was dropped is ignored.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effivlm.runtime.cache import CACHE, cache_of
from effivlm.runtime.host import Host, UnsupportedCall, placeholders
from effivlm.runtime.recipe import Recipe
from effivlm.runtime.support import reads_prompt
from effivlm.runtime.turn import Turn

IGNORED = -100


def scored(
    forward: Callable[..., Any], host: Host, recipe: Recipe, turn: Turn, call: dict[str, Any]
) -> Any:
    """What ``forward`` returns for a call with labels.

    Args:
        forward: the model's.
        host: the model.
        recipe: what is asked.
        turn: of this thread.
        call: the arguments by name, with labels [B, L].

    Raises:
        UnsupportedCall: where the prompt and the answer cannot be told apart and the setting needs
            to (it reads the prompt's text or compresses its cache).
    """
    labels, plain = call["labels"], {k: v for k, v in call.items() if k != "labels"}
    rows = plain.pop("logits_to_keep", 0)
    start = _answer(host, call, labels)
    if start is not None:
        output = _prompt_then_answer(forward, host, turn, plain, start)
    elif _reads_the_prompt(recipe):
        raise UnsupportedCall(
            "labels must begin after the last image, at one position in all rows, to score an"
            " answer under a setting that reads the prompt's text or compresses its cache:"
            " score one prompt a call, with -100 before the answer"
        )
    else:
        output = forward(**plain)
    labels = labels.clone()
    if turn.prefill is not None:
        dropped = turn.prefill.prompt.dropped().to(labels.device)
        labels[:, 1 : dropped.shape[1] + 1][dropped[:, : labels.shape[1] - 1]] = IGNORED
    if isinstance(mask := call.get("attention_mask"), Tensor) and mask.shape == labels.shape:
        labels = labels.masked_fill(mask.to(labels.device) == 0, IGNORED)
    extra = {k: call[k] for k in ("num_items_in_batch",) if call.get(k) is not None}
    vocabulary = host.text.config.vocab_size
    output.loss = host.model.loss_function(output.logits, labels, vocab_size=vocabulary, **extra)
    if not isinstance(rows, int):
        output.logits = output.logits[:, rows]
    elif rows:
        output.logits = output.logits[:, -rows:]
    return output


def _reads_the_prompt(recipe: Recipe) -> bool:
    parts = (*recipe.before, *recipe.inside, *recipe.observers)
    return any(reads_prompt(p) for p in parts)


def _answer(host: Host, call: dict[str, Any], labels: Tensor) -> int | None:
    """Where the answers begin, if that is one place after all images."""
    labelled = labels != IGNORED
    rows = labelled.any(1)
    if not bool(rows.any()) or cache_of(call) is not None:
        return None
    first = labelled[rows].int().argmax(1)
    start = int(first[0])
    visual = placeholders(host, call, True).to(labels.device)
    if start == 0 or bool((first != start).any()) or bool(visual[:, start:].any()):
        return None
    return start


def _prompt_then_answer(
    forward: Callable[..., Any], host: Host, turn: Turn, call: dict[str, Any], start: int
) -> Any:
    sequence = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    size, images = sequence.shape[:2], set(host.image_call(call))
    images |= {"mm_encoder_outputs"}
    prompt, answer = dict(call), {k: v for k, v in call.items() if k not in images}
    for name, value in call.items():
        if name in images or not isinstance(value, Tensor):
            continue
        if value.shape[:2] == size:
            prompt[name], answer[name] = value[:, :start], value[:, start:]
            if "token_type_ids" in name:  # they place images, which the answer has none of
                answer.pop(name)
        elif name == "position_ids":  # [axes, B, L]
            prompt[name], answer[name] = value[..., :start], value[..., start:]
    if isinstance(mask := call.get("attention_mask"), Tensor):
        answer["attention_mask"] = mask
    first = forward(**{**prompt, "use_cache": True})
    if call.get("position_ids") is None and hasattr(host.base, "get_rope_index"):
        assert turn.prefill is not None  # with a mask, such a model would count the prompt's again
        answer["position_ids"] = turn.prefill.position + torch.arange(
            size[1] - start, device=sequence.device
        )
    output = forward(**{**answer, "use_cache": True, CACHE: getattr(first, CACHE)})
    output.logits = torch.cat([first.logits, output.logits], 1)
    return output
