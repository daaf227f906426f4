"""Mistral Small 3 with Pixtral's encoder: images of any size, their patches row by row in one
masked sequence, 2x2 patches a token; the processor ends every row of tokens with one of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, nn

from effivlm.families.base import Family, Piece, Shape, raster
from effivlm.families.llava import layer_index
from effivlm.families.shapes import TINY_IMAGE, TINY_TEXT, mistral

TINY_SIZES = ((28, 84), (56, 42), (28, 28))


def layout(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece an image, raster order."""
    config: Any = model.config
    cell, out, first = config.vision_config.patch_size * config.spatial_merge_size, [], 0
    for height, width in call["image_sizes"].tolist():
        place = raster(height // cell, width // cell)
        source = torch.arange(len(place)) + first
        out.append(Piece(source, torch.zeros_like(source), place))
        first += len(place)
    return out


def resize(
    model: nn.Module, call: Mapping[str, Any], grids: list[tuple[int, int]]
) -> dict[str, Any]:
    """Every image without its padding, resized, and padded to the largest again."""
    config: Any = model.config
    cell, given = config.vision_config.patch_size * config.spatial_merge_size, call["pixel_values"]
    sizes = [(rows * cell, columns * cell) for rows, columns in grids]
    out = given.new_zeros(len(given), given.shape[1], *map(max, zip(*sizes, strict=True)))
    for i, ((height, width), size) in enumerate(
        zip(call["image_sizes"].tolist(), sizes, strict=True)
    ):
        picture = given[i : i + 1, :, :height, :width]
        if size != (height, width):
            picture = nn.functional.interpolate(
                picture.float(), size=size, mode="bicubic", antialias=True
            ).to(given.dtype)
        out[i, :, : size[0], : size[1]] = picture[0]
    return {**call, "pixel_values": out, "image_sizes": call["image_sizes"].new_tensor(sizes)}


def images(
    config: Any, generator: Generator, count: int, sizes: Any = None
) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise images of ``sizes`` (height, width), a run of placeholders a row."""
    cell, known = config.vision_config.patch_size * config.spatial_merge_size, sizes or TINY_SIZES
    chosen = (list(known) * count)[:count]
    shape = [max(side) for side in zip(*known, strict=True)]
    pixels = torch.randn(count, 3, *shape, generator=generator)
    runs = [[width // cell] * (height // cell) for height, width in chosen]
    return {"pixel_values": pixels, "image_sizes": torch.tensor(chosen)}, runs


def tiny() -> Any:
    """A tiny configuration."""
    from transformers import Mistral3Config

    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 84,
        "patch_size": 7,
    }
    text = {**TINY_TEXT, "model_type": "mistral", "head_dim": 4, "sliding_window": None}
    return Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=TINY_IMAGE,
        tie_word_embeddings=False,
    )


TEXT = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "head_dim": 128}
SMALL_24B = Shape(
    "mistral-small-3.1-24b",
    24_011_361_280,
    {
        "text_config": mistral(131072, **TEXT, sliding_window=None, rope_theta=1e9),
        "image_token_index": 10,
        "tie_word_embeddings": False,
    },
    {"sizes": [(1036, 1540)]},
)
FAMILY = Family(
    name="mistral3",
    origin=__name__,
    model_types=("mistral3",),
    layout=layout,
    group=lambda config: config.spatial_merge_size**2,
    rows=True,
    feature_block=layer_index,
    markers=(0, 1),  # [IMG_BREAK] after a row of tokens, [IMG_END] after the last
    resize=resize,
    shapes=(SMALL_24B,),
    tiny=tiny,
    images=images,
)
