"""What a column of a report is, and how its cells are written."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from effivlm.report.rows import Row

Output = Literal["terminal", "markdown", "csv", "html"]
V = TypeVar("V")

EVERYWHERE: tuple[Output, ...] = ("terminal", "markdown", "csv", "html")
TABLES: tuple[Output, ...] = ("terminal", "markdown", "html")
WIDE: tuple[Output, ...] = ("markdown", "html")
ALL_BUT_TERMINAL: tuple[Output, ...] = ("markdown", "csv", "html")
CSV: tuple[Output, ...] = ("csv",)


def plain(value: object) -> str:
    """Numbers with one decimal, counts and words as they are; ``-`` for NaN, empty for None."""
    if isinstance(value, float):
        return "-" if value != value else f"{value:.1f}"
    return "" if value is None else str(value)


def percent(share: float) -> str:
    """A share in [0, 1] as percent; ``-`` for NaN."""
    return "-" if share != share else f"{100 * share:.1f} %"


def _never(_: Row) -> bool:
    return False


@dataclass(frozen=True)
class Column(Generic[V]):
    """One column.

    Attributes:
        key: its name in the CSV. title: its heading elsewhere. value: a row's value; the CSV holds
            it as it is. help: what it says, for legends; no full stop at its end.
        text: the value as tables show it, `plain` if not given. shown: the outputs that have it;
            the terminal, 80 columns wide, is nearly full.
        short: title and text in the terminal, where they must be narrower there.
        versus: whether it compares with ``none``: the cell of ``none`` itself is empty in tables.
        alarm: whether the page marks a row's cell. left: whether the terminal aligns it left.
    """

    key: str
    title: str
    value: Callable[[Row], V]
    help: str
    text: Callable[[V], str] = plain
    shown: tuple[Output, ...] = ALL_BUT_TERMINAL
    short: tuple[str, Callable[[V], str]] | None = None
    versus: bool = False
    alarm: Callable[[Row], bool] = _never
    left: bool = False

    def heading(self, where: Output) -> str:
        """Its title in an output."""
        if where == "csv":
            return self.key
        return self.short[0] if self.short and where == "terminal" else self.title

    def cell(self, row: Row, where: Output) -> str:
        """A row's text in a table."""
        if self.versus and row.setting == "none":
            return ""
        text = self.short[1] if self.short and where == "terminal" else self.text
        return text(self.value(row))

    def columns(self, rows: Sequence[Row], axes: Sequence[str]) -> Iterable["Column[Any]"]:
        """Itself, whatever is shown."""
        return (self,)


class Entry(Protocol):
    """What stands in `columns.COLUMNS`: a `Column`, or `Several` of them."""

    def columns(self, rows: Sequence[Row], axes: Sequence[str]) -> Iterable[Column[Any]]:
        """The columns for these rows and these cost axes."""
        ...


@dataclass(frozen=True)
class Several:
    """Columns that depend on what is shown: one per task, cost axis or workload."""

    of: Callable[[Sequence[Row], Sequence[str]], Iterable[Column[Any]]]

    def columns(self, rows: Sequence[Row], axes: Sequence[str]) -> Iterable[Column[Any]]:
        """See `Entry`."""
        return self.of(rows, axes)
