"""PaliGemma and PaliGemma 2: SigLIP, a token a patch, and a prompt whose tokens all see each other;
the processor puts the images first.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from effivlm.families import llava
from effivlm.families.base import Family, Piece, Shape
from effivlm.families.shapes import SO400M, TINY_IMAGE, TINY_SIGLIP, TINY_TEXT


def layout(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece an image, raster order."""
    return llava.tiles(model.config, call["pixel_values"], 0)


def images(config: Any, generator: Any, count: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise images."""
    return llava.noise(config, generator, count, 0)


def tiny() -> Any:
    """A tiny configuration, of the first generation: transformers runs Gemma 2 in eager only."""
    from transformers import PaliGemmaConfig

    text = {**TINY_TEXT, "model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1}
    return PaliGemmaConfig(
        text_config=text,
        vision_config=dict(TINY_SIGLIP),
        image_token_index=TINY_IMAGE,
        projection_dim=32,
        hidden_size=32,
    )


def _shape(name: str, parameters: int, side: int) -> Shape:
    text = {
        "model_type": "gemma",
        "vocab_size": 257216,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    }
    vision = {**SO400M, "image_size": side}
    return Shape(
        name,
        parameters,
        {"text_config": text, "vision_config": vision, "image_token_index": 257152},
    )


FAMILY = Family(
    name="paligemma",
    origin=__name__,
    model_types=("paligemma",),
    layout=layout,
    group=lambda config: 1,
    first_position=1,
    token_types="token_type_ids",
    visual_type=0,  # 1 is what an answer is trained on
    shapes=(
        _shape("paligemma-3b-224", 2_923_466_480, 224),
        _shape("paligemma-3b-448", 2_924_351_216, 448),
    ),
    tiny=tiny,
    images=images,
)
