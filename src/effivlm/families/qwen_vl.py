"""Qwen2-VL and Qwen2.5-VL: any resolution, all images one packed sequence, 2x2 patches a
token, M-RoPE.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from effivlm.families.base import Family, Piece, Shape, raster
from effivlm.families.shapes import TINY_IMAGE, TINY_TEXT, qwen2

MROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
TINY_VISION: dict[str, Any] = {
    "depth": 4,
    "num_heads": 2,
    "hidden_size": 32,
    "patch_size": 7,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


def layout(model: nn.Module, call: Mapping[str, Any]) -> list[Piece]:
    """One piece an image, raster order; encoder groups of Qwen2.5-VL lie in window order."""
    config: Any = model.config
    merge = config.vision_config.spatial_merge_size
    grids = call["image_grid_thw"].tolist()
    sizes = [t * (h // merge) * (w // merge) for t, h, w in grids]
    where = _encoder_position(config, call["image_grid_thw"], sum(sizes))
    out, first = [], 0
    for (t, h, w), n in zip(grids, sizes, strict=True):
        place = raster(h // merge, w // merge).repeat(t, 1)
        out.append(Piece(where[first : first + n], torch.zeros(n, dtype=torch.long), place))
        first += n
    return out


def _encoder_position(config: Any, grid: Tensor, count: int) -> Tensor:
    """[tokens] long: where each raster group lies in the encoder's sequence."""
    if config.model_type != "qwen2_5_vl":
        return torch.arange(count)
    from transformers.vision_utils import get_vision_window_index

    v = config.vision_config
    index, _ = get_vision_window_index(
        grid,
        spatial_merge_size=v.spatial_merge_size,
        window_size=v.window_size,
        patch_size=v.patch_size,
    )
    return torch.argsort(index.cpu())


def native(processor: Any, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Every number of tokens an image may have at most, as the processor's pixels; what were
    ``max_pixels`` and ``min_pixels`` before transformers 5.
    """
    how = processor.image_processor
    side = how.patch_size * how.merge_size  # pixels
    token, least = side**2, how.size["shortest_edge"]
    made = [how.get_number_of_image_patches(x.height, x.width, {}) for x in images]
    whole = [round(x.height / side) * round(x.width / side) for x in images]  # unless too large
    most = max([n // how.merge_size**2 for n in made] + whole, default=0)
    most = min(most, how.size["longest_edge"] // token)
    return [
        {"size": {"shortest_edge": min(least, n * token), "longest_edge": n * token}}
        for n in range(most, 0, -1)
    ]


def resize(
    model: nn.Module, call: Mapping[str, Any], grids: list[tuple[int, int]]
) -> dict[str, Any]:
    """Undo the processor's patch order, resize the images, patchify again."""
    config: Any = model.config
    v = config.vision_config
    merge, patch = v.spatial_merge_size, v.patch_size
    channels, frames = getattr(v, "in_channels", 3), v.temporal_patch_size
    flat, new, sizes, first = call["pixel_values"], [], [], 0
    for (t, h, w), (rows, columns) in zip(call["image_grid_thw"].tolist(), grids, strict=True):
        x = flat[first : first + t * h * w].view(
            t, h // merge, w // merge, merge, merge, channels, frames, patch, patch
        )
        first += t * h * w
        picture = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(
            t * frames, channels, h * patch, w * patch
        )
        if (rows * merge, columns * merge) != (h, w):
            size = [rows * merge * patch, columns * merge * patch]
            picture = nn.functional.interpolate(
                picture.float(), size=size, mode="bicubic", antialias=True
            ).to(flat.dtype)
        y = picture.view(t, frames, channels, rows, merge, patch, columns, merge, patch)
        new.append(y.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * rows * columns * merge**2, -1))
        sizes.append([t, rows * merge, columns * merge])
    grid = torch.tensor(sizes, device=call["image_grid_thw"].device)
    return {**call, "pixel_values": torch.cat(new), "image_grid_thw": grid}


def images(
    config: Any, generator: Generator, count: int, grids: Any = None
) -> tuple[dict[str, Any], list[list[int]]]:
    """Noise patches for images of (t, h, w) ``grids`` in patches."""
    v = config.vision_config
    grid = torch.tensor((list(grids or [[1, 4, 12], [1, 8, 6], [1, 4, 4]]) * count)[:count])
    width = getattr(v, "in_channels", 3) * v.temporal_patch_size * v.patch_size**2
    pixels = torch.randn(int(grid.prod(-1).sum()), width, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}, [
        [n] for n in (grid.prod(-1) // v.spatial_merge_size**2).tolist()
    ]


TINY_VISIONS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1, 3],
        "window_size": 28,
    },
    "qwen3_vl": {
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    },
}


def tiny(kind: str, **more: Any) -> Any:
    """A tiny configuration; ``more`` of its text model."""
    from transformers import CONFIG_MAPPING

    wide = kind.startswith(
        "qwen3_vl"
    )  # its heads are wider than the hidden state and interleave the axes
    rope = MROPE | {"mrope_section": [4, 2, 2] if wide else [1, 1, 2], "rope_theta": 1e4}
    rope |= {"mrope_interleaved": True} if wide else {}
    text = {
        **TINY_TEXT,
        "rope_scaling": dict(rope),
        "rope_parameters": dict(rope),
        "head_dim": 16 if wide else 8,
        **more,
    }
    make: Any = CONFIG_MAPPING[kind]
    vision = TINY_VISION | TINY_VISIONS[kind.removesuffix("_moe")]
    ids = {
        "image_token_id": TINY_IMAGE,
        "video_token_id": TINY_IMAGE + 1,
        "vision_start_token_id": TINY_IMAGE + 2,
        "vision_end_token_id": TINY_IMAGE + 3,
    }
    return make(
        text_config=text, vision_config=vision, **ids, tie_word_embeddings="moe" not in kind
    )


def full_blocks(config: Any, blocks: int) -> tuple[int, ...]:
    """Blocks in which every patch sees its whole image."""
    return tuple(getattr(config.vision_config, "fullatt_block_indexes", None) or range(blocks))


def _shape(name: str, parameters: int, text: dict[str, Any], vision: dict[str, Any]) -> Shape:
    text = {k: v for k, v in text.items() if k != "model_type"} | {
        "rope_scaling": MROPE,
        "rope_parameters": MROPE,
    }
    vision |= {
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "num_heads": 16,
        "depth": 32,
    }
    return Shape(
        name,
        parameters,
        {
            "text_config": text,
            "vision_config": vision,
            "tie_word_embeddings": text["tie_word_embeddings"],
        },
        {"grids": [[1, 48, 48]]},
    )


def _qwen2_vision(hidden: int) -> dict[str, Any]:
    return {"embed_dim": 1280, "hidden_size": hidden, "mlp_ratio": 4}


def _qwen25_vision(hidden: int) -> dict[str, Any]:
    return {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": hidden,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }


QWEN2_VL = Family(
    name="qwen2_vl",
    origin=__name__,
    model_types=("qwen2_vl",),
    layout=layout,
    group=lambda config: config.vision_config.spatial_merge_size**2,
    packed=True,
    markers=(1, 1),  # <|vision_start|>, <|vision_end|>
    token_types="mm_token_type_ids",
    resize=resize,
    native=native,
    shapes=(
        _shape(
            "qwen2-vl-2b",
            2_208_985_600,
            qwen2(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True),
            _qwen2_vision(1536),
        ),
        _shape(
            "qwen2-vl-7b", 8_291_375_616, qwen2(3584, 18944, 28, 28, 4, 152064), _qwen2_vision(3584)
        ),
    ),
    tiny=lambda: tiny("qwen2_vl"),
    images=images,
)
QWEN25_VL = Family(
    name="qwen2_5_vl",
    origin=__name__,
    model_types=("qwen2_5_vl",),
    layout=layout,
    group=lambda config: config.vision_config.spatial_merge_size**2,
    full_blocks=full_blocks,
    packed=True,
    markers=(1, 1),  # <|vision_start|>, <|vision_end|>
    token_types="mm_token_type_ids",
    resize=resize,
    native=native,
    shapes=(
        _shape(
            "qwen2.5-vl-3b",
            3_754_622_976,
            qwen2(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True),
            _qwen25_vision(2048),
        ),
        _shape(
            "qwen2.5-vl-7b",
            8_292_166_656,
            qwen2(3584, 18944, 28, 28, 4, 152064),
            _qwen25_vision(3584),
        ),
    ),
    tiny=lambda: tiny("qwen2_5_vl"),
    images=images,
)
