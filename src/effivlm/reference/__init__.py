"""Published results as data, to print beside our own (README.md there says what was read from
where).
"""

import csv
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parent / "published.csv"


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        source: short name of the paper. table: its number there. model, method, setting, benchmark:
            as printed.
        metric: ``score``, ``OP``, or a time or ratio that names its unit. value: in the benchmark's
            own unit.
    """

    source: str
    table: str
    model: str
    method: str
    setting: str
    benchmark: str
    metric: str
    value: float


def all_published() -> list[Published]:
    """Every figure, in printed order."""
    with HOME.open(newline="") as handle:
        return [
            Published(**{**row, "value": float(row["value"])}) for row in csv.DictReader(handle)
        ]  # type: ignore[arg-type]


def published(source: str, table: int | str) -> list[Published]:
    """The figures of one table, in printed order.

    Raises:
        KeyError: for a source or table that is not there; names those that are.
    """
    rows = all_published()
    found = [r for r in rows if r.source == source and r.table == str(table)]
    if not found:
        known = ", ".join(f"{s} {t}" for s, t in dict.fromkeys((r.source, r.table) for r in rows))
        raise KeyError(f"no published table {source!r} {table}: expected one of {known}")
    return found
