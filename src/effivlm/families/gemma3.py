"""Gemma 3: SigLIP crops, 4x4 average pooling to 256 tokens, bidirectional image blocks,
sliding-window layers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, nn

from effivlm.families.base import Family, Piece, Shape, raster
from effivlm.families.internvl import blocks_of
from effivlm.families.shapes import SO400M, TINY_IMAGE, TINY_SIGLIP, TINY_TEXT


def group(config: Any) -> torch.Tensor:
    """Average pooling joins square blocks of patches."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return blocks_of(side, side // round(config.mm_tokens_per_image**0.5))


def layout(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece a crop."""
    config: Any = model.config
    side, n = round(config.mm_tokens_per_image**0.5), config.mm_tokens_per_image
    count = len(call["pixel_values"])
    return [
        Piece(torch.arange(n) + i * n, torch.zeros(n, dtype=torch.long), raster(side, side))
        for i in range(count)
    ]


def images(config: Any, generator: Generator, count: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise crops."""
    side = config.vision_config.image_size
    return {"pixel_values": torch.randn(count, 3, side, side, generator=generator)}, [
        [config.mm_tokens_per_image]
    ] * count


def tiny() -> Any:
    """A tiny configuration."""
    from transformers import Gemma3Config

    text = {
        **TINY_TEXT,
        "model_type": "gemma3_text",
        "head_dim": 16,  # heads are wider than the hidden state, as published
        "query_pre_attn_scalar": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    return Gemma3Config(
        text_config=text,
        vision_config=dict(TINY_SIGLIP),
        mm_tokens_per_image=4,
        image_token_index=TINY_IMAGE,
        boi_token_index=TINY_IMAGE + 2,
        eoi_token_index=TINY_IMAGE + 3,
    )


def _shape(name: str, parameters: int, hidden: int, inter: int, layers: int, heads: int) -> Shape:
    text = {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,  # five layers of six
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    return Shape(
        name,
        parameters,
        {
            "text_config": text,
            "vision_config": {**SO400M, "image_size": 896},
            "mm_tokens_per_image": 256,
        },
    )


FAMILY = Family(
    name="gemma3",
    origin=__name__,
    model_types=("gemma3",),
    layout=layout,
    group=group,
    token_types="token_type_ids",
    shapes=(
        _shape("gemma3-4b", 4_300_079_472, 2560, 10240, 34, 8),
        _shape("gemma3-12b", 12_187_325_040, 3840, 15360, 48, 16),
    ),
    markers=(1, 1),  # <start_of_image>, <end_of_image>; the line breaks around them count as text
    tiny=tiny,
    images=images,
)
