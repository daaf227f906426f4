"""Renders the scenes of the built-in suite: coloured shapes on a loose grid, a number and a word; and asks about them.

Everything follows from a seed. The renderer knows what is in every patch, which gives dense labels for training.
"""

import functools
import random
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIZE, CELL = 160, 32  # pixels
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


@dataclass(frozen=True)
class Item:
    """A shape, or one character of a text. ``box``: left, top, right, bottom in pixels."""

    kind: str  # a shape, or a character
    colour: str  # a colour name, or "black" for characters
    box: tuple[int, int, int, int]

    @property
    def place(self) -> str:
        """Where its centre lies, such as ``top left``."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        return f"{ROWS[min(2, int(3 * y / SIZE))]} {COLUMNS[min(2, int(3 * x / SIZE))]}"


@dataclass(frozen=True)
class Scene:
    """A picture in words: shapes in reading order, one number and one word."""

    shapes: tuple[Item, ...]
    number: str
    word: str
    characters: tuple[Item, ...]


def make_scene(seed: int) -> Scene:
    """A scene drawn from ``seed``: three to six shapes, a number of two digits, a word of three letters."""
    rng = random.Random(seed)
    number = str(rng.randrange(10, 100))
    word = "".join(rng.sample(LETTERS, 3))
    cells = [(r, c) for r in range(5) for c in range(5)]
    characters: list[Item] = []
    for text in (number, word):
        r, c = rng.choice([(r, c) for r, c in cells if c < 4 and (r, c + 1) in cells])
        cells = [x for x in cells if x not in ((r, c), (r, c + 1))]
        x, y = c * CELL + rng.randrange(2, 64 - 18 * len(text)), r * CELL + rng.randrange(0, 6)
        characters += [Item(ch, "black", (x + 18 * i, y, x + 18 * i + 18, y + 26)) for i, ch in enumerate(text)]
    shapes = []
    for r, c in rng.sample(cells, rng.randrange(3, 7)):
        side = rng.randrange(20, 28)
        x, y = c * CELL + rng.randrange(0, CELL - side), r * CELL + rng.randrange(0, CELL - side)
        shapes.append(Item(rng.choice(SHAPES), rng.choice(list(COLOURS)), (x, y, x + side, y + side)))
    shapes.sort(key=lambda s: (s.box[1] // CELL, s.box[0]))
    return Scene(tuple(shapes), number, word, tuple(characters))


def draw(scene: Scene) -> Image.Image:
    """The picture, ``SIZE`` x ``SIZE`` RGB."""
    image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for item in scene.shapes:
        _shape(pen, item)
    font = ImageFont.load_default(26)
    for item in scene.characters:
        middle = ((item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2)
        pen.text(middle, item.kind, fill=(0, 0, 0), font=font, anchor="mm")
    return image


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
        points = [
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
        pen.polygon([(x0 + w * a, y0 + w * b) for a, b in points], fill=fill)


# ------------------------------------------------------------------------------------------------------ questions
def caption(scene: Scene) -> str:
    """Every shape in reading order with colour and place."""
    return " , ".join(f"{s.colour} {s.kind} {s.place}" for s in scene.shapes)


def questions(scene: Scene, rng: random.Random) -> dict[str, tuple[str, str]]:
    """One question and answer for every task that the scene allows."""
    kinds, colours = [s.kind for s in scene.shapes], [s.colour for s in scene.shapes]
    out = {
        "number": ("what number is written ?", scene.number),
        "word": ("what word is written ?", scene.word),
        "caption": ("list all shapes .", caption(scene)),
        "exist": _exist(scene, rng),
    }
    kind = rng.choice([*kinds, *SHAPES])
    out["count"] = (f"how many {PLURALS[kind]} ?", NUMBERS[kinds.count(kind)])
    for name, mine, others, ask in (
        ("colour", kinds, colours, "what colour is the {} ?"),
        ("shape", colours, kinds, "what shape is {} ?"),
    ):
        unique = [i for i, x in enumerate(mine) if mine.count(x) == 1]
        if unique:
            i = rng.choice(unique)
            out[name] = (ask.format(mine[i]), others[i])
    pairs = [(s.colour, s.kind) for s in scene.shapes]
    single = [s for s in scene.shapes if pairs.count((s.colour, s.kind)) == 1]
    if single:
        s = rng.choice(single)
        out["where"] = (f"where is the {s.colour} {s.kind} ?", s.place)
    return out


def _exist(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Half present; absent ones combine a colour and a shape that the scene does hold, where it can."""
    pairs = {(s.colour, s.kind) for s in scene.shapes}
    if rng.random() < 0.5:
        colour, kind = rng.choice(sorted(pairs))
        return f"is there a {colour} {kind} ?", "yes"
    mixed = sorted({(a, b) for a, _ in pairs for _, b in pairs} - pairs)
    anything = sorted({(c, k) for c in COLOURS for k in SHAPES} - pairs)
    colour, kind = rng.choice(mixed or anything)
    return f"is there a {colour} {kind} ?", "no"


def test_rows(task: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows of a built-in task, from seeds that training never uses; the picture is drawn when it is opened.

    Raises:
        TypeError: for a task that the renderer does not know.
    """
    rows: list[dict[str, Any]] = []
    for seed in range(first, 10 * count + first):
        scene = make_scene(seed)
        asked = questions(scene, random.Random(seed))
        if task in asked:
            question, answer = asked[task]
            rows.append({"id": seed, "question": question, "answers": [answer], "images": [functools.partial(draw, scene)]})
        if len(rows) == count:
            return rows
    raise TypeError(f"the renderer makes no task {task!r}: it knows {', '.join(sorted(asked))}")
