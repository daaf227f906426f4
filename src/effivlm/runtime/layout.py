"""Where a prompt's images stand: placeholders, which the encoder's pieces fill in order.

Shapes: B batch, L prompt length, D width.
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from effivlm.errors import EffivlmError
from effivlm.families.base import Family, Piece
from effivlm.runtime.tokens import Image


class LayoutError(EffivlmError, RuntimeError):
    """The prompt's placeholders do not match the images that were encoded."""


def find_images(visual: Tensor, real: Tensor, pieces: list[Piece], family: Family) -> list[Image]:
    """Assign placeholders to images, in order.

    Args:
        visual: [B, L] bool, True at image placeholders.
        real: [B, L] bool, False for the batch's padding.
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
        end = int(real[row].nonzero()[-1]) if len(slots) else -1
        for number, (count, group) in enumerate(_grouped(slots, queue, family.run_is_image)):
            image = _image(row, number, slots[:count], group, family, device)
            images.append(replace(image, last=int(image.slots[-1]) == end))
            slots = slots[count:]
    return images


def marked_images(visual: Tensor, real: Tensor) -> list[Image]:
    """Images of which only the places are known: every unbroken run of ``visual`` [B, L]."""
    images: list[Image] = []
    for row in range(len(visual)):
        slots = visual[row].nonzero()[:, 0]
        end = int(real[row].nonzero()[-1]) if len(slots) else -1
        starts = (torch.nn.functional.pad(slots.diff(), (1, 0), value=2) > 1).nonzero()[:, 0]
        runs = slots.tensor_split(starts[1:].cpu()) if len(slots) else ()
        for number, run in enumerate(runs):
            place = torch.full((len(run), 2), torch.nan, device=run.device)
            none = torch.zeros_like(run)
            images.append(
                Image(
                    row, number, run, none - 1, place, none, none.bool(), last=int(run[-1]) == end
                )
            )
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


def prompt_keys(ids: Tensor | None, embeds: Tensor, real: Tensor) -> list[int]:
    """Per row, an integer that identifies the prompt whatever batch it is in."""
    out = []
    for row in range(len(real)):
        if ids is not None:
            content = ids[row][real[row].to(ids.device)]
        else:
            content = embeds[row][real[row]].float().sum(-1)
        digest = hashlib.sha256(content.cpu().numpy().tobytes()).digest()
        out.append(int.from_bytes(digest[:7], "little"))
    return out
