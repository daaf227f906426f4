"""What a model family is: data about where things are, a layout function, and nothing that knows a
method.

Words: the encoder's *patches* are grouped into *groups* (a 2x2 block for Qwen-VL and InternVL, one
patch for LLaVA); one group becomes one LLM token. Groups are counted in *encoder order*, flattened
over tiles (or over packed images). A *piece* is what `get_image_features` yields one entry for, in
the order of the placeholders: an image, or a tile.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """Where each placeholder token of one piece comes from.

    Attributes:
        source: [n] long, group in encoder order that the token is made of; -1 for newline and other
            extra tokens. Where tokens are resampled after the encoder, the nearest group.
        unit: [n] long, pruning unit inside the piece: 0 the whole image (base tile, thumbnail), 1
            the mosaic.
        place: [n, 2] float32, row and column inside the unit; NaN for tokens without a place.
    """

    source: Tensor
    unit: Tensor
    place: Tensor


Layout = Callable[[nn.Module, Mapping[str, Any]], list[Piece]]


@dataclass(frozen=True)
class Shape:
    """A published model shape for ``random_weights=True``.

    Attributes:
        name: as users write it, such as ``llava-1.5-7b``.
        parameters: how many the published checkpoint has; a test counts them on the meta device.
        config: arguments of the family's transformers config class.
        image: size arguments of `Family.images`, giving the published visual token count.
    """

    name: str
    parameters: int
    config: Mapping[str, Any]
    image: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A model family as shipped in transformers.

    Attributes:
        name: registry name, such as ``qwen2_vl``.
        origin: module that defines it.
        model_types: values of ``config.model_type`` it serves.
        layout: ``(model, call) -> pieces``; ``call`` are the keyword arguments of
            ``get_image_features``.
        prefix: ``config -> int`` (of the whole model, as everywhere below), encoder tokens before
            the patches (1 where there is a [CLS]), cut before the projector.
        group: ``config -> [P] long | int``: group of every patch of one tile in encoder order, or,
            where images are packed in one sequence, the number of consecutive patches in a group.
        feature_block: ``(config, blocks) -> int``, the block whose output the projector takes.
        full_blocks: ``(config, blocks) -> tuple``, blocks in which every patch sees the whole
            image.
        packed: whether the encoder takes all images as one sequence of patches (Qwen-VL).
        rows: the encoder takes the patches of all images as one masked sequence, row by row over
            each image, and joins squares of ``group`` patches (Pixtral).
        mergers: where `packed`, the encoder's modules that need every patch, as a regular
            expression of their names.
        side: the text model's arguments that hold the mask of visual tokens and, a tensor per
            level, features that are added to them between layers (deep stacks), or ().
        run_is_image: whether the tiles of one image are one unbroken run of placeholders
            (InternVL); otherwise a piece is an image.
        markers: tokens that the processor writes before and after every run of placeholders
            (start and end of an image, a tile's tag): no part of what the prompt says.
        first_position: position of a prompt's first token, which `generate` counts from.
        token_types: the model input that tells visual tokens from text, or none. visual_type: the
            value of a visual token in it; text has 0.
        resize: ``(model, call, grids) -> call``: the same images resized so that piece i has
            ``grids[i]`` tokens, or None where the encoder cannot take other sizes.
        native: ``(processor, images) -> arguments``: what can be passed to the processor instead of
            its defaults, from most to fewest visual tokens (where they are many: up to 40 are all
            tried), ``images`` being the pictures of one prompt; an argument ``images``
            is pictures to pass in their place. None where no argument is known that sets how many
            tokens there are.
        traits: what methods may not be able to work with: ``no_grid``, ``no_encoder_signals``.
        shapes: published shapes.
        tiny: ``() -> config`` of a random model with four decoder layers for the contract tests.
        images: ``(config, generator, count, **sizes) -> (model inputs, placeholders per image)``:
            synthetic images without a processor, for random weights and tests.
    """

    name: str
    origin: str
    model_types: tuple[str, ...]
    layout: Layout
    group: Callable[[Any], Tensor | int]
    prefix: Callable[[Any], int] = lambda config: 0
    feature_block: Callable[[Any, int], int] = lambda config, blocks: blocks - 1
    full_blocks: Callable[[Any, int], tuple[int, ...]] = lambda config, blocks: tuple(range(blocks))
    packed: bool = False
    rows: bool = False
    mergers: str = "merger"
    side: tuple[str, ...] = ()
    run_is_image: bool = False
    markers: tuple[int, int] = (0, 0)
    first_position: int = 0
    token_types: str = ""
    visual_type: int = 1
    resize: (
        Callable[[nn.Module, Mapping[str, Any], list[tuple[int, int]]], dict[str, Any]] | None
    ) = None
    native: Callable[[Any, Sequence[Any]], Sequence[Mapping[str, Any]]] | None = None
    traits: frozenset[str] = frozenset()
    shapes: tuple[Shape, ...] = ()
    tiny: Callable[[], Any] | None = None
    images: Callable[..., tuple[dict[str, Any], list[list[int]]]] | None = None


def raster(rows: int, columns: int) -> Tensor:
    """[rows * columns, 2] float32: row and column in raster order."""
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([r, c], -1).view(-1, 2).float()


def squares(pieces: list[Piece], members: int) -> Tensor:
    """[patches] long: where patches lie row by row over each image, the group of each; a group is a
    square of ``members`` patches, counted in raster order.
    """
    side, first, out = math.isqrt(members), 0, list[Tensor]()
    for piece in pieces:
        rows, columns = (int(x) + 1 for x in piece.place.max(0).values)
        cell = raster(rows * side, columns * side).long() // side
        out.append(first + cell[:, 0] * columns + cell[:, 1])
        first += len(piece.source)
    return torch.cat(out)
