"""GLM-4.1V, GLM-4.6V-Flash (dense) and GLM-4.5V, GLM-4.6V (experts): packed images of any size like
Qwen-VL's, a convolution joining 2x2 patches, M-RoPE over half of each head.
"""

from dataclasses import replace
from typing import Any

from effivlm.families.base import Family, Shape
from effivlm.families.qwen_vl import images, layout, resize
from effivlm.families.shapes import TINY_EXPERTS, TINY_IMAGE, TINY_TEXT

IDS = {"image_token_id": 0, "video_token_id": 1, "image_start_token_id": 2, "image_end_token_id": 3}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
VISION = {
    "depth": 24,
    "hidden_size": 1536,
    "num_heads": 12,
    "patch_size": 14,
    "image_size": 336,
    "out_hidden_size": 4096,
}


def tiny(kind: str, **more: Any) -> Any:
    """A tiny configuration; ``more`` of its text model."""
    from transformers import CONFIG_MAPPING

    make: Any = CONFIG_MAPPING[kind]
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 7,
        "image_size": 56,
        "out_hidden_size": 32,
    }
    rope = {**ROPE, "mrope_section": [2, 1, 1]}
    text = {**TINY_TEXT, "head_dim": 16, "rope_parameters": rope, **more}
    ids = {name: TINY_IMAGE + at for name, at in IDS.items()}
    return make(text_config=text, vision_config=vision, **ids)


def _shape(name: str, parameters: int, inter: int, text: dict[str, Any]) -> Shape:
    text = {"rope_parameters": {**ROPE, "mrope_section": [8, 12, 12]}, "vocab_size": 151552} | text
    vision = {**VISION, "intermediate_size": inter}
    config = {"text_config": text, "vision_config": vision}
    return Shape(name, parameters, config, {"grids": [[1, 48, 48]]})


FAMILY = Family(
    name="glm4v",
    origin=__name__,
    model_types=("glm4v", "glm46v"),
    layout=layout,
    group=lambda config: config.vision_config.spatial_merge_size**2,
    packed=True,
    mergers="post_layernorm",  # patch by patch, just before the convolution that joins them
    markers=(1, 1),  # <|begin_of_image|>, <|end_of_image|>
    token_types="mm_token_type_ids",
    resize=resize,
    traits=frozenset({"half_rotary"}),
    tiny=lambda: tiny("glm4v"),
    images=images,
    shapes=(
        _shape(
            "glm-4.1v-9b",
            10_292_777_472,
            13696,
            {
                "hidden_size": 4096,
                "intermediate_size": 13696,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 2,
            },
        ),
    ),
)
MOE = replace(
    FAMILY,
    name="glm4v_moe",
    model_types=("glm4v_moe",),
    tiny=lambda: tiny(
        "glm4v_moe",
        **{"n_routed_experts" if k == "num_experts" else k: v for k, v in TINY_EXPERTS.items()},
    ),
    shapes=(
        _shape(
            "glm-4.5v-106b-a12b",
            107_710_927_360,
            10944,
            {
                "hidden_size": 4096,
                "intermediate_size": 10944,
                "num_hidden_layers": 46,
                "num_attention_heads": 96,
                "num_key_value_heads": 8,
                "head_dim": 128,
            },
        ),
    ),
)
