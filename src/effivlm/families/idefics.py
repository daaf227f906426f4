"""Idefics2 (resampler latents, tokens without a place), Idefics3 and SmolVLM (tiles, pixel
shuffle).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, nn

from effivlm.families.base import Family, Piece, raster
from effivlm.families.internvl import blocks_of
from effivlm.families.shapes import TINY_CLIP, TINY_IMAGE, TINY_TEXT


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
        text |= {"model_type": "mistral", "sliding_window": None}
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
    vision["model_type"] = f"{kind}_vision"
    return make(text_config=text, vision_config=vision, image_token_id=TINY_IMAGE, scale_factor=2)


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
    tiny=lambda: tiny("idefics2"),
    images=images,
)
IDEFICS3 = Family(
    name="idefics3",
    origin=__name__,
    model_types=("idefics3",),
    layout=layout_tiles,
    group=group,
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
    markers=MARKERS,
    tiny=lambda: tiny("smolvlm"),
    images=images,
)
