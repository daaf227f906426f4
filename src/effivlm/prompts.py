"""What a run gives a model: the model itself, a document's inputs, and where an answer ends."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from effivlm.config import ModelSpec
from effivlm.families.loading import Loaded, load
from effivlm.native import Processed, call_with, processed
from effivlm.setting import Part
from effivlm.tasks.base import Question


def load_model(spec: ModelSpec) -> Loaded:
    """The model of a specification; ``zoo:NAME`` is a checkpoint that ships with the package."""
    dtype = "float32" if spec.dtype == "auto" and spec.device == "cpu" else spec.dtype
    return load(spec.name, dtype, spec.attn, spec.device, spec.random_weights)


def prepare(loaded: Loaded, question: Question) -> Mapping[str, torch.Tensor]:
    """Model inputs of one question, by the checkpoint's own chat template and processor."""
    return _inputs(loaded, _call(loaded, question))


def prepare_within(loaded: Loaded, question: Question, part: Part) -> Processed:
    """Model inputs of one question with the most visual tokens that the processor makes within the
    budget of a part that acts there.

    Raises:
        BudgetError: if the processor cannot make so few.
    """
    call = _call(loaded, question)
    assert loaded.family.native is not None and part.budget is not None
    return processed(
        lambda arguments: _inputs(loaded, call_with(call, arguments)),
        loaded.family.native(loaded.processor, question.images),
        part.budget,
        loaded.model.config.image_token_id,
    )


def _call(loaded: Loaded, question: Question) -> dict[str, Any]:
    """The arguments that a processor is called with."""
    text = loaded.processor.apply_chat_template(
        list(question.messages), add_generation_prompt=True, tokenize=False
    )
    given: dict[str, Any] = {"text": text, "return_tensors": "pt"}
    if question.images:
        given["images"] = [list(question.images)]  # one list a prompt: several images
    return given


def _inputs(loaded: Loaded, call: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What the processor gives, on the model's device."""
    inputs = loaded.processor(**call)
    device, dtype = loaded.model.device, loaded.model.dtype
    return {
        k: v.to(device, dtype) if v.is_floating_point() else v.to(device)
        for k, v in inputs.items()
        if isinstance(v, torch.Tensor)
    }


def tiles_of(loaded: Loaded, inputs: Mapping[str, torch.Tensor]) -> list[Image.Image]:
    """Pictures of what the encoder is given, in the order of its tiles; none where images are
    packed into one sequence of patches, which shows them whole.
    """
    pixels = inputs.get("pixel_values")
    how: Any = getattr(loaded.processor, "image_processor", None)
    if pixels is None or pixels.ndim not in (4, 5) or getattr(how, "image_mean", None) is None:
        return []
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (how.image_mean, how.image_std))
    shown = pixels.flatten(0, -4).float().cpu() * std + mean
    bytes_ = (255 * shown.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(tile) for tile in bytes_]


def stop_ids(loaded: Loaded) -> list[int]:
    """Token ids that end an answer."""
    ids = loaded.model.generation_config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [int(ids)]
