"""Gemma 3: SigLIP crops, 4x4 average pooling to 256 tokens, bidirectional image blocks,
sliding-window layers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, nn

from effivlm.families.base import Family, Piece, raster
from effivlm.families.internvl import blocks_of
from effivlm.families.shapes import TINY_IMAGE, TINY_SIGLIP, TINY_TEXT


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
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    return Gemma3Config(
        text_config=text,
        vision_config=dict(TINY_SIGLIP),
        mm_tokens_per_image=4,
        image_token_index=TINY_IMAGE,
        boi_token_index=TINY_IMAGE + 2,
        eoi_token_index=TINY_IMAGE + 3,
    )


FAMILY = Family(
    name="gemma3",
    origin=__name__,
    model_types=("gemma3",),
    layout=layout,
    group=group,
    markers=(1, 1),  # <start_of_image>, <end_of_image>; the line breaks around them count as text
    tiny=tiny,
    images=images,
)
