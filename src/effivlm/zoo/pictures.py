"""What every rendered picture is: something to draw, marks that say what each spot shows, and
questions with answers.

Everything follows from a seed. Characters stand on a grid of ``GRID`` pixels, so one character is
one visual token; shapes lie anywhere in their cells. An eighth of all words, numbers and
combinations is reserved: test pictures are made of reserved ones only, training pictures of none.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from PIL import Image, ImageDraw, ImageFont

from effivlm.zoo.words import COLUMNS, ORDINALS, ROWS

SIZE, GRID = 160, 16  # pixels: a picture's side, and the side of what one visual token covers
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
T = TypeVar("T")
RESERVED = 8  # one combination in so many is kept for the test pictures


@dataclass(frozen=True)
class Mark:
    """What a spot of a picture shows.

    Attributes:
        box: where. words: what can be seen there. placed: what can be seen there by whoever sees
            the whole picture.
        fine: legible at full size only.
    """

    box: Box
    words: tuple[str, ...]
    placed: tuple[str, ...] = ()
    fine: bool = False


class Picture(Protocol):
    """A picture that can be drawn, labelled and asked about."""

    @property
    def size(self) -> int:
        """Its side in pixels."""
        ...

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What its spots show."""
        ...

    def draw(self) -> Image.Image:
        """RGB, ``size`` x ``size``."""
        ...

    def questions(self, rng: random.Random) -> dict[str, tuple[str, str]]:
        """Kind of question -> question and answer; only kinds that this picture allows."""
        ...


def reserved(combination: str) -> bool:
    """Whether a word, number or combination is kept for test pictures."""
    return zlib.crc32(combination.encode()) % RESERVED == 0


def drawn(make: Callable[[], T], test: bool, name: Callable[[T], str] = str) -> T:
    """Draw until the combination is one for the test (or for training)."""
    while True:
        made = make()
        if reserved(name(made)) == test:
            return made


def place(box: Box, size: int) -> tuple[str, str]:
    """Row and column, in thirds, of the middle of a box."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return ROWS[min(2, int(3 * y / size))], COLUMNS[min(2, int(3 * x / size))]


def text_marks(text: str, row: int, column: int, role: str) -> tuple[Mark, ...]:
    """Marks of the characters of a text that starts in a cell of the grid; each knows its place in
    the text.
    """
    return tuple(
        Mark(
            (GRID * (column + i), GRID * row, GRID * (column + i + 1), GRID * (row + 1)),
            (c, ORDINALS[i], role),
            fine=True,
        )
        for i, c in enumerate(text)
    )


def write(
    pen: ImageDraw.ImageDraw, text: str, row: int, column: int, shift: tuple[int, int]
) -> None:
    """One character a cell of the grid, moved by a pixel or so."""
    font = ImageFont.load_default(15)
    for i, c in enumerate(text):
        middle = (GRID * (column + i) + GRID / 2 + shift[0], GRID * row + GRID / 2 + shift[1])
        pen.text(middle, c, fill=(0, 0, 0), font=font, anchor="mm")


def blank(size: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white picture and its pen."""
    image = Image.new("RGB", (size, size), (255, 255, 255))
    return image, ImageDraw.Draw(image)
