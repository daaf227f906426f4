"""Qwen3-VL: Qwen-VL's packed images, with features added after the first decoder layers."""

from typing import Any

from effivlm.families.base import Family, Shape
from effivlm.families.qwen_vl import MROPE, images, layout, native, resize, tiny


def _qwen3(
    name: str,
    parameters: int,
    hidden: int,
    inter: int,
    tied: bool,
    vision: dict[str, Any],
    deep: list[int],
) -> Shape:
    text = {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "rope_parameters": MROPE
        | {"mrope_section": [24, 20, 20], "rope_theta": 5e6, "mrope_interleaved": True},
        "tie_word_embeddings": tied,
    }
    vision = vision | {
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 2304,
        "out_hidden_size": hidden,
        "deepstack_visual_indexes": deep,
    }
    config = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    return Shape(name, parameters, config, {"grids": [[1, 48, 48]]})


FAMILY = Family(
    name="qwen3_vl",
    origin=__name__,
    model_types=("qwen3_vl",),
    layout=layout,
    group=lambda config: config.vision_config.spatial_merge_size**2,
    packed=True,
    mergers=r"merger|deepstack_merger_list\.\d+",
    side=("visual_pos_masks", "deepstack_visual_embeds"),
    markers=(1, 1),  # <|vision_start|>, <|vision_end|>
    token_types="mm_token_type_ids",
    resize=resize,
    native=native,
    shapes=(
        _qwen3(
            "qwen3-vl-4b",
            4_437_815_808,
            *(2560, 9728, True),
            {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096},
            [5, 11, 17],
        ),
        _qwen3(
            "qwen3-vl-8b",
            8_767_123_696,
            *(4096, 12288, False),
            {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304},
            [8, 16, 24],
        ),
    ),
    tiny=lambda: tiny("qwen3_vl"),
    images=images,
)
