"""Loads models and processors as transformers ships them, or builds a published shape with random
weights.
"""

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effivlm import registry, zoo
from effivlm.errors import EffivlmError, shown
from effivlm.families.base import Family, Shape
from effivlm.families.checkpoint import check_folder, family_named, family_of, said_by
from effivlm.families.fitness import LoadError, check_device
from effivlm.files.names import label_of

__all__ = [
    "LoadError",
    "Loaded",
    "collate",
    "config_of",
    "example",
    "family_named",
    "family_of",
    "load",
    "load_processor",
    "require_video",
    "shapes",
]


@dataclass(frozen=True)
class Loaded:
    """A model ready to run. ``processor`` is None for random weights."""

    model: Any
    processor: Any
    family: Family
    name: str


def shapes() -> dict[str, tuple[Family, Shape]]:
    """Published shapes by name."""
    return {s.name: (f, s) for f in registry.families().values() for s in f.shapes}


def load(
    name: str | Path,
    dtype: str = "auto",
    attn: str = "sdpa",
    device: str = "cpu",
    random_weights: bool = False,
) -> Loaded:
    """Load a checkpoint (hub id or folder), or build a published shape with
    ``random_weights=True``.

    Args:
        name: hub id, folder, ``zoo:NAME`` for a checkpoint that ships with the package, or the name
            of a published shape such as ``qwen2-vl-7b``.
        dtype: ``auto`` (the checkpoint's; bfloat16 for random weights), ``float32``, ``bfloat16``
            or ``float16``.
        attn: ``sdpa``, ``eager`` or ``flash_attention_2``.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto`` (spread by accelerate; the first GPU for
            random weights).
        random_weights: build a published shape from its configuration on the device; there is no
            processor then.

    Raises:
        LoadError: for a missing or unsupported model. UnknownName: for an unknown shape, with near
            names.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise LoadError(f"unknown dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
    if not (random_weights and device == "meta"):  # shapes alone need no device
        check_device(device)
    if random_weights:
        return _random(str(name), dtype, attn, device)
    name = zoo.located(name)
    from transformers import AutoConfig, AutoModelForImageTextToText

    check_folder(str(name))
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # whatever transformers makes of a damaged file
        raise LoadError(
            f"cannot read a model configuration from {str(name)!r}: {said_by(error)}; "
            "give a hub id that can be reached or a checkpoint folder with config.json"
        ) from error
    family = family_named(config.model_type, f"the checkpoint {str(name)!r}")
    try:
        family.prefix(config)  # refuses encoders of a layout that the family does not describe
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attn,
            device_map=device,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, loading = loaded
    except EffivlmError:
        raise
    except Exception as error:  # whatever transformers makes of damaged files
        raise LoadError(f"cannot load {shown(str(name))}: {said_by(error)}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with noise
        raise LoadError(
            f"the weights of {str(name)!r} are not complete: {len(missing)} missing, such as"
            f" {missing[0]}"
        )
    return Loaded(model.eval(), load_processor(name), family, label_of(name))


def load_processor(name: str | Path) -> Any:
    """The checkpoint's processor; without torchvision images go through PIL and videos are refused.

    Raises:
        LoadError: if the checkpoint has no usable processor.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    name = zoo.located(name)
    try:
        if importlib.util.find_spec("torchvision"):
            processor = AutoProcessor.from_pretrained(name)
        else:
            kind = _image_only(PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name))])
            processor = kind.from_pretrained(name, backend="pil")
    except Exception as error:  # whatever transformers makes of damaged files
        raise LoadError(f"cannot load the processor of {str(name)!r}: {said_by(error)}") from error
    if getattr(processor, "tokenizer", None) is None or not hasattr(processor, "image_processor"):
        raise LoadError(
            f"the checkpoint {str(name)!r} has no processor for images and text: expected the files"
            " preprocessor_config.json (or processor_config.json) and tokenizer.json"
        )
    processor.tokenizer.padding_side = "left"
    return processor


def _image_only(kind: Any) -> Any:
    """A processor class that does without its video processor, which needs torchvision even to be
    built.
    """
    if "video_processor" not in kind.get_attributes():
        return kind

    class ImageOnly(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [a for a in super().get_attributes() if a != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: Any, **kwargs: Any) -> Any:
            kwargs["video_processor"] = None  # SmolVLM's has no default, and a folder may name one
            return super().from_args_and_dict(args, processor_dict, **kwargs)

        def __call__(self, *args: Any, videos: Any = None, **kwargs: Any) -> Any:
            if videos is not None:
                require_video()
            return super().__call__(*args, **kwargs)

    ImageOnly.__name__ = kind.__name__  # saved configurations name the class
    return ImageOnly


def require_video() -> None:
    """Video needs torchvision.

    Raises:
        LoadError: where it is missing.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise LoadError(
            "video inputs need torchvision, which is not installed: install it, or pass single"
            " frames as images"
        )


def config_of(family: Family, shape: Shape) -> Any:
    """The transformers configuration of a published shape."""
    from transformers import CONFIG_MAPPING

    assert family.tiny is not None  # of the same class: a family may serve no model type of its own
    make: Any = CONFIG_MAPPING[family.tiny().model_type]
    return make(**copy.deepcopy(dict(shape.config)))  # transformers edits what it is given


def _random(name: str, dtype: str, attn: str, device: str) -> Loaded:
    from transformers import AutoModelForImageTextToText

    family, shape = registry.lookup("model shape", name, shapes())
    kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    with torch.device(
        "cuda" if device == "auto" else device
    ):  # built in place: real buffers, no host copy
        model = AutoModelForImageTextToText.from_config(
            config_of(family, shape), dtype=kind, attn_implementation=attn
        )
    model.generation_config.eos_token_id = (
        None  # random weights: answers are noise of a fixed length
    )
    return Loaded(model.eval(), None, family, name)


def example(
    family: Family,
    config: Any,
    images: int = 1,
    before: int = 3,
    between: int = 2,
    after: int = 6,
    seed: int = 0,
    image_last: bool = False,
    **sizes: Any,
) -> dict[str, torch.Tensor]:
    """Synthetic inputs of one prompt: noise images between random text.

    Args:
        family: its `images` makes them.
        config: of the whole model.
        images: how many; 0 gives a text-only prompt.
        before: text tokens before the first image.
        between: text tokens between images, besides one before and one after each.
        after: text tokens after the last image.
        seed: of pixels and text.
        image_last: end with the last placeholder of the last image.
        sizes: the family's own size arguments (``sizes``, ``grids``, ``tiles``).
    """
    generator = torch.Generator().manual_seed(seed + 7)
    assert family.images is not None
    extra, runs = family.images(config, generator, images, **sizes) if images else ({}, [])
    mark, size = config.image_token_id, config.text_config.vocab_size
    vocabulary = min(90, size)
    start, end = (mark + 2, mark + 3) if mark + 3 < size else (mark - 2, mark - 1)

    special = _special(config) | {mark}  # some call it image_token_index
    plain = [i for i in range(5, size) if i not in special]

    def text(n: int) -> list[int]:
        drawn = torch.randint(5, vocabulary, (n,), generator=generator).tolist()
        return [plain[i % len(plain)] if i in special else i for i in drawn]

    ids = text(before)
    for i, lengths in enumerate(runs):
        for n in lengths:
            ids += [start, *[mark] * n, end]
        ids += text(between if i + 1 < len(runs) else 0)
    ids += text(after)
    if image_last and runs:
        ids = ids[: len(ids) - ids[::-1].index(mark)]
    tokens = torch.tensor([ids])
    visual = tokens == mark
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **extra}
    if family.token_types:
        given[family.token_types] = visual.long() * family.visual_type
    return given


def _special(config: Any) -> set[int]:
    """Ids that stand for images, videos, their frames, and ends: never text."""
    found: set[int] = set()
    for part in (config, config.text_config):
        for name, value in part.to_dict().items():
            if name.endswith("_token_id") and value is not None:
                found |= set(value) if isinstance(value, list) else {int(value)}
    return found


def collate(prompts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Several prompts as one left-padded batch."""
    width = max(p["input_ids"].shape[1] for p in prompts)
    out: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(k for p in prompts for k in p):
        rows = [p[key] for p in prompts if key in p]
        if rows[0].ndim == 2 and key in (
            "input_ids",
            "attention_mask",
            "mm_token_type_ids",
            "token_type_ids",
        ):
            rows = [nn.functional.pad(r, (width - r.shape[1], 0)) for r in rows]
        elif rows[0].ndim == 5:  # tiles of different counts: zero tiles are padding
            most = max(r.shape[1] for r in rows)
            rows = [nn.functional.pad(r, (0, 0) * 3 + (0, most - r.shape[1])) for r in rows]
        out[key] = torch.cat(rows)
    return out
