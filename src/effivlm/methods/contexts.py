"""What a method sees: one frozen context per stage, with typed tensors and the signals it declared.

Shapes: N visual tokens of one image (or tile), M tokens in play, T text tokens, G groups of encoder
patches, D width, C encoder width, KV key/value heads, d head width.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from effivlm.methods.signals import Signal


@runtime_checkable
class SignalSource(Protocol):
    """The runtime's side of a context: computes a declared signal when a method reads it."""

    def __call__(self, signal: Signal) -> Tensor:
        """The signal's tensor at this place; its shape is in the signal's docstring."""
        ...


class UndeclaredSignal(KeyError):
    """A method read a signal that it does not list in ``signals``."""


@dataclass(frozen=True)
class Context:
    """What every stage receives.

    Attributes:
        key: an integer that identifies prompt and place; with it, random choices depend on the
            prompt, not on batch.
        notes: a scratch dictionary of this method for this prompt, carried from stage to stage
            (hybrid methods).
    """

    source: SignalSource = field(repr=False)
    declared: frozenset[Signal] = field(repr=False)
    key: int
    notes: dict[str, Any] = field(repr=False)

    def __getitem__(self, signal: Signal) -> Tensor:
        """The tensor of a declared signal; its shape is in the signal's docstring.

        Raises:
            UndeclaredSignal: if no signal of this type (for encoder signals: this very signal) is
                in ``signals``.
        """
        if signal not in self.declared and not (
            signal.late and type(signal) in {type(s) for s in self.declared}
        ):
            names = ", ".join(sorted(map(repr, self.declared))) or "none"
            raise UndeclaredSignal(
                f"signal {signal!r} was read but not declared; declared: {names}; add it to"
                " `signals`"
            )
        return self.source(signal)

    def generator(self, seed: int) -> torch.Generator:
        """A CPU generator that depends on ``seed`` and on prompt and place only."""
        digest = hashlib.sha256(f"{seed}:{self.key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class ImageTokens(Context):
    """One image, or one tile, after the projector (`PreLLM`).

    Attributes:
        embeds: what would enter the LLM.
        place: row and column of every token in this unit's grid; NaN where tokens
            have no place.
        image: number of the image in its prompt. unit: number of the tile in its image.
        position: logical index in the uncompressed prompt, as in `LayerTokens`.
    """

    embeds: Float[Tensor, "N D"]
    place: Float[Tensor, "N 2"]
    image: int
    unit: int
    position: Int[Tensor, "N"] | Int[Tensor, "0"] = field(
        default_factory=lambda: torch.empty(0, dtype=torch.long)
    )


@dataclass(frozen=True)
class BlockTokens(Context):
    """One image or tile between two vision-encoder blocks (`EncoderReducer`).

    A *group* is what becomes one LLM token (a 2x2 block of patches for Qwen-VL and InternVL, one
    patch for LLaVA). Everything is given per group, so a reduction can never tear a group apart.

    Attributes:
        states: mean of the group's patch states at the input of this block.
        keys: keys of the block before, mean over heads and group.
        received: attention received in the block before, mean over heads, queries and group,
            float32.
        sizes: how many original groups each group stands for, float32.
        place: row and column.
        block: the block about to run.
        prefix: encoder tokens before the patches (1 where there is a [CLS]); they are never
            reduced, but a method that counts tokens counts them.
    """

    states: Float[Tensor, "G C"]
    keys: Float[Tensor, "G d"]
    received: Float[Tensor, "G"]
    sizes: Float[Tensor, "G"]
    place: Real[Tensor, "G 2"]
    block: int
    prefix: int = 0


@dataclass(frozen=True)
class LayerTokens(Context):
    """One image's tokens before a decoder layer (`IntraLLM`).

    Attributes:
        hidden: input of the layer: all tokens in play of this prompt (text, this and other
            images).
        visual: indices into M of this image's tokens in play, ascending.
        text: indices into M of the text tokens after this image; the last token if there
            are none.
        position: logical index in the uncompressed prompt.
        layer: the layer about to run; attention signals are those of layer ``layer - 1``.
        original: visual tokens this image had when it entered the LLM.
        image: number of the image in its prompt.
    """

    hidden: Float[Tensor, "M D"]
    visual: Int[Tensor, "N"]
    text: Int[Tensor, "T"]
    position: Int[Tensor, "M"]
    layer: int
    original: int
    image: int


@dataclass(frozen=True)
class LayerCache(Context):
    """One prompt's keys and values of one layer after its prefill (`KVCache`).

    Attributes:
        keys: post-RoPE.
        image: image each entry belongs to (0, 1, ...), -1 for text.
        position: logical index.
        layer: layer index. layers: number of decoder layers.
    """

    keys: Float[Tensor, "KV M d"]
    values: Float[Tensor, "KV M d"]
    image: Int[Tensor, "M"]
    position: Int[Tensor, "M"]
    layer: int
    layers: int

    @property
    def length(self) -> int:
        """M, entries per KV head before compression."""
        return self.keys.shape[1]
