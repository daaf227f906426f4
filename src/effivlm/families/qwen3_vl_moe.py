"""Qwen3-VL with a mixture of experts in every decoder layer."""

from dataclasses import replace
from typing import Any

from effivlm.families.base import Shape
from effivlm.families.qwen3_vl import FAMILY as QWEN3_VL
from effivlm.families.qwen_vl import tiny
from effivlm.families.shapes import TINY_EXPERTS


def _shape(name: str, parameters: int, like: Shape, **text: Any) -> Shape:
    """A published shape; the encoder is that of the dense 8B."""
    old = like.config
    vision = {**old["vision_config"], "out_hidden_size": text["hidden_size"]}
    config = {"text_config": {**old["text_config"], **text}, "vision_config": vision}
    return Shape(name, parameters, {**config, "tie_word_embeddings": False}, like.image)


FAMILY = replace(
    QWEN3_VL,
    name="qwen3_vl_moe",
    origin=__name__,
    model_types=("qwen3_vl_moe",),
    tiny=lambda: tiny("qwen3_vl_moe", **TINY_EXPERTS),
    shapes=(
        _shape(
            "qwen3-vl-30b-a3b",
            31_070_754_032,
            QWEN3_VL.shapes[1],
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
        ),
        _shape(
            "qwen3-vl-235b-a22b",
            235_670_022_896,
            QWEN3_VL.shapes[1],
            hidden_size=4096,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
)
