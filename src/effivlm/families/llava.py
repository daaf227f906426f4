"""LLaVA-1.5 and everything of its architecture (Mantis with SigLIP): one encoder tile an image, one
token a patch.

Mantis was trained with the strategy "default", which cuts the first encoder token. SigLIP has no
[CLS] there: the first patch never becomes a token.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from effivlm.families.base import Family, Piece, Shape, raster
from effivlm.families.shapes import (
    CLIP_L_336,
    SO400M,
    TINY_CLIP,
    TINY_IMAGE,
    TINY_SIGLIP,
    TINY_TEXT,
    llama,
    llama3,
)


def layer_index(config: Any, blocks: int) -> int:
    """Block whose output is ``hidden_states[vision_feature_layer]`` (entry 0 is the embeddings)."""
    layer = config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[-1]
    return blocks + layer if layer < 0 else layer - 1


def cls_tokens(config: Any) -> int:
    """1 where the encoder has a [CLS] token, which the projector never sees.

    Raises:
        NotImplementedError: for encoders other than CLIP and SigLIP, and where the projector would
            take the [CLS] token or lose a patch.
    """
    tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    known = (("clip_vision_model", "default"), ("siglip_vision_model", "full"))
    if (tower, strategy) not in known and not lost_patches(config):
        raise NotImplementedError(
            f"{config.model_type} with the encoder {tower!r} and"
            f" vision_feature_select_strategy={strategy!r}: supported are clip_vision_model with"
            " 'default' and siglip_vision_model with 'full'"
        )
    return int(tower == "clip_vision_model")


def lost_patches(config: Any) -> int:
    """1 where the cut that is meant for a [CLS] token takes the first patch of every image."""
    tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    return int((config.model_type, tower, strategy) == ("llava", "siglip_vision_model", "default"))


def patches(config: Any, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of a tile."""
    return (
        pixels.shape[-2] // config.vision_config.patch_size,
        pixels.shape[-1] // config.vision_config.patch_size,
    )


def layout(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece an image, raster order."""
    cls_tokens(model.config)  # refuses encoders of another layout
    return tiles(model.config, call["pixel_values"], lost_patches(model.config))


def tiles(config: Any, pixels: Tensor, lost: int) -> list[Piece]:
    """One piece a tile, a token a patch but for the first ``lost``."""
    rows, columns = patches(config, pixels)
    source, place = torch.arange(rows * columns)[lost:], raster(rows, columns)[lost:]
    unit = torch.zeros_like(source)
    return [Piece(source + i * rows * columns, unit, place) for i in range(len(pixels))]


def resize(
    model: nn.Module, call: Mapping[str, Any], grids: list[tuple[int, int]]
) -> dict[str, Any]:
    """Smaller tiles, with the encoder's position table interpolated."""
    config: Any = model.config
    if len(set(grids)) != 1:
        raise NotImplementedError(f"tiles of one call must have one size, got {sorted(set(grids))}")
    if math.prod(grids[0]) <= lost_patches(config):
        raise NotImplementedError(
            f"an image of one patch has no token: {config.model_type} cuts the first patch of every"
            " image; keep at least two"
        )
    size = [side * config.vision_config.patch_size for side in grids[0]]
    pixels = call["pixel_values"]
    if list(pixels.shape[-2:]) == size:
        return dict(call)
    small = nn.functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
    return {**call, "pixel_values": small.to(pixels.dtype), "interpolate_pos_encoding": True}


def images(config: Any, generator: Generator, count: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise tiles."""
    return noise(config, generator, count, lost_patches(config))


def noise(
    config: Any, generator: Generator, count: int, lost: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise tiles that give a token a patch but for the first ``lost``."""
    side = config.vision_config.image_size
    n = (side // config.vision_config.patch_size) ** 2 - lost
    return {"pixel_values": torch.randn(count, 3, side, side, generator=generator)}, [[n]] * count


def tiny(vision: Mapping[str, Any] = TINY_CLIP) -> Any:
    """A tiny configuration."""
    from transformers import LlavaConfig

    return LlavaConfig(
        text_config={**TINY_TEXT, "model_type": "llama"},
        vision_config=dict(vision),
        image_token_index=TINY_IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _published(
    name: str,
    parameters: int,
    text: dict[str, Any],
    vision: Mapping[str, Any],
    mark: int,
    tokens: int,
) -> Shape:
    return Shape(
        name,
        parameters,
        {
            "text_config": text,
            "vision_config": dict(vision),
            "image_token_index": mark,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "image_seq_length": tokens,
        },
    )


MANTIS_8B = _published(
    "mantis-8b",
    8_480_007_232,
    llama3(128258, pad_token_id=128257),
    {**SO400M, "vision_use_head": True},
    *(128256, 27 * 27 - 1),
)


FAMILY = Family(
    name="llava",
    origin=__name__,
    model_types=("llava",),
    layout=layout,
    group=lambda config: 1,
    prefix=cls_tokens,
    feature_block=layer_index,
    resize=resize,
    shapes=(
        _published(
            "llava-1.5-7b", 7_063_427_072, llama(4096, 11008, 32, 32), CLIP_L_336, 32000, 576
        ),
        _published(
            "llava-1.5-13b", 13_351_494_656, llama(5120, 13824, 40, 40), CLIP_L_336, 32000, 576
        ),
    ),
    tiny=tiny,
    images=images,
)
MANTIS = Family(
    name="mantis",
    origin=__name__,
    model_types=(),  # its checkpoints say model_type "llava",
    layout=layout,
    group=lambda config: 1,
    prefix=cls_tokens,
    feature_block=layer_index,
    resize=resize,
    shapes=(MANTIS_8B,),
    tiny=lambda: tiny({**TINY_SIGLIP, "vision_use_head": True}),
    images=images,
)
