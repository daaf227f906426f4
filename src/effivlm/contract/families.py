"""The rules of a family, one function each: a family's name in, ContractError out where its
description is not what transformers computes. On its tiny model, in float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effivlm import registry
from effivlm.contract.twin import close, generate, require
from effivlm.families.base import Family, Piece, raster, squares
from effivlm.families.loading import family_of
from effivlm.families.tiny import batch, build, double, exact, prompt
from effivlm.runtime.host import host_of
from effivlm.runtime.session import Session


def describes_a_model(name: str) -> None:
    """The tiny model is of a type the family serves, and the family is found from it."""
    model = exact(name)
    require(
        name == family_of(model).name or not registry.families()[name].model_types,
        f"{name}: its tiny model is served by {family_of(model).name}",
    )
    block = registry.families()[name].feature_block(model.config, len(host_of(model).blocks))
    blocks = len(host_of(model).blocks)
    require(0 <= block < blocks, f"{name}: feature block {block} of {blocks} blocks")


def pieces_account_for_every_placeholder(name: str) -> None:
    """One to three images: as many tokens as placeholders and features; units are full grids."""
    for count in (1, 2, 3):
        model, inputs, call, pieces = _case(name, count)
        asked = int((inputs["input_ids"] == model.config.image_token_id).sum())
        told, made = sum(len(p.source) for p in pieces), len(_features(model, call))
        require(
            asked == told == made,
            f"{name}, {count} images: {asked} placeholders, layout of {told} tokens, {made}"
            " features",
        )
        for number, piece in enumerate(pieces):
            _check_piece(f"{name}, piece {number} of {count} images", piece)


def _check_piece(where: str, piece: Piece) -> None:
    kinds = piece.source.dtype, piece.unit.dtype, piece.place.dtype
    require(
        kinds == (torch.long, torch.long, torch.float32)
        and piece.place.shape == (len(piece.source), 2),
        f"{where}: source, unit and place are {kinds}, place {tuple(piece.place.shape)}",
    )
    for unit in piece.unit.unique():
        place = piece.place[piece.unit == unit]
        place = place[~place.isnan().any(1)]
        if len(place):
            rows, columns = (int(x) + 1 for x in place.max(0).values)
            grid = raster(rows, columns)[-len(place) :]  # an encoder may cut its first patches
            require(
                torch.equal(place, grid),
                f"{where}: places of unit {int(unit)} are no {rows} x {columns} grid in raster"
                " order",
            )


def sources_are_the_groups_tokens_are_made_of(name: str) -> None:
    """Nudge every patch, encoder blocks off: what changes are the tokens whose source it is."""
    family = registry.families()[name]
    if "no_grid" in family.traits:
        return
    model, _, call, pieces = _case(name, 2)
    block, source = host_of(model).blocks[0], torch.cat([p.source for p in pieces])
    with _blocks_off(model):
        want, seen, reached = _features(model, call), list[Tensor](), set[int]()
        with _before(block, lambda x: seen.append(x) or x):
            _features(model, call)
        for patch in range(_patches(family, model, seen[0])):
            with _before(block, lambda x, patch=patch: _nudged(family, model, x, patch)):
                changed = (_features(model, call) - want).abs().amax(1) > 1e-9
            found = changed.nonzero()[:, 0].tolist()
            told = (
                (source == _group_of(family, model.config, patch, pieces)).nonzero()[:, 0].tolist()
            )
            require(
                found == told,
                f"{name}: patch {patch} is part of tokens {found}, the layout says {told}",
            )
            reached |= set(found)
    sourced = set((source >= 0).nonzero()[:, 0].tolist())
    require(reached == sourced, f"{name}: tokens {sorted(sourced - reached)} are of no patch")


def groups_are_equal_and_complete(name: str) -> None:
    """Every group of a tile has as many patches."""
    family = registry.families()[name]
    if "no_grid" in family.traits:
        return
    group = family.group(exact(name).config)
    if not isinstance(group, int):
        sizes = set(torch.bincount(group).tolist())
        require(len(sizes) == 1, f"{name}: groups of {sorted(sizes)} patches")


def the_feature_block_is_what_the_projector_takes(name: str) -> None:
    """NaN from the block reaches the features; NaN from the next one does not."""
    model, _, call, _ = _case(name, 1)
    blocks = host_of(model).blocks
    at = registry.families()[name].feature_block(model.config, len(blocks))
    require(_poisoned(model, call, blocks[at]), f"{name}: block {at} does not reach the features")
    if at + 1 < len(blocks):
        require(
            not _poisoned(model, call, blocks[at + 1]),
            f"{name}: block {at + 1}, after the feature block, reaches the features",
        )


def resizing_to_the_same_grid_changes_nothing(name: str) -> None:
    """Where the encoder takes other sizes, `resize` to the size there is changes nothing."""
    resize = registry.families()[name].resize
    if resize is None:
        return
    model, _, call, pieces = _case(name, 2)
    grids = [(int(p.place[:, 0].max()) + 1, int(p.place[:, 1].max()) + 1) for p in pieces]
    close(_features(model, resize(model, call, grids))[None], _features(model, call)[None], 1e-6)


def a_batch_answers_as_its_prompts_do(name: str) -> None:
    """Left padding, several images and none: each row of a batch is its own run."""
    model = exact(name)
    for count in (0, 2):
        alone = [double(name, count), double(name, 1, seed=3)]
        both = generate(model, batch(name, *alone), 4)[1]
        for row, inputs in enumerate(alone):
            want = generate(model, inputs, 4)[1]
            close(both[row : row + 1], want, what=f"{name}, row {row} of a batch")


def pixels_and_attention_matter(name: str) -> None:
    """On the tiny model a flipped image moves the answer's logits, so that a wrong cut shows."""
    model, inputs = exact(name), double(name, 1)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    moved = (generate(model, inputs, 1)[1] - generate(model, other, 1)[1]).abs().max()
    require(float(moved) > 1e-2, f"{name}: a flipped image moves the logits by {float(moved):.2g}")


def none_changes_no_bit(name: str) -> None:
    """Under `none` the model answers as without a session, in both precisions."""
    for model, inputs in ((exact(name), double(name)), (build(name), prompt(name))):
        want = generate(model, inputs, 3)[1]
        with Session(model, "none"):
            require(
                torch.equal(generate(model, inputs, 3)[1], want),
                f"{name}: a session of `none` changes the logits",
            )


RULES: tuple[Callable[[str], None], ...] = (
    describes_a_model,
    pieces_account_for_every_placeholder,
    sources_are_the_groups_tokens_are_made_of,
    groups_are_equal_and_complete,
    the_feature_block_is_what_the_projector_takes,
    resizing_to_the_same_grid_changes_nothing,
    a_batch_answers_as_its_prompts_do,
    pixels_and_attention_matter,
    none_changes_no_bit,
)


# ----------------------------------------------------------------------------------- how it is seen
def _case(name: str, count: int) -> tuple[Any, dict[str, Tensor], dict[str, Any], list[Piece]]:
    """Model, inputs, arguments of get_image_features, pieces."""
    model, inputs = exact(name), double(name, count)
    call = host_of(model).image_call(inputs)
    return model, inputs, call, registry.families()[name].layout(model, call)


def _features(model: Any, call: dict[str, Any]) -> Tensor:
    """[tokens, D] in placeholder order."""
    with torch.no_grad():
        out = model.base_model.get_image_features(**call).pooler_output
    return out.flatten(0, -2) if isinstance(out, Tensor) else torch.cat(tuple(out))


@contextmanager
def _before(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what enters a block."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _blocks_off(model: Any) -> Iterator[None]:
    """Encoder blocks that hand on what they get: a token then depends on its own patches only."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        same = args[0] if args else kwargs["hidden_states"]
        return (same, *output[1:]) if isinstance(output, tuple) else same

    handles = [
        b.register_forward_hook(hook, with_kwargs=True, prepend=True) for b in host_of(model).blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _poisoned(model: Any, call: dict[str, Any], block: nn.Module) -> bool:
    def hook(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = torch.full_like(x, torch.nan)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = block.register_forward_hook(hook, prepend=True)  # before those that record states
    try:
        return bool(_features(model, call).isnan().any())
    finally:
        handle.remove()


def _patches(family: Family, model: Any, hidden: Tensor) -> int:
    prefix = family.prefix(model.config)
    return len(hidden) if hidden.ndim == 2 else hidden.shape[0] * (hidden.shape[1] - prefix)


def _nudged(family: Family, model: Any, hidden: Tensor, patch: int) -> Tensor:
    out, prefix = hidden.clone(), family.prefix(model.config)
    step = torch.linspace(-3, 3, out.shape[-1], dtype=out.dtype)
    if out.ndim == 2:
        out[patch] += step
    else:
        per = out.shape[1] - prefix
        out[patch // per, prefix + patch % per] += step
    return out


def _group_of(family: Family, config: Any, patch: int, pieces: list[Piece]) -> int:
    """Group in encoder order of a patch of the flattened encoder input, prefixes not counted."""
    group = family.group(config)
    if family.rows:
        assert isinstance(group, int)
        return int(squares(pieces, group)[patch])
    if isinstance(group, int):
        return patch // group
    return patch // len(group) * (int(group.max()) + 1) + int(group[patch % len(group)])
