"""Idefics2 (resampler latents, tokens without a place), Idefics3 and SmolVLM (tiles, pixel
shuffle).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, nn

from effivlm.families.base import Family, Piece, Shape, raster
from effivlm.families.internvl import blocks_of
from effivlm.families.shapes import (
    SO400M,
    TINY_CLIP,
    TINY_IMAGE,
    TINY_TEXT,
    llama,
    llama3,
    mistral,
)


def _units(call: Mapping[str, Any]) -> int:
    """Tiles that are not the processor's zero padding."""
    return int((call["pixel_values"] != 0).flatten(2).any(-1).sum())


def layout_latents(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece an image (or crop): latents, which come from nowhere in particular."""
    config: Any = model.config
    n = config.perceiver_config.resampler_n_latents
    nowhere = torch.full((n, 2), torch.nan)
    return [Piece(torch.full((n,), -1), torch.zeros(n, dtype=torch.long), nowhere)] * _units(call)


def group(config: Any) -> torch.Tensor:
    """Pixel shuffle joins ``scale_factor`` x ``scale_factor`` patches."""
    return blocks_of(
        config.vision_config.image_size // config.vision_config.patch_size, config.scale_factor
    )


def layout_tiles(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece a tile, each with a run of placeholders of its own."""
    config: Any = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    n = side * side
    return [
        Piece(torch.arange(n) + i * n, torch.zeros(n, dtype=torch.long), raster(side, side))
        for i in range(_units(call))
    ]


def images(
    config: Any, generator: Generator, count: int, tiles: int | None = None
) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise tiles: two and a global one an image for Idefics3, one for Idefics2."""
    v, latents = config.vision_config, getattr(config, "perceiver_config", None)
    tiles = tiles or (1 if latents else 3)
    n = (
        latents.resampler_n_latents
        if latents
        else (v.image_size // v.patch_size // config.scale_factor) ** 2
    )
    pixels = torch.randn(1, count * tiles, 3, v.image_size, v.image_size, generator=generator)
    return {"pixel_values": pixels}, [[n] * tiles] * count


def tiny(kind: str) -> Any:
    """A tiny configuration."""
    from transformers import CONFIG_MAPPING

    make: Any = CONFIG_MAPPING[kind]
    text = {**TINY_TEXT, "model_type": "llama"}
    vision = dict(TINY_CLIP)
    if kind == "idefics2":
        text |= {"model_type": "mistral", "sliding_window": 12}
        perceiver = {
            "model_type": "idefics2_perceiver",
            "hidden_size": 32,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        }
        vision["model_type"] = "idefics2_vision"
        return make(
            text_config=text,
            vision_config=vision,
            image_token_id=TINY_IMAGE,
            perceiver_config=perceiver,
        )
    factor = {"idefics3": 2, "smolvlm": 3}[kind]
    vision |= {"model_type": f"{kind}_vision", "image_size": 28 * factor}
    return make(
        text_config=text,
        vision_config=vision,
        image_token_id=TINY_IMAGE,
        scale_factor=factor,
        tie_word_embeddings=False,
    )


def _tiles(name: str, parameters: int, text: dict[str, Any], **more: Any) -> Shape:
    """Idefics3 and SmolVLM: an image of 4 x 3 tiles and its thumbnail."""
    vision = {k: v for k, v in SO400M.items() if k not in ("model_type", "vision_use_head")}
    vision["image_size"] = more.pop("image_size")
    return Shape(
        name, parameters, {"text_config": text, "vision_config": vision, **more}, {"tiles": 13}
    )


IDEFICS2_8B = Shape(
    "idefics2-8b",
    8_402_768_112,
    {
        "text_config": mistral(32003, sliding_window=4096, rope_theta=1e4, pad_token_id=0),
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 980,
            "patch_size": 14,
        },
        "perceiver_config": {
            "resampler_n_latents": 64,
            "resampler_depth": 3,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "num_key_value_heads": 4,
        },
        "image_token_id": 32001,
        "tie_word_embeddings": False,
    },
    {"tiles": 5},  # four crops and the whole image
)
# <fake_token_around_image> and a tile's tag; after a run the next one, or the end of a row of tiles
MARKERS = (2, 1)
IDEFICS2 = Family(
    name="idefics2",
    origin=__name__,
    model_types=("idefics2",),
    layout=layout_latents,
    group=lambda config: 1,
    markers=(1, 1),  # <fake_token_around_image>
    traits=frozenset({"no_grid", "no_encoder_signals"}),
    shapes=(IDEFICS2_8B,),
    tiny=lambda: tiny("idefics2"),
    images=images,
)
IDEFICS3 = Family(
    name="idefics3",
    origin=__name__,
    model_types=("idefics3",),
    layout=layout_tiles,
    group=group,
    shapes=(
        _tiles(
            "idefics3-8b",
            8_462_086_384,
            llama3(128259, pad_token_id=128002, max_position_embeddings=131072),
            image_size=364,
            scale_factor=2,
            image_token_id=128257,
            tie_word_embeddings=False,
        ),
    ),
    markers=MARKERS,
    tiny=lambda: tiny("idefics3"),
    images=images,
)
SMOLVLM = Family(
    name="smolvlm",
    origin=__name__,
    model_types=("smolvlm",),
    layout=layout_tiles,
    group=group,
    shapes=(
        _tiles(
            "smolvlm2-2.2b",
            2_246_784_880,
            {**llama(2048, 8192, 24, 32, 49280), "pad_token_id": 2, "rope_theta": 130000.0},
            image_size=384,
            scale_factor=3,
            image_token_id=49190,
            tie_word_embeddings=False,
        ),
    ),
    markers=MARKERS,
    tiny=lambda: tiny("smolvlm"),
    images=images,
)
