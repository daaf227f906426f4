"""Aya Vision: SigLIP tiles, pixel shuffle to a quarter of the patches, Cohere2 with sliding windows
in three layers of four and no positions in the fourth.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, nn

from effivlm.families.base import Family, Piece, Shape, raster
from effivlm.families.internvl import blocks_of
from effivlm.families.llava import layer_index
from effivlm.families.shapes import SO400M, TINY_IMAGE, TINY_SIGLIP, TINY_TEXT


def side_of(config: Any) -> int:
    """Patches along a tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def group(config: Any) -> torch.Tensor:
    """Pixel shuffle joins square blocks of patches."""
    return blocks_of(side_of(config), config.downsample_factor)


def layout(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece a tile, each with a run of placeholders of its own."""
    config: Any = model.config
    side = side_of(config) // config.downsample_factor
    source, place = torch.arange(side * side), raster(side, side)
    unit = torch.zeros_like(source)
    return [Piece(source + i * len(source), unit, place) for i in range(len(call["pixel_values"]))]


def images(
    config: Any, generator: Generator, count: int, tiles: int = 3
) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise tiles, the last of an image the whole of it."""
    side = config.vision_config.image_size
    n = (side_of(config) // config.downsample_factor) ** 2
    pixels = torch.randn(count * tiles, 3, side, side, generator=generator)
    return {"pixel_values": pixels}, [[n] * tiles] * count


def tiny() -> Any:
    """A tiny configuration."""
    from transformers import AyaVisionConfig

    text = {
        **TINY_TEXT,
        "model_type": "cohere2",
        "logit_scale": 0.25,
        "sliding_window": 12,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    }
    return AyaVisionConfig(
        text_config=text, vision_config=dict(TINY_SIGLIP), image_token_index=TINY_IMAGE
    )


AYA_8B = Shape(
    "aya-vision-8b",
    8_631_842_032,
    {
        "text_config": {
            "model_type": "cohere2",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "logit_scale": 0.25,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "vocab_size": 256000,
            "rope_theta": 50000.0,
        },
        "vision_config": {**SO400M, "image_size": 364},
        "image_token_index": 255036,
        "alignment_intermediate_size": 28672,
    },
    {"tiles": 13},
)
FAMILY = Family(
    name="aya_vision",
    origin=__name__,
    model_types=("aya_vision",),
    layout=layout,
    group=group,
    feature_block=layer_index,
    markers=(2, 1),  # <|START_OF_IMG|> and a tile's tag; after a run the next tag, or the end
    shapes=(AYA_8B,),
    tiny=tiny,
    images=images,
)
