"""Scenes: coloured shapes in loose cells, a number and a word among them; and small ones without
text.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from effivlm.zoo.pictures import SIZE, Box, Mark, blank, drawn, place, text_marks, write
from effivlm.zoo.words import COLOURS, DIGITS, LETTERS, NUMBERS, ORDINALS, PLURALS, SHAPES

CELL = 40  # pixels
SMALL = 80  # pixels: side of the pictures that come in several
_TEXT_ROWS = {
    0: (0, 1),
    1: (3, 4),
    2: (5, 6),
    3: (8, 9),
}  # cell row -> rows of the character grid inside it
_STAR = [
    (0.5, 0),
    (0.62, 0.38),
    (1, 0.38),
    (0.7, 0.6),
    (0.8, 1),
    (0.5, 0.75),
    (0.2, 1),
    (0.3, 0.6),
    (0, 0.38),
    (0.38, 0.38),
]


@dataclass(frozen=True)
class Item:
    """A shape. ``box`` in pixels."""

    colour: str
    kind: str
    box: Box


@dataclass(frozen=True)
class Text:
    """A text on the character grid. ``role``: ``number`` or ``word``."""

    text: str
    role: str
    row: int
    column: int
    shift: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order, and texts."""

    size: int
    items: tuple[Item, ...]
    texts: tuple[Text, ...] = ()

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Colour, kind and place of every shape; every character with its place in its text."""
        shapes = tuple(Mark(s.box, (s.colour, s.kind), place(s.box, self.size)) for s in self.items)
        return shapes + tuple(
            m for t in self.texts for m in text_marks(t.text, t.row, t.column, t.role)
        )

    def draw(self) -> Image.Image:
        """RGB, ``size`` x ``size``."""
        image, pen = blank(self.size)
        for item in self.items:
            _shape(pen, item)
        for t in self.texts:
            write(pen, t.text, t.row, t.column, t.shift)
        return image

    def questions(self, rng: random.Random) -> dict[str, tuple[str, str]]:
        """Reading, existence, count, attributes, place, relation, and the list of all shapes."""
        kinds, colours = [s.kind for s in self.items], [s.colour for s in self.items]
        out = {t.role: (f"what {t.role} is written", t.text) for t in self.texts}
        out["exist"] = self._exist(rng)
        kind = rng.choice([*kinds, *SHAPES])
        out["count"] = (f"how many {PLURALS[kind]}", NUMBERS[kinds.count(kind)])
        out["caption"] = ("list all shapes", self.caption())
        for name, mine, others, ask in (
            ("colour", kinds, colours, "what colour is the {}"),
            ("shape", colours, kinds, "what shape is {}"),
        ):
            unique = [i for i, x in enumerate(mine) if mine.count(x) == 1]
            if unique:
                i = rng.choice(unique)
                out[name] = (ask.format(mine[i]), others[i])
        single = [
            s
            for s in self.items
            if sum((s.colour, s.kind) == (o.colour, o.kind) for o in self.items) == 1
        ]
        if single:
            s = rng.choice(single)
            out["where"] = (f"where is the {s.colour} {s.kind}", " ".join(place(s.box, self.size)))
        out |= _relation(single, rng)
        return out

    def caption(self) -> str:
        """Every shape in reading order with colour and place."""
        return " , ".join(
            f"{s.colour} {s.kind} {' '.join(place(s.box, self.size))}" for s in self.items
        )

    def _exist(self, rng: random.Random) -> tuple[str, str]:
        """Half present; absent ones combine a colour and a shape that the scene does hold, where it
        can.
        """
        pairs = {(s.colour, s.kind) for s in self.items}
        if rng.random() < 0.5:
            colour, kind = rng.choice(sorted(pairs))
            return f"is there a {colour} {kind}", "yes"
        mixed = sorted({(a, b) for a, _ in pairs for _, b in pairs} - pairs)
        colour, kind = rng.choice(
            mixed or sorted({(c, k) for c in COLOURS for k in SHAPES} - pairs)
        )
        return f"is there a {colour} {kind}", "no"


def _relation(single: list[Item], rng: random.Random) -> dict[str, tuple[str, str]]:
    """Whether one shape lies left of, right of, above or below another; only where it is clear."""
    if len(single) < 2:
        return {}
    a, b = rng.sample(single, 2)
    dx, dy = a.box[0] - b.box[0], a.box[1] - b.box[1]
    clear = [
        (w, d)
        for w, d in (("left", -dx), ("right", dx), ("above", -dy), ("below", dy))
        if abs(d) > CELL * 0.8
    ]
    if not clear:
        return {}
    word, d = rng.choice(clear)
    relation = f"to the {word} of" if word in ("left", "right") else word
    return {
        "relation": (
            f"is the {a.colour} {a.kind} {relation} the {b.colour} {b.kind}",
            "yes" if d > 0 else "no",
        )
    }


def make_scene(seed: int, test: bool) -> Scene:
    """Three to eight shapes, a number of two or three digits, a word of three or four letters."""
    rng = random.Random(seed)
    cells = [(r, c) for r in range(SIZE // CELL) for c in range(SIZE // CELL)]
    texts = []
    for role, alphabet, lengths in (("number", DIGITS, (2, 3)), ("word", LETTERS, (3, 4))):
        text = drawn(lambda a=alphabet, n=lengths: "".join(rng.sample(a, rng.choice(n))), test)
        row, half = rng.choice(
            [(r, c // 2) for r, c in cells if c % 2 == 0 and (r, c + 1) in cells]
        )
        cells = [(r, c) for r, c in cells if (r, c // 2) != (row, half)]
        column = 5 * half + rng.randrange(0, 6 - len(text))
        texts.append(
            Text(
                text,
                role,
                rng.choice(_TEXT_ROWS[row]),
                column,
                (rng.randrange(-1, 2), rng.randrange(-1, 2)),
            )
        )
    count = rng.randrange(3, 9)
    return Scene(SIZE, drawn(lambda: _items(rng, cells, count), test, _pairs), tuple(texts))


def make_small(seed: int, test: bool) -> Scene:
    """One or two shapes and no text, ``SMALL`` pixels wide."""
    rng = random.Random(seed)
    cells = [(r, c) for r in range(SMALL // CELL) for c in range(SMALL // CELL)]
    return Scene(SMALL, drawn(lambda: _items(rng, cells, rng.randrange(1, 3)), test, _pairs))


def make_album(seed: int, test: bool, count: int | None = None) -> tuple[Scene, ...]:
    """Two to four small scenes."""
    rng = random.Random(seed)
    count = count or rng.randrange(2, 5)
    return tuple(make_small(rng.randrange(2**40), test) for _ in range(count))


def album_question(album: Sequence[Scene], rng: random.Random) -> tuple[str, str] | None:
    """Which picture shows a shape that only one of them shows."""
    pairs = [(i, s.colour, s.kind) for i, scene in enumerate(album) for s in scene.items]
    only = [p for p in pairs if sum(q[1:] == p[1:] for q in pairs) == 1]
    if not only:
        return None
    i, colour, kind = rng.choice(only)
    return f"which picture shows a {colour} {kind}", ORDINALS[i]


def _items(rng: random.Random, cells: list[tuple[int, int]], count: int) -> tuple[Item, ...]:
    out = []
    for r, c in sorted(rng.sample(cells, count)):
        side = rng.randrange(24, 35)
        x, y = c * CELL + rng.randrange(0, CELL - side), r * CELL + rng.randrange(0, CELL - side)
        out.append(Item(rng.choice(list(COLOURS)), rng.choice(SHAPES), (x, y, x + side, y + side)))
    return tuple(out)


def _pairs(items: tuple[Item, ...]) -> str:
    return " ".join(sorted({f"{s.colour} {s.kind}" for s in items}))


def _shape(pen: ImageDraw.ImageDraw, item: Item) -> None:
    x0, y0, x1, y1 = item.box
    w, fill = x1 - x0, COLOURS[item.colour]
    if item.kind == "circle":
        pen.ellipse(item.box, fill=fill)
    elif item.kind == "square":
        pen.rectangle(item.box, fill=fill)
    elif item.kind == "triangle":
        pen.polygon([((x0 + x1) / 2, y0), (x1, y1), (x0, y1)], fill=fill)
    elif item.kind == "cross":
        pen.rectangle((x0 + w * 0.35, y0, x0 + w * 0.65, y1), fill=fill)
        pen.rectangle((x0, y0 + w * 0.35, x1, y0 + w * 0.65), fill=fill)
    else:
        pen.polygon([(x0 + w * a, y0 + w * b) for a, b in _STAR], fill=fill)
