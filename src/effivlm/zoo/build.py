"""The zoo's models, untrained: transformers' own classes, configurations and processors at a tiny
size.

All share one language model shape and one vocabulary, so that a language model trained for one can
start another.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    LlavaOnevisionConfig,
    Qwen2VLConfig,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from effivlm.families.loading import _image_only
from effivlm.zoo.words import make_tokenizer, vocabulary

TILE = 80  # pixels: side of an encoder tile
WIDTH, LAYERS, HEADS, KV_HEADS = 96, 4, 4, 2
_IDS = {t: i for i, t in enumerate(vocabulary())}
_TEXT = {
    "vocab_size": len(_IDS),
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": _IDS["<s>"],
    "eos_token_id": _IDS["</s>"],
    "pad_token_id": _IDS["<pad>"],
}
_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}


def _qwen2_vl() -> Any:
    # columns turn with the slowest frequencies: at the usual base, ten columns of a tiny head would
    # be one place
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [4, 4, 4], "rope_theta": 30.0}
    vision = {
        "depth": 3,
        "num_heads": 4,
        "embed_dim": 64,
        "hidden_size": WIDTH,
        "mlp_ratio": 3,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    return Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=_IDS["<image>"],
        video_token_id=_IDS["<video>"],
        vision_start_token_id=_IDS["<img>"],
        vision_end_token_id=_IDS["</img>"],
        tie_word_embeddings=True,
    )


def _onevision() -> Any:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": 16,
        "vision_use_head": False,
    }
    grids = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
    return LlavaOnevisionConfig(
        text_config={**_TEXT, "model_type": "qwen2"},
        vision_config=vision,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_token_index=_IDS["<image>"],
        video_token_index=_IDS["<video>"],
        image_grid_pinpoints=grids,
        tie_word_embeddings=True,
    )


def _internvl() -> Any:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": [TILE, TILE],
        "patch_size": [8, 8],
    }
    make: Any = InternVLConfig
    return make(
        text_config={**_TEXT, "model_type": "qwen2"},
        vision_config=vision,
        image_token_id=_IDS["<image>"],
        image_seq_length=25,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "mini-qwen2-vl": _qwen2_vl,
    "mini-internvl": _internvl,
    "mini-llava-onevision": _onevision,
}
"""The zoo's models by name."""


def make_model(name: str) -> Any:
    """An untrained model."""
    model = AutoModelForImageTextToText.from_config(CONFIGS[name](), attn_implementation="sdpa")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        _IDS["</s>"],
        _IDS["<pad>"],
    )
    return model


def make_processor(name: str) -> Any:
    """Its processor: images by the PIL back end, 25 tokens a tile of ``TILE`` pixels."""
    kind = _image_only(PROCESSOR_MAPPING[type(CONFIGS[name]())])
    tokenizer = make_tokenizer(
        wrapped=name != "mini-internvl"
    )  # InternVL's processor wraps tiles itself
    options: dict[str, Any] = {"chat_template": tokenizer.chat_template}
    if name == "mini-qwen2-vl":
        images: Any = Qwen2VLImageProcessorPil(
            patch_size=8,
            merge_size=2,
            temporal_patch_size=2,
            **_PIXELS,
            size={"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024},
        )
    elif name == "mini-internvl":
        images = GotOcr2ImageProcessorPil(
            size={"height": TILE, "width": TILE},
            crop_to_patches=True,
            min_patches=1,
            max_patches=4,
            **_PIXELS,
        )
        options["image_seq_length"] = 25
    else:
        images = LlavaOnevisionImageProcessorPil(
            size={"height": TILE, "width": TILE},
            do_pad=True,
            **_PIXELS,
            image_grid_pinpoints=_onevision().image_grid_pinpoints,
        )
        options |= {
            "num_image_tokens": 25,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        }
    return kind(image_processor=images, tokenizer=tokenizer, **options)


def save(model: Any, name: str, folder: Path) -> None:
    """Write a transformers checkpoint folder: config, float16 safetensors, tokenizer, processor,
    chat template.
    """
    copy.deepcopy(model).to(dtype=torch.float16).save_pretrained(folder)
    make_processor(name).save_pretrained(folder)
