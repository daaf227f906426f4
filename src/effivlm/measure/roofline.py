"""Operations and bytes of each stage, from shape and token counts alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextShape:
    """A decoder's sizes. ``gated``: whether the MLP has three matrices."""

    layers: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> "TextShape":
        """From a text model's transformers configuration."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads, kv, head_dim, config.vocab_size)

    @property
    def layer_weights(self) -> int:
        """Matrix entries of one decoder layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.inter

    def prefill_flops(self, tokens_per_layer: Sequence[int]) -> int:
        """Multiply-adds counted twice: every layer's matrices on its tokens, causal attention, logits of one token."""
        linear = sum(2 * n * self.layer_weights for n in tokens_per_layer)
        attention = sum(2 * n * n * self.heads * self.head_dim for n in tokens_per_layer)  # two products, half of them causal
        return linear + attention + 2 * self.hidden * self.vocab

    def decode_bytes(self, kv_bytes: float, bytes_per_weight: int) -> int:
        """Bytes one decode step must read at batch 1: every weight once, and the cache."""
        weights = self.layers * self.layer_weights + self.hidden * self.vocab
        return round(weights * bytes_per_weight + kv_bytes)
