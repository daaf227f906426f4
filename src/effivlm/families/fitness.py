"""Whether a checkpoint, a device and a prompt fit each other; asked before anything runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from effivlm.errors import EffivlmError, shown


class LoadError(EffivlmError, RuntimeError):
    """A model that cannot be loaded; the message says what was expected and what to do."""


class PromptError(EffivlmError, ValueError):
    """A prompt that a model cannot take."""


@contextmanager
def quiet() -> Iterator[None]:
    """Neither bars nor advice of transformers inside the block, where ours are shown."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def check_device(name: str) -> None:
    """Refuse a device that is not there.

    Raises:
        LoadError: naming the devices that are.
    """
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError):
        raise LoadError(
            f"unknown device {shown(name, 60)}: expected cpu, cuda, cuda:1 or auto; this machine"
            f" has {', '.join(here)}"
        ) from None
    if device.type == "cpu" and not device.index:
        return
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return
    if device.type == "mps" and torch.backends.mps.is_available():
        return
    raise LoadError(
        f"the device {name} is not there (torch {torch.__version__}): this machine has"
        f" {', '.join(here)}; write for example device: {here[-1]}"
    )


def check_template(loaded: Any) -> None:
    """Refuse a checkpoint that cannot write a chat turn.

    Raises:
        LoadError: without a chat template, or if it cannot be filled in.
    """
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    try:
        loaded.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are programs of the checkpoint's
        why = " ".join(str(error).split())[:200]
        raise LoadError(
            f"the checkpoint {loaded.name} has no chat template that can be used ({why}): add a"
            " chat_template.jinja to its folder, or take the -it, -chat or -hf version of the model"
        ) from None


def check_length(loaded: Any, inputs: Mapping[str, Any], limit: int) -> None:
    """Refuse a prompt that leaves a model no positions for its answer.

    Raises:
        PromptError: naming both lengths.
    """
    length = inputs["input_ids"].shape[1]
    most = getattr(loaded.model.get_decoder().config, "max_position_embeddings", None)
    if most is not None and length + limit > most:
        raise PromptError(
            f"the prompt has {length} tokens and its answer up to {limit}: {loaded.name} takes"
            f" {most} in all"
        )
