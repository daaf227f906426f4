"""LLaVA-1.5 and everything of its architecture (Mantis with SigLIP): one encoder tile an image, one
token a patch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from effivlm.families.base import Family, Piece, Shape, raster
from effivlm.families.shapes import CLIP_L_336, TINY_CLIP, TINY_IMAGE, TINY_SIGLIP, TINY_TEXT, llama


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
    if (tower, strategy) not in (("clip_vision_model", "default"), ("siglip_vision_model", "full")):
        raise NotImplementedError(
            f"{config.model_type} with the encoder {tower!r} and"
            f" vision_feature_select_strategy={strategy!r}: supported are clip_vision_model with"
            " 'default' and siglip_vision_model with 'full'"
        )
    return int(tower == "clip_vision_model")


def patches(config: Any, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of a tile."""
    return (
        pixels.shape[-2] // config.vision_config.patch_size,
        pixels.shape[-1] // config.vision_config.patch_size,
    )


def layout(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece an image, raster order."""
    cls_tokens(model.config)  # refuses encoders of another layout
    pixels = call["pixel_values"]
    rows, columns = patches(model.config, pixels)
    n = rows * columns
    return [
        Piece(torch.arange(n) + i * n, torch.zeros(n, dtype=torch.long), raster(rows, columns))
        for i in range(len(pixels))
    ]


def resize(
    model: nn.Module, call: Mapping[str, Any], grids: list[tuple[int, int]]
) -> dict[str, Any]:
    """Smaller tiles, with the encoder's position table interpolated."""
    config: Any = model.config
    if len(set(grids)) != 1:
        raise NotImplementedError(f"tiles of one call must have one size, got {sorted(set(grids))}")
    size = [side * config.vision_config.patch_size for side in grids[0]]
    pixels = call["pixel_values"]
    if list(pixels.shape[-2:]) == size:
        return dict(call)
    small = nn.functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
    return {**call, "pixel_values": small.to(pixels.dtype), "interpolate_pos_encoding": True}


def images(config: Any, generator: Generator, count: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise tiles."""
    side = config.vision_config.image_size
    n = (side // config.vision_config.patch_size) ** 2
    return {"pixel_values": torch.randn(count, 3, side, side, generator=generator)}, [[n]] * count


def tiny(vision: dict[str, Any] = TINY_CLIP, layer: int = -2) -> Any:
    """A tiny configuration."""
    from transformers import LlavaConfig

    text = {**TINY_TEXT, "model_type": "llama"}
    strategy = "default" if vision is TINY_CLIP else "full"
    return LlavaConfig(
        text_config=text,
        vision_config=dict(vision),
        image_token_index=TINY_IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )


def _published(name: str, text: dict[str, Any]) -> Shape:
    return Shape(
        name,
        {
            "text_config": text,
            "vision_config": CLIP_L_336,
            "image_token_index": 32000,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "image_seq_length": 576,
        },
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
        _published("llava-1.5-7b", llama(4096, 11008, 32, 32)),
        _published("llava-1.5-13b", llama(5120, 13824, 40, 40)),
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
    tiny=lambda: tiny(TINY_SIGLIP, -1),
    images=images,
)
