"""Operations and bytes of each stage, from shape and token counts alone, and the least time a
device needs for them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from effivlm.families.base import Family
from effivlm.runtime.host import vision_blocks, windows_of


@dataclass(frozen=True)
class Peaks:
    """What a device can do. ``flops`` per second, ``bandwidth`` and ``memory`` in bytes (per
    second); memory 0: unknown.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float = 0.0

    def best(self, other: "Peaks") -> "Peaks":
        """The better of two measurements of one device: load only takes away."""
        return replace(
            self, flops=max(self.flops, other.flops), bandwidth=max(self.bandwidth, other.bandwidth)
        )


@dataclass(frozen=True)
class Work:
    """What a stage must do at least: multiply-adds counted twice, and bytes moved once."""

    flops: float
    bytes: float

    def floor(self, peaks: Peaks) -> float:
        """Least seconds on a device."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in a decoder's sparse layers.

    Attributes:
        count: experts of a layer. active: those a token passes. inter: width of one. shared: width
            of what every token passes beside them. layers: how many decoder layers are sparse.
    """

    count: int
    active: int
    inter: int
    shared: int
    layers: int

    @classmethod
    def of(cls, config: Any) -> "Experts | None":
        """From a text model's transformers configuration; None for a dense model."""
        count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        if not count:
            return None
        inter, layers = config.moe_intermediate_size, config.num_hidden_layers
        dense = getattr(config, "first_k_dense_replace", 0)
        dense = dense or len(getattr(config, "mlp_only_layers", None) or ())
        shared = inter * (getattr(config, "n_shared_experts", 0) or 0)
        return cls(count, config.num_experts_per_tok, inter, shared, layers - dense)

    def width(self, tokens: float) -> float:
        """Width of a layer's matrices that ``tokens`` tokens pass, if routing is balanced."""
        hit = self.count * (1 - (1 - self.active / self.count) ** tokens)
        return self.shared + self.inter * hit


@dataclass(frozen=True)
class TextShape:
    """A decoder's sizes; its MLPs have three matrices.

    Attributes:
        experts: of its sparse layers, or None. windows: per layer the sliding window in tokens, or
            None; empty where no layer has one.
    """

    layers: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: Experts | None = None
    windows: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, config: Any) -> "TextShape":
        """From a text model's transformers configuration."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            heads,
            kv,
            head_dim,
            config.vocab_size,
            Experts.of(config),
            windows_of(config, config.num_hidden_layers),
        )

    def mlp(self, tokens: float = 1) -> int:
        """Matrix entries of all layers' MLPs that ``tokens`` tokens pass: of experts, the active
        ones.
        """
        if self.experts is None:
            return 3 * self.hidden * self.inter * self.layers
        dense = (self.layers - self.experts.layers) * self.inter
        width = dense + self.experts.layers * self.experts.width(tokens)
        return (
            round(3 * self.hidden * width) + self.experts.layers * self.hidden * self.experts.count
        )

    @property
    def layer_weights(self) -> int:
        """Matrix entries of one decoder layer that a token passes, mean over layers."""
        return self.attention_weights + self.mlp() // self.layers

    @property
    def attention_weights(self) -> int:
        """Matrix entries of one layer's attention."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def weights(self) -> int:
        """Matrix entries that every token passes: the layers and the output head."""
        return self.read(1)

    def read(self, tokens: float) -> int:
        """Matrix entries that a step of ``tokens`` tokens must read."""
        return self.layers * self.attention_weights + self.mlp(tokens) + self.hidden * self.vocab

    def kv_entry(self, size: int) -> int:
        """Bytes of one token's keys and values in one layer, ``size`` bytes an element."""
        return 2 * self.kv_heads * self.head_dim * size

    def seen(self, layer: int, held: float) -> float:
        """Of ``held`` entries of a layer, those in its sliding window."""
        window = self.windows[layer] if self.windows else None
        return held if window is None else min(held, window)

    def prefill_flops(self, tokens_per_layer: Sequence[int]) -> int:
        """Multiply-adds counted twice: every layer's matrices on its tokens, causal attention
        within windows, logits of one token.
        """
        linear = sum(2 * n * self.layer_weights for n in tokens_per_layer)
        pairs = 0.0
        for layer, n in enumerate(tokens_per_layer):
            w = self.seen(layer, n)
            pairs += w * (2 * n - w)  # twice the pairs a causal window sees: n * n where all are
        return round(linear + 2 * pairs * self.heads * self.head_dim + 2 * self.hidden * self.vocab)

    def decode_bytes(self, kv_bytes: float, bytes_per_weight: int) -> int:
        """Bytes one decode step must read at batch 1: every weight once, and the cache."""
        return round(self.weights * bytes_per_weight + kv_bytes)

    def prefill_work(self, tokens_per_layer: Sequence[int], size: int, batch: int = 1) -> Work:
        """A prefill of ``batch`` equal prompts: weights read once, keys and values written once."""
        written = batch * sum(tokens_per_layer) * self.kv_entry(size)
        flops = batch * self.prefill_flops(tokens_per_layer)
        return Work(flops, self.read(batch * max(tokens_per_layer)) * size + written)

    def decode_work(
        self,
        kv_per_layer: Sequence[float],
        new_tokens: int,
        size: int,
        batch: int = 1,
        kv_bytes: float | None = None,
    ) -> Work:
        """One decode step, averaged over an answer of ``new_tokens``: every weight once, every
        row's cache once.

        Args:
            kv_per_layer: prompt entries held, mean over KV heads.
            new_tokens: generated; the first comes from prefill.
            size: bytes an element.
            batch: rows decoded side by side.
            kv_bytes: of a row's prompt entries, where they are not stored element by element.
        """
        held = sum(self.seen(i, n + new_tokens / 2) for i, n in enumerate(kv_per_layer))
        attention = 4 * held * self.heads * self.head_dim
        cache = held * self.kv_entry(size)
        if kv_bytes is not None:
            cache = kv_bytes + self.layers * new_tokens / 2 * self.kv_entry(size)
        return Work(
            batch * (2 * self.weights + attention),
            self.read(batch) * size + batch * cache,
        )


@dataclass(frozen=True)
class VisionShape:
    """An image encoder's sizes, counted in its modules (which may be on the meta device).

    Attributes:
        hidden: width. block_weights: matrix entries of all blocks. patch_weights: of what embeds a
            patch.
        token_weights: of what makes LLM tokens (merger, projector). full, windowed: blocks by what
            a patch sees.
        window: patches of a window.
    """

    hidden: int
    block_weights: int
    patch_weights: int
    token_weights: int
    full: int
    windowed: int
    window: int

    @classmethod
    def of(cls, model: nn.Module, family: Family) -> "VisionShape":
        """From a model of a family."""
        some: Any = model
        blocks, v = vision_blocks(model), some.config.vision_config
        inside = {id(m) for m in blocks.modules()} | {id(m) for m in some.get_decoder().modules()}
        outside = [m for m in some.base_model.modules() if id(m) not in inside]
        patch = sum(_matrix(m) for m in outside if isinstance(m, nn.Conv2d | nn.Conv3d))
        token = sum(_matrix(m) for m in outside if isinstance(m, nn.Linear))
        full = len(family.full_blocks(some.config, len(blocks)))
        side = getattr(v, "window_size", 0) // _side(v.patch_size)
        width = getattr(v, "embed_dim", None) or v.hidden_size
        return cls(
            width,
            sum(_matrix(m) for m in blocks.modules()),
            patch,
            token,
            full,
            len(blocks) - full,
            side * side,
        )

    def work(self, segments: Sequence[int], tokens: int, size: int) -> Work:
        """Encoding images.

        Args:
            segments: patches (with [CLS]) of every sequence that attends to itself.
            tokens: LLM tokens made of them.
            size: bytes an element.
        """
        n = sum(segments)
        linear = 2 * n * (self.block_weights + self.patch_weights) + 2 * tokens * self.token_weights
        seen = self.full * sum(s * s for s in segments) + self.windowed * sum(
            s * min(s, self.window) for s in segments
        )
        return Work(
            linear + 4 * seen * self.hidden,
            (self.block_weights + self.patch_weights + self.token_weights) * size,
        )


def segments_of(model: nn.Module, family: Family, inputs: Mapping[str, Any]) -> list[int]:
    """Patches of every sequence the image encoder attends over, [CLS] included, from a model's
    inputs.
    """
    some: Any = model
    if family.packed:
        return [math.prod(grid) for grid in inputs["image_grid_thw"].tolist()]
    pixels, side = inputs["pixel_values"], _side(some.config.vision_config.patch_size)
    patches = (pixels.shape[-2] // side) * (pixels.shape[-1] // side)
    tiles = math.prod(pixels.shape[:-3])
    return [patches + family.prefix(some.config)] * tiles


def _matrix(module: nn.Module) -> int:
    """Entries of a module's own weight, where it multiplies."""
    return module.weight.numel() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) else 0


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]
