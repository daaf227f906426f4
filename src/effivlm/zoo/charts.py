"""Charts: four named values as bars or as a line."""

import random
from dataclasses import dataclass

from PIL import Image

from effivlm.zoo.pictures import GRID, SIZE, Mark, blank, drawn, write
from effivlm.zoo.words import COLOURS, LETTERS

_COLUMNS = (1, 3, 6, 8)  # character grid: where the names stand
_BASE = 9  # row of the names


@dataclass(frozen=True)
class Chart:
    """Values from 1 to 8, one row of the grid a unit. ``line``: points joined by lines instead of
    bars.
    """

    names: str
    values: tuple[int, ...]
    colour: str
    line: bool
    size: int = SIZE

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Names, bars and their tips; whoever sees the whole picture sees the value at names and
        tips.
        """
        out = []
        for column, name, value in zip(_COLUMNS, self.names, self.values, strict=True):
            x0, x1 = GRID * column, GRID * (column + 1)
            for row in range(_BASE - value, _BASE if not self.line else _BASE - value + 1):
                tip = row == _BASE - value
                box = (x0, GRID * row, x1, GRID * (row + 1))
                out.append(Mark(box, ("tip" if tip else "bar",), (str(value),) if tip else ()))
            out.append(
                Mark((x0, GRID * _BASE, x1, GRID * (_BASE + 1)), (name,), (str(value),), fine=True)
            )
        return tuple(out)

    def draw(self) -> Image.Image:
        """RGB, ``size`` x ``size``."""
        image, pen = blank(self.size)
        pen.line((GRID / 2, 0, GRID / 2, GRID * _BASE, self.size, GRID * _BASE), fill=(90, 90, 90))
        points = [
            (GRID * (c + 0.5), GRID * (_BASE - v + 0.5))
            for c, v in zip(_COLUMNS, self.values, strict=True)
        ]
        if self.line:
            pen.line([xy for p in points for xy in p], fill=COLOURS[self.colour], width=2)
        for column, name, (x, y), value in zip(
            _COLUMNS, self.names, points, self.values, strict=True
        ):
            if self.line:
                pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=COLOURS[self.colour])
            else:
                pen.rectangle(
                    (x - 7, GRID * (_BASE - value), x + 7, GRID * _BASE), fill=COLOURS[self.colour]
                )
            write(pen, name, _BASE, column, (0, 0))
        return image

    def questions(self, rng: random.Random) -> dict[str, tuple[str, str]]:
        """Two values, and which of two is larger; for training, the list of all."""
        i, j = rng.sample(range(len(self.names)), 2)
        out = {
            f"value{n}": (f"what is the value of {self.names[k]}", str(self.values[k]))
            for n, k in enumerate((i, j))
        }
        if self.values[i] != self.values[j]:
            larger = max((i, j), key=lambda k: self.values[k])
            out["larger"] = (
                f"which is larger , {self.names[i]} or {self.names[j]}",
                self.names[larger],
            )
        out["listing"] = (
            "list all",
            "".join(f"{n}{v}" for n, v in zip(self.names, self.values, strict=True)),
        )
        return out


def make_chart(seed: int, test: bool) -> Chart:
    """A bar chart or a line chart of four values."""
    rng = random.Random(seed)
    names = drawn(lambda: "".join(rng.sample(LETTERS, len(_COLUMNS))), test)
    values = drawn(lambda: tuple(rng.randrange(1, 9) for _ in _COLUMNS), test)
    return Chart(names, values, rng.choice(list(COLOURS)), rng.random() < 0.5)
