"""Published language models and vision encoders that several families share, as configuration
arguments.
"""

from typing import Any


def qwen2(
    hidden: int, inter: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
) -> dict[str, Any]:
    """A Qwen2 language model."""
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "rope_theta": 1e6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
        **more,
    }


def qwen3_8b(vocab: int) -> dict[str, Any]:
    """Qwen3 8B."""
    return {
        **qwen2(4096, 12288, 36, 32, 8, vocab),
        "model_type": "qwen3",
        "head_dim": 128,
        "max_position_embeddings": 40960,
    }


def llama(hidden: int, inter: int, layers: int, heads: int, vocab: int = 32064) -> dict[str, Any]:
    """A Vicuna / LLaMA-2 language model."""
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "pad_token_id": 32001,
        "tie_word_embeddings": False,
    }


def llama3(vocab: int, **more: Any) -> dict[str, Any]:
    """LLaMA-3 8B with a vocabulary of its own."""
    return {
        **llama(4096, 14336, 32, 32, vocab),
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        **more,
    }


def mistral(vocab: int, **more: Any) -> dict[str, Any]:
    """Mistral 7B: v0.1 slides a window of 4,096 tokens, v0.2 none."""
    return {
        "model_type": "mistral",
        "vocab_size": vocab,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **more,
    }


CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SO400M_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
SO400M = {**SO400M_384, "num_hidden_layers": 27}  # whole: OneVision leaves out the last block
TINY_TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TINY_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TINY_SIGLIP = {**TINY_CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
TINY_IMAGE = 100  # placeholder id of the tiny configurations
