"""LLaVA-NeXT and LLaVA-OneVision: a base tile and a mosaic of tiles, padding removed, a newline
token after each row.

Where OneVision shrinks a large mosaic after the encoder, a token's `source` is the nearest patch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from effivlm.families.base import Family, Piece, Shape, raster
from effivlm.families.llava import cls_tokens, layer_index
from effivlm.families.shapes import (
    CLIP_L_336,
    SO400M_384,
    TINY_CLIP,
    TINY_IMAGE,
    TINY_SIGLIP,
    TINY_TEXT,
    llama,
    mistral,
    qwen2,
)

TINY_GRIDS = [[28, 56], [56, 28], [56, 56]]
ONEVISION_GRIDS = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]
NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def layout(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """Lets the family's own packer move coordinates about, then reads them back."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    config: Any = model.config
    vision, out, first = config.vision_config, [], 0
    side = vision.image_size // vision.patch_size
    many = call.get("batch_num_images")
    single = (
        [n == 1 for n in many for _ in range(n)]
        if many is not None
        else [True] * len(call["image_sizes"])
    )
    for size, patched in zip(call["image_sizes"], single, strict=True):
        tiles = [_coordinates(0, side, 0, 0)]
        columns = 0
        if patched:
            rows, columns = get_anyres_image_grid_shape(
                size, config.image_grid_pinpoints, vision.image_size
            )
            tiles += [
                _coordinates(1, side, r * side, c * side)
                for r in range(rows)
                for c in range(columns)
            ]
        out.append(_piece(_packed(model, torch.stack(tiles), size), side, columns, first))
        first += len(tiles) * side * side
    return out


def _coordinates(part: int, side: int, row: int, column: int) -> Tensor:
    """[side * side, 3]: part, row, column of every patch of a tile."""
    place = raster(side, side) + torch.tensor([row, column])
    return torch.cat([torch.full((side * side, 1), float(part)), place], 1)


def _packed(model: nn.Module, tiles: Tensor, size: Tensor) -> Tensor:
    config: Any = model.config
    extra = (
        {"vision_aspect_ratio": config.vision_aspect_ratio}
        if config.model_type == "llava_onevision"
        else ({"vision_feature_select_strategy": "default"})
    )
    base: Any = model.base_model
    return base.pack_image_features(
        [tiles], [size], image_newline=torch.full((3,), torch.nan), **extra
    )[0][0]


def _piece(packed: Tensor, side: int, columns: int, first: int) -> Piece:
    """Read part, row and column of patches [n, 3] back; newline tokens are NaN and close a row of
    the mosaic.
    """
    newline, base = packed.isnan().any(1), side * side
    part, row, column = packed.nan_to_num().round().long().unbind(1)
    tile = torch.where(part > 0, 1 + (row // side) * max(columns, 1) + column // side, 0)
    source = first + tile * base + (row % side) * side + column % side
    place = torch.full((len(packed), 2), torch.nan)
    place[:base] = raster(side, side)
    if columns:
        rows = int(newline.sum())
        place[base:] = raster(rows, (len(packed) - base) // rows)
        place[newline] = torch.nan
    unit = torch.zeros(len(packed), dtype=torch.long)
    unit[base:] = int(columns > 0)
    return Piece(source.masked_fill(newline, -1), unit, place)


def native(processor: Any, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Pictures that fit the mosaics of at most so many tiles.

    The tiles are those of the model's configuration, which the processor's own list must equal; so
    it is the picture that changes: it is sent as large as the mosaic would show it.
    """
    grids = [tuple(grid) for grid in processor.image_processor.image_grid_pinpoints]
    return [
        {"images": [_within(x, [g for g in grids if g[0] * g[1] <= area]) for x in images]}
        for area in sorted({h * w for h, w in grids}, reverse=True)
    ]


def _within(image: Any, grids: list[tuple[int, ...]]) -> Any:
    """A picture no larger than the best of the mosaics would show it."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution((image.height, image.width), grids)
    scale = min(height / image.height, width / image.width)
    if scale >= 1:
        return image
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def images(
    config: Any, generator: Generator, count: int, sizes: Any = None
) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise tiles for images of (height, width) ``sizes``; the tiny default makes unpadding remove
    rows and columns.

    As in OneVision's processor, only an image that is alone in its prompt gets a mosaic there.
    """
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
        unpad_image,
    )

    vision = config.vision_config
    sizes = (list(sizes or [(40, 56), (56, 30), (28, 28)]) * count)[:count]
    tile, side, grids = (
        vision.image_size,
        vision.image_size // vision.patch_size,
        config.image_grid_pinpoints,
    )
    alone = config.model_type == "llava_next" or count == 1
    tiles = [image_size_to_num_patches(s, grids, tile) if alone else 1 for s in sizes]
    pixels = torch.zeros(count, max(tiles), 3, tile, tile)
    lengths = []
    for i, (size, n) in enumerate(zip(sizes, tiles, strict=True)):
        pixels[i, :n] = torch.randn(n, 3, tile, tile, generator=generator)
        if not alone:
            lengths.append([side * side + 1])
            continue
        rows, columns = get_anyres_image_grid_shape(size, grids, tile)
        _, h, w = unpad_image(torch.zeros(1, rows * side, columns * side), size).shape
        if config.model_type == "llava_onevision":
            ratio = (
                h * w / (int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2)
            ) ** 0.5
            h, w = (int(h // ratio), int(w // ratio)) if ratio > 1.1 else (h, w)
        lengths.append([side * side + h * (w + 1)])
    extra = (
        {"batch_num_images": torch.tensor([count])}
        if config.model_type == "llava_onevision"
        else {}
    )
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes), **extra}, lengths


def tiny(kind: str) -> Any:
    """A tiny configuration."""
    from transformers import LlavaNextConfig, LlavaOnevisionConfig

    if kind == "llava_next":
        text = {**TINY_TEXT, "model_type": "mistral", "sliding_window": None}
        return LlavaNextConfig(
            text_config=text,
            vision_config={**TINY_CLIP, "image_size": 28, "patch_size": 7},
            image_token_index=TINY_IMAGE,
            image_grid_pinpoints=TINY_GRIDS,
        )
    text = {**TINY_TEXT, "model_type": "qwen2"}
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config={**TINY_SIGLIP, "image_size": 28, "patch_size": 7},
        image_token_index=TINY_IMAGE,
        video_token_index=TINY_IMAGE + 1,
        image_grid_pinpoints=TINY_GRIDS,
        tie_word_embeddings=True,
    )


def _next(name: str, parameters: int, text: dict[str, Any]) -> Shape:
    return Shape(
        name,
        parameters,
        {
            "text_config": text,
            "vision_config": CLIP_L_336,
            "image_token_index": 32000,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "image_grid_pinpoints": NEXT_GRIDS,
        },
        {"sizes": [(672, 672)]},
    )


def _onevision(name: str, parameters: int, text: dict[str, Any]) -> Shape:
    return Shape(
        name,
        parameters,
        {
            "text_config": text,
            "vision_config": SO400M_384,
            "image_token_index": 151646,
            "video_token_index": 151647,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": ONEVISION_GRIDS,
        },
        {"sizes": [(768, 768)]},
    )


NEXT = Family(
    name="llava_next",
    origin=__name__,
    model_types=("llava_next",),
    layout=layout,
    group=lambda config: 1,
    prefix=cls_tokens,
    feature_block=layer_index,
    native=native,
    shapes=(
        _next("llava-next-7b", 7_063_431_168, llama(4096, 11008, 32, 32)),
        _next("llava-next-13b", 13_351_499_776, llama(5120, 13824, 40, 40)),
        _next(
            "llava-next-mistral-7b",
            7_566_747_648,
            mistral(32064, sliding_window=None, rope_theta=1e6),
        ),
    ),
    tiny=lambda: tiny("llava_next"),
    images=images,
)
ONEVISION = Family(
    name="llava_onevision",
    origin=__name__,
    model_types=("llava_onevision",),
    layout=layout,
    group=lambda config: 1,
    prefix=cls_tokens,
    feature_block=layer_index,
    native=native,
    shapes=(
        _onevision(
            "llava-onevision-0.5b",
            893_675_552,
            qwen2(896, 4864, 24, 14, 2, 152000, tie_word_embeddings=True),
        ),
        _onevision("llava-onevision-7b", 8_030_807_584, qwen2(3584, 18944, 28, 28, 4, 152128)),
    ),
    tiny=lambda: tiny("llava_onevision"),
    images=images,
)
