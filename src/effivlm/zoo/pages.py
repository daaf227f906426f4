"""Pages: a form of labelled fields, each label above its value."""

import random
from dataclasses import dataclass

from PIL import Image, ImageFont

from effivlm.zoo.pictures import GRID, SIZE, Mark, blank, drawn, text_marks, write
from effivlm.zoo.words import DIGITS, LABELS, LETTERS

_SLOTS = [
    (row, column) for row in (0, 3, 5, 8) for column in (0, 5)
]  # character grid: of the label; the value is below


@dataclass(frozen=True)
class Field:
    """A labelled value. ``row``, ``column``: cell of the label; ``indent``: cells before it."""

    label: str
    value: str
    row: int
    column: int
    indent: int
    shift: tuple[int, int]


@dataclass(frozen=True)
class Page:
    """A form of four to six fields."""

    fields: tuple[Field, ...]
    size: int = SIZE

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Labels, and characters that know their place in the value and its label."""
        out: list[Mark] = []
        for f in self.fields:
            width = ImageFont.load_default(14).getlength(f.label)
            x, y = GRID * f.column, GRID * f.row
            out.append(Mark((x, y, x + width, y + GRID), (f.label,), fine=True))
            out += text_marks(f.value, f.row + 1, f.column + f.indent, f.label)
        return tuple(out)

    def draw(self) -> Image.Image:
        """RGB, ``size`` x ``size``."""
        image, pen = blank(self.size)
        font = ImageFont.load_default(14)
        for f in self.fields:
            middle = (GRID * f.column + 1, GRID * f.row + GRID / 2 + f.shift[1])
            pen.text(middle, f.label, fill=(60, 60, 120), font=font, anchor="lm")
            write(pen, f.value, f.row + 1, f.column + f.indent, f.shift)
        return image

    def questions(self, rng: random.Random) -> dict[str, tuple[str, str]]:
        """The value of up to four of the fields; for training, the list of all."""
        asked = rng.sample(self.fields, min(4, len(self.fields)))
        in_order = sorted(self.fields, key=lambda f: (f.row, f.column))
        listing = ("list all", " ".join(f"{f.label}{f.value}" for f in in_order))
        return {f"field{i}": (f"what is the {f.label}", f.value) for i, f in enumerate(asked)} | {
            "listing": listing
        }


def make_page(seed: int, test: bool) -> Page:
    """Four to six fields whose values have three or four letters or digits."""
    rng = random.Random(seed)
    slots = rng.sample(_SLOTS, rng.randrange(4, 7))
    fields = []
    for label, (row, column) in zip(rng.sample(LABELS, len(slots)), slots, strict=True):
        alphabet = rng.choice((LETTERS, DIGITS))
        value = drawn(lambda a=alphabet: "".join(rng.choices(a, k=rng.choice((3, 4)))), test)
        shift = (rng.randrange(-1, 2), rng.randrange(-1, 2))
        fields.append(Field(label, value, row, column, rng.randrange(0, 6 - len(value)), shift))
    return Page(tuple(fields))
