"""InternVL 2.5, 3 and 3.5 in their transformers form: tiles of 448 px, [CLS], pixel shuffle to 256
tokens a tile.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from effivlm.families.base import Family, Piece, Shape, raster
from effivlm.families.llava import layer_index
from effivlm.families.shapes import TINY_IMAGE, TINY_TEXT, qwen2, qwen3_8b


def side_of(value: Any) -> int:
    """InternVL writes sizes as a number or as [height, width] of a square."""
    return value if isinstance(value, int) else value[0]


def blocks_of(side: int, factor: int) -> Tensor:
    """[side * side] long: which ``factor`` x ``factor`` block each patch of a square tile belongs
    to, raster order.
    """
    place = raster(side, side).long() // factor
    return place[:, 0] * (side // factor) + place[:, 1]


def group(config: Any) -> Tensor:
    """Pixel shuffle joins 2x2 patches."""
    side = side_of(config.vision_config.image_size) // side_of(config.vision_config.patch_size)
    return blocks_of(side, round(1 / config.downsample_ratio))


def layout(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece a tile; the tiles of an image are one run of placeholders."""
    config: Any = model.config
    side = round((int(group(config).max()) + 1) ** 0.5)
    n = side * side
    count = len(call["pixel_values"])
    return [
        Piece(torch.arange(n) + i * n, torch.zeros(n, dtype=torch.long), raster(side, side))
        for i in range(count)
    ]


def native(processor: Any, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Every number of tiles an image may have at most (its thumbnail aside)."""
    how = processor.image_processor
    return [
        {"min_patches": min(how.min_patches, n), "max_patches": n}
        for n in range(how.max_patches, 0, -1)
    ]


def images(
    config: Any, generator: Generator, count: int, tiles: Any = None
) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise tiles; ``tiles``: how many each image has."""
    side = side_of(config.vision_config.image_size)
    tiles = (list(tiles or [3, 1, 2]) * count)[:count]
    pixels = torch.randn(sum(tiles), 3, side, side, generator=generator)
    return {"pixel_values": pixels}, [[config.image_seq_length * t] for t in tiles]


def tiny() -> Any:
    """A tiny configuration."""
    from transformers import InternVLConfig

    make: Any = InternVLConfig
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": [56, 56],
        "patch_size": [7, 7],
        "attention_bias": True,
    }
    return make(
        text_config={**TINY_TEXT, "model_type": "qwen2"},
        vision_config=vision,
        image_token_id=TINY_IMAGE,
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


VIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "layer_scale_init_value": 0.1,
}
VIT_6B = {
    **VIT_300M,
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}


def _shape(name: str, parameters: int, text: dict[str, Any], vision: dict[str, Any]) -> Shape:
    return Shape(
        name,
        parameters,
        {
            "text_config": text,
            "vision_config": vision,
            "image_token_id": 151667,
            "image_seq_length": 256,
            "downsample_ratio": 0.5,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": text["tie_word_embeddings"],
        },
        {"tiles": [5]},
    )


FAMILY = Family(
    name="internvl",
    origin=__name__,
    model_types=("internvl",),
    layout=layout,
    group=group,
    prefix=lambda config: 1,
    feature_block=layer_index,
    run_is_image=True,
    markers=(1, 1),  # <img>, </img>
    native=native,
    shapes=(
        _shape(
            "internvl3-1b",
            938_193_024,
            qwen2(896, 4864, 24, 14, 2, 151674, tie_word_embeddings=False),
            VIT_300M,
        ),
        _shape("internvl3-8b", 7_944_373_760, qwen2(3584, 18944, 28, 28, 4, 151674), VIT_300M),
        _shape("internvl3.5-8b", 8_528_318_464, qwen3_8b(151936), VIT_300M),
        _shape("internvl2.5-38b", 38_388_164_992, qwen2(5120, 27648, 64, 40, 8, 151674), VIT_6B),
    ),
    tiny=tiny,
    images=images,
)
