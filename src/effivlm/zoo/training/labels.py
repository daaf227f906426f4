"""What every visual token of a model shows, in words; and pictures with several questions each as
training batches.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effivlm.families.loading import family_of
from effivlm.runtime.host import host_of
from effivlm.zoo.build import make_model, make_processor
from effivlm.zoo.charts import make_chart
from effivlm.zoo.pages import make_page
from effivlm.zoo.pictures import GRID, Picture
from effivlm.zoo.scenes import album_question, make_album, make_scene
from effivlm.zoo.words import NOTHING, ORDINALS, make_tokenizer, spelled, token_of, vocabulary

WORDS = 5  # words a token shows at most
COVER = 0.12  # a mark shows in a token if it covers this share of it
ASKED = {
    "caption": 0.7,
    "listing": 0.7,
    "number": 0.3,
    "word": 0.3,
    "shape": 0.5,
}  # share of pictures asked so; else all
Prompt = Sequence[Any]  # the pictures of one prompt
IDS = {t: i for i, t in enumerate(vocabulary())}


@dataclass(frozen=True)
class Spot:
    """Where the visual tokens of one picture stand. ``grid``: rows of the unit a token is in; 0 for
    newline tokens.
    """

    row: Tensor
    column: Tensor
    grid: Tensor
    whole: Tensor  # whether the encoder sees the whole picture there


class Reader:
    """What a model of the zoo makes of pictures: its inputs, its tokens' spots, its positions."""

    def __init__(self, name: str) -> None:
        self.model, self.processor = make_model(name).eval(), make_processor(name)
        self.family = family_of(self.model)
        self.known: dict[int, tuple[tuple[Spot, ...], list[int], Tensor]] = {}

    def call(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Arguments of ``get_image_features`` for rendered prompts."""
        images = [[p.draw() for p in prompt] for prompt in prompts]
        given = self.processor.image_processor(images, return_tensors="pt")
        return host_of(self.model).image_call(given)

    def spots(self, prompt: Prompt) -> tuple[Spot, ...]:
        """Spots of every picture of a prompt; prompts with as many pictures are alike."""
        return self.opening(prompt)[0]

    def opening(self, prompt: Prompt) -> tuple[tuple[Spot, ...], list[int], Tensor]:
        """What prompts with as many pictures share: spots, ids before the question [P], their
        positions [axes or 1, P].
        """
        if len(prompt) not in self.known:
            call = self.call([prompt])
            pieces = self.family.layout(self.model, call)
            share = len(pieces) // len(prompt)  # tiles a picture, where each is a piece
            spots = tuple(_spot(pieces[i : i + share]) for i in range(0, len(pieces), share))
            ids = [IDS["<s>"], IDS["<user>"]]
            for name, spot in zip(ORDINALS, spots, strict=False):
                ids += [
                    IDS[f" {name}"],
                    IDS["<img>"],
                    *[IDS["<image>"]] * len(spot.row),
                    IDS["</img>"],
                ]
            self.known[len(prompt)] = spots, ids, self._positions(torch.tensor([ids]), call)
        return self.known[len(prompt)]

    def _positions(self, ids: Tensor, call: dict[str, Tensor]) -> Tensor:
        if not hasattr(self.model.base_model, "get_rope_index"):
            return torch.arange(ids.shape[1])[None]
        kinds = (ids == self.model.config.image_token_id).int()
        grids = call["image_grid_thw"]
        return self.model.base_model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grids
        )[0][:, 0]


def _spot(pieces: list[Any]) -> Spot:
    if len(pieces) > 1:
        return _tiled(pieces)
    place, unit = torch.cat([p.place for p in pieces]), torch.cat([p.unit for p in pieces])
    sides = {int(u): int(place[(unit == u)][:, 0].nan_to_num(0).max()) + 1 for u in unit.unique()}
    grid = torch.tensor([sides[int(u)] for u in unit]).masked_fill(place[:, 0].isnan(), 0)
    return Spot(place[:, 0].nan_to_num(0).long(), place[:, 1].nan_to_num(0).long(), grid, unit == 0)


def _tiled(pieces: list[Any]) -> Spot:
    """Tiles in raster order, then the thumbnail."""
    side, tiles = math.isqrt(len(pieces) - 1), [_spot([p]) for p in pieces]
    rows = [t.row + int(t.grid[0]) * (i // side) for i, t in enumerate(tiles[:-1])]
    columns = [t.column + int(t.grid[0]) * (i % side) for i, t in enumerate(tiles[:-1])]
    grid, last = torch.cat([t.grid * side for t in tiles[:-1]]), tiles[-1]
    return Spot(
        torch.cat([*rows, last.row]),
        torch.cat([*columns, last.column]),
        torch.cat([grid, last.grid]),
        torch.cat([torch.zeros_like(grid, dtype=torch.bool), last.whole]),
    )


def labels(picture: Picture, spot: Spot) -> Tensor:
    """[n, WORDS] long: ids of the words that every token shows, 0 where there are fewer."""
    out = torch.zeros(len(spot.row), WORDS, dtype=torch.long)
    out[:, 0] = IDS[token_of(NOTHING)]
    for grid in sorted(set(spot.grid.tolist()) - {0}):
        cell = picture.size / grid
        shown = _cells(picture, cell, grid, coarse=cell > GRID)
        for i in (spot.grid == grid).nonzero()[:, 0].tolist():
            mark = shown.get((int(spot.row[i]), int(spot.column[i])))
            if mark is not None:
                words = [
                    IDS[token_of(w)] for w in (*mark.words, *(mark.placed if spot.whole[i] else ()))
                ]
                out[i, : len(words)] = torch.tensor(words)
    return out


def _cells(picture: Picture, cell: float, grid: int, coarse: bool) -> dict[tuple[int, int], Any]:
    """Cell of a grid -> the mark that covers most of it."""
    best: dict[tuple[int, int], tuple[float, Any]] = {}
    for mark in picture.marks:
        if coarse and mark.fine:
            continue
        x0, y0, x1, y1 = mark.box
        for r in range(int(y0 // cell), min(grid, int(-(-y1 // cell)))):
            for c in range(int(x0 // cell), min(grid, int(-(-x1 // cell)))):
                w = min(x1, (c + 1) * cell) - max(x0, c * cell)
                h = min(y1, (r + 1) * cell) - max(y0, r * cell)
                if w * h > max(
                    best.get((r, c), (COVER * cell * cell, None))[0], COVER * cell * cell
                ):
                    best[r, c] = (w * h, mark)
    return {at: mark for at, (_, mark) in best.items()}


@dataclass
class Batch:
    """Prompts of one kind, each with several questions that do not see each other.

    Attributes:
        ids: [B, T] tokens: before the questions (P of them, alike in all rows), then questions and
            answers.
        labels: [B, T], -100 where nothing is learnt. segment: [B, T], 0 before the questions, then
            1, 2, ...; -1 padding.
        position: [axes or 1, B, T]. words: [B, n, WORDS] of the visual tokens. call: encoder
            inputs, None in `language`.
        kinds: per row, the kind of every segment.
    """

    ids: Tensor
    labels: Tensor
    segment: Tensor
    position: Tensor
    words: Tensor
    call: dict[str, Tensor] | None
    kinds: list[list[str]]

    @property
    def mask(self) -> Tensor:
        """[B, 1, T, T] bool: before the questions causally, in a question causally and all before
        the questions.
        """
        s = self.segment
        seen = (s[:, None, :] == 0) | (s[:, None, :] == s[:, :, None])
        return (
            seen & torch.ones(s.shape[1], s.shape[1], dtype=torch.bool, device=s.device).tril()
        )[:, None]

    def to(self, device: str) -> "Batch":
        """The batch on a device."""
        call = None if self.call is None else {k: v.to(device) for k, v in self.call.items()}
        ids, labels, segment = (x.to(device) for x in (self.ids, self.labels, self.segment))
        return Batch(
            ids, labels, segment, self.position.to(device), self.words.to(device), call, self.kinds
        )


class Batches(torch.utils.data.IterableDataset[Batch]):
    """Endless batches from seeds ``start``, ``start + 1``, ...; with ``test``, of reserved
    combinations.
    """

    def __init__(
        self,
        name: str,
        batch: int,
        start: int,
        pixels: bool,
        test: bool = False,
        questions: bool = True,
    ) -> None:
        self.name, self.batch, self.start, self.pixels, self.test, self.questions = (
            name,
            batch,
            start,
            pixels,
            test,
            questions,
        )

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        seed = self.start + (worker.id if worker else 0) * 100_000_000
        reader, tokenizer = Reader(self.name), make_tokenizer()
        while True:
            yield self.make(seed, reader, tokenizer)
            seed += self.batch

    def make(self, seed: int, reader: Reader, tokenizer: Any) -> Batch:
        """The batch from a seed."""
        rng = random.Random(seed)
        if rng.random() < 0.15:
            count = rng.choice((2, 3, 4))
            prompts: list[Prompt] = [
                make_album(seed + i, self.test, count) for i in range(self.batch)
            ]
        else:
            makers: list[Any] = [make_scene] * 2 + [make_page, make_chart]
            prompts = [(rng.choice(makers)(seed + i, self.test),) for i in range(self.batch)]
        spots, head, position = reader.opening(prompts[0])
        words = torch.stack(
            [
                torch.cat([labels(p, s) for p, s in zip(prompt, spots, strict=True)])
                for prompt in prompts
            ]
        )
        call = reader.call(prompts) if self.pixels else None
        rows = [
            _segments(_asked(p, random.Random(seed + i)), tokenizer) if self.questions else []
            for i, p in enumerate(prompts)
        ]
        return _batch(head, position, rows, words, call)


def _asked(prompt: Prompt, rng: random.Random) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of a prompt."""
    if len(prompt) > 1:
        seen = {a for _ in range(4) if (a := album_question(prompt, rng)) is not None}
        return [("album", *a) for a in sorted(seen)]
    asked = prompt[0].questions(rng)
    return [(k, *a) for k, a in asked.items() if rng.random() < ASKED.get(k, 1.0)]


def _segments(
    asked: list[tuple[str, str, str]], tokenizer: Any
) -> list[tuple[str, list[int], list[int]]]:
    return [
        (k, tokenizer(f" {q}").input_ids, tokenizer(f"{spelled(a)}</s>").input_ids)
        for k, q, a in asked
    ]


def _batch(
    head: list[int],
    position: Tensor,
    rows: list[Any],
    words: Tensor,
    call: dict[str, Tensor] | None,
) -> Batch:
    width = len(head) + max((sum(len(q) + len(a) for _, q, a in row) for row in rows), default=0)
    shape = (len(rows), width)
    ids, targets, segment = (
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, -100),
        torch.full(shape, -1),
    )
    where = torch.zeros(len(position), *shape, dtype=torch.long)
    ids[:, : len(head)], segment[:, : len(head)], where[:, :, : len(head)] = (
        torch.tensor(head),
        0,
        position[:, None],
    )
    for b, row in enumerate(rows):
        at = len(head)
        for number, (_, question, answer) in enumerate(row, start=1):
            end = at + len(question) + len(answer)
            ids[b, at:end], segment[b, at:end] = torch.tensor(question + answer), number
            targets[b, at + len(question) : end] = torch.tensor(answer)
            where[:, b, at:end] = int(position.max()) + 1 + torch.arange(end - at)
            at = end
    return Batch(
        ids, targets, segment, where, words, call, [[k for k, _, _ in row] for row in rows]
    )
