"""Which tokens exist, which are visual, where they came from; positions, masks and side inputs
follow a keep list.

Shapes: B batch, L prompt length, M tokens in play (short rows padded on the left), D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effivlm.families.base import Family, Piece
from effivlm.methods.base import Merge
from effivlm.ops.precision import working, working_dtype

Mask = Tensor | dict[str, Any] | None


# ---------------------------------------------------------------------------------------- gathering
def take(x: Tensor, index: Tensor, dim: int, batch: int) -> Tensor:
    """Batched gather: ``out[..., b, ..., m, ...] = x[..., b, ..., index[b, m], ...]``; a batch axis
    of 1 broadcasts.
    """
    dim, batch = dim % x.ndim, batch % x.ndim
    shape = [1] * x.ndim
    shape[batch], shape[dim] = index.shape
    return torch.take_along_dim(x, index.view(shape).to(x.device), dim)


def take_mask(mask: Mask, index: Tensor) -> Mask:
    """Rows and columns of a prefill mask: None, one per layer type, 2-D padding mask, 4-D bool or
    additive mask.
    """
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {k: take_mask(m, index) for k, m in mask.items()}
    return (
        take(mask, index, -1, 0) if mask.ndim == 2 else take(take(mask, index, -1, 0), index, -2, 0)
    )


def hide(mask: Any, valid: Tensor, diagonal: bool = True) -> Any:
    """Hide invalid keys ([B, M] or [B, H, M]); padding rows keep themselves so that no softmax row
    is empty.
    """
    if isinstance(mask, dict):
        return {k: hide(m, valid, diagonal) for k, m in mask.items()}
    if mask.ndim == 2:
        return mask * valid.to(mask.dtype)
    out = ~valid[:, None, None, :] if valid.ndim == 2 else ~valid[:, :, None, :]
    if diagonal:
        out = out & ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return (
        mask & ~out
        if mask.dtype == torch.bool
        else mask.masked_fill(out, torch.finfo(mask.dtype).min)
    )


def to_index(keep: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bool [B, N] -> index [B, M] ascending, short rows padded on the left with dropped tokens;
    validity or None.
    """
    counts = keep.sum(1)
    index = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, -int(counts.max()) :]
    return index, None if bool((counts == counts.max()).all()) else keep.gather(1, index)


def merge_rows(x: Tensor, where: Tensor, merge: Merge) -> Tensor:
    """A copy of x [S, D] in which row ``where[target]`` is the weighted sum of rows
    ``where[source]``, in float32.
    """
    target, source = where[merge.target.to(x.device)], where[merge.source.to(x.device)]
    rows = torch.zeros(x.shape, dtype=working_dtype(x), device=x.device)
    rows.index_add_(0, target, working(merge.weight.to(x.device)[:, None]) * working(x[source]))
    out = x.clone()
    out[target] = rows[target].to(x.dtype)
    return out


# --------------------------------------------------------------------------------------- the prompt
@dataclass
class Image:
    """One image of one prompt.

    Attributes:
        row: batch row. number: 0, 1, ... within the row. slots: [n] long, logical positions of its
            placeholders.
        source: [n] long, group in encoder order, -1 for tokens without one. place: [n, 2] row and
            column, NaN without.
        unit: [n] long, pruning unit (tile, base, mosaic). newline: [n] bool, extra tokens that show
            no part of the image.
        pieces: what it was encoded as.
        entered: method -> tokens its first stage was given (methods with several stages).
    """

    row: int
    number: int
    slots: Tensor
    source: Tensor
    place: Tensor
    unit: Tensor
    newline: Tensor
    entered: dict[str, int] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()


@dataclass
class Prompt:
    """State of one prefill; all indices are logical unless said otherwise.

    Attributes:
        visual: [B, L] bool. real: [B, L] bool, False for the batch's own padding. images: all
            images, row by row.
        keys: per row, an integer that identifies the prompt.
        embeds: [B, L, D] what would enter the LLM. side: sequence-aligned inputs of the text model
            (deep stack).
        index: [B, M] tokens in play. valid: [B, M], False for padding from unequal budgets, or
            None.
        rel: [B, M] the same tokens as rows of the text model's input, or None: all of them.
        kept: layer -> (index, valid) of the tokens that entered it. lengths: layer -> tokens
            entering, read off tensors.
    """

    visual: Tensor
    real: Tensor
    images: list[Image]
    keys: list[int]
    embeds: Tensor
    side: dict[str, Any]
    index: Tensor
    valid: Tensor | None = None
    rel: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def alive(self, row: int) -> Tensor:
        """[m] long: positions among the M tokens in play of ``row`` that are neither padding of one
        kind nor the other.
        """
        ok = self.real[row].gather(0, self.index[row])
        if self.valid is not None:
            ok = ok & self.valid[row]
        return ok.nonzero()[:, 0]

    def narrow(self, keep: Tensor) -> Tensor:
        """Keep ``keep`` [B, M] bool of the tokens in play; returns the chosen positions among them,
        [B, M'].
        """
        sub, valid = to_index(keep)
        self.index = self.index.gather(1, sub)
        if self.valid is not None:
            valid = self.valid.gather(1, sub) & (True if valid is None else valid)
        self.valid = valid
        return sub


class LayoutError(RuntimeError):
    """The prompt's placeholders do not match the images that were encoded."""


def find_images(visual: Tensor, pieces: list[Piece], family: Family) -> list[Image]:
    """Assign placeholders to images, in order.

    Args:
        visual: [B, L] bool, True at image placeholders.
        pieces: in placeholder order over the whole batch, once, or once per beam.
        family: says whether an image is one piece or one unbroken run of placeholders.

    Raises:
        LayoutError: if counts differ.
    """
    device = visual.device
    total, once = int(visual.sum()), sum(len(p.source) for p in pieces)
    if not once or total % once:
        raise LayoutError(
            f"{total} image placeholders in the prompt, {once} visual tokens from the encoder"
        )
    beams = max(1, total // once)  # generation repeats every row `beams` times before prefill
    images: list[Image] = []
    queue, before = list(pieces), list(pieces)
    for row in range(visual.shape[0]):
        if row % beams:
            queue = before
        before = list(queue)
        slots = visual[row].nonzero()[:, 0]
        for number, (count, group) in enumerate(_grouped(slots, queue, family.run_is_image)):
            images.append(_image(row, number, slots[:count], group, family, device))
            slots = slots[count:]
    return images


def _grouped(
    slots: Tensor, queue: list[Piece], run_is_image: bool
) -> list[tuple[int, list[Piece]]]:
    """Pieces of one row's images, taken off the queue: one piece an image, or all pieces of one
    unbroken run.
    """
    runs = (
        torch.nn.functional.pad((slots.diff() > 1).int(), (1, 0)).cumsum(0).bincount().tolist()
        if len(slots)
        else []
    )
    budget = runs if run_is_image else [len(slots)]
    out: list[tuple[int, list[Piece]]] = []
    for room in budget:
        group: list[Piece] = []
        taken = 0
        while taken < room:
            piece = queue.pop(0)
            taken += len(piece.source)
            group.append(piece)
            if not run_is_image:
                out.append((len(piece.source), [piece]))
        if taken != room:
            raise LayoutError(
                f"a run of {room} image placeholders does not hold a whole number of images or"
                " tiles"
            )
        if run_is_image:
            out.append((taken, group))
    return out


def _image(
    row: int, number: int, slots: Tensor, group: list[Piece], family: Family, device: torch.device
) -> Image:
    unit, base = [], 0
    for piece in group:
        unit.append(piece.unit + base)
        base += int(piece.unit.max()) + 1
    source = torch.cat([p.source for p in group]).to(device)
    place = torch.cat([p.place for p in group]).to(device)
    blank = (
        torch.zeros_like(source, dtype=torch.bool)
        if "no_encoder_signals" in family.traits
        else source < 0
    )
    return Image(
        row, number, slots, source, place, torch.cat(unit).to(device), blank, pieces=tuple(group)
    )


def everything(shape: tuple[int, int], device: torch.device) -> Tensor:
    """[B, L] long: every logical index of every row."""
    return torch.arange(shape[1], device=device).expand(*shape)


def find_visual(
    config: Any, kwargs: Mapping[str, Any], embed: torch.nn.Module, prefilling: bool
) -> Tensor:
    """[B, L] bool: image placeholders, from ids, or from embeddings equal to the placeholder's.

    ``prefilling``: the ids are a prompt; generated ids may hold any token.

    Raises:
        NotImplementedError: for video placeholders.
    """
    ids = kwargs.get("input_ids")
    if ids is not None:
        video = getattr(config, "video_token_id", None)
        if prefilling and video is not None and bool((ids == video).any()):
            raise NotImplementedError(
                "video placeholders in the prompt: only images are supported; pass frames as images"
            )
        return ids == config.image_token_id
    embeds = kwargs["inputs_embeds"]
    mark = embed(torch.tensor(config.image_token_id, device=embeds.device))
    return (embeds == mark).all(-1)
