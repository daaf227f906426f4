"""Writes a run's report: Markdown, CSV, JSON, LaTeX, figures and the page, from records only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from effivlm.files.reading import mapping, read_json
from effivlm.files.writing import explained, make_folder, write_whole
from effivlm.files.yaml_text import read_yaml
from effivlm.records import DocumentRecord, StoreError, read_run, read_timings, read_totals
from effivlm.report import figures, latex, tables
from effivlm.report.page.write import INTACT, stamp, view_path, write_page, write_view
from effivlm.report.rows import Row, rows_of

LARGE = 20_000  # answers from which the view is written with the report, to open at once


def write(
    folder: Path, axes: Sequence[str] = ("prompt_kv", "visual_mean")
) -> tuple[list[Row], list[Path]]:
    """Write ``report/`` into a run folder: tables as Markdown, CSV, JSON and LaTeX, one figure for
    each cost axis (see `report.rows.AXES`), and the page.

    Returns:
        The rows, and the files written.

    Raises:
        StoreError: if the folder holds no run or no records, or cannot be written. MetricError: if
            they cannot be compared. KeyError: for an unknown axis.
    """
    rows = read_rows(folder)
    out = folder / "report"
    make_folder(out, StoreError)
    texts = {
        "table.md": tables.markdown(rows) + tables.explained(rows),
        "table.csv": tables.as_csv(rows),
        "table.json": tables.as_json(rows),
        "table.tex": latex.table(rows, axes),
    }
    written = [out / name for name in texts]
    for path, text in zip(written, texts.values(), strict=True):
        write_whole(path, text, StoreError, INTACT)
    for axis in axes:
        with explained(out / f"quality_{axis}", StoreError, INTACT):
            written += figures.trade_off(rows, out / f"quality_{axis}", axis)
    with explained(out / "report.html", StoreError, INTACT):
        page = write_page(folder, rows, facts_of(folder))
    written.append(page.path)
    if page.left_out or sum(r.documents for r in rows) > LARGE:
        written.append(_written_view(folder, rows))
    return rows, written


def view(folder: Path) -> Path:
    """The page of a run of any size, written again only where the run has changed.

    Raises:
        StoreError, MetricError: as `write`.
    """
    path, made_of = view_path(folder), folder / "report" / "view" / "stamp"
    if path.is_file() and made_of.is_file() and made_of.read_text() == stamp(folder):
        return path
    return _written_view(folder, read_rows(folder))


def _written_view(folder: Path, rows: Sequence[Row]) -> Path:
    now = stamp(folder)  # before: what changes meanwhile is seen next time
    with explained(view_path(folder), StoreError, INTACT):
        path = write_view(folder, rows, facts_of(folder))
    write_whole(path.parent / "stamp", now, StoreError, INTACT)
    return path


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run, in the order its settings were asked for.

    Raises:
        StoreError: if the folder holds no run or no records. MetricError: if they cannot be
            compared.
    """
    return rows_of(ordered_records(folder), read_timings(folder), totals=read_totals(folder))


def ordered_records(folder: Path) -> list[DocumentRecord]:
    """The records of a run, settings in the order they were asked for.

    Raises:
        StoreError: if the folder holds no run or no records.
    """
    place = {text: i for i, text in enumerate(_settings(folder))}
    return sorted(read_run(folder), key=lambda r: place.get(r.setting, len(place)))


def facts_of(folder: Path) -> dict[str, Any]:
    """What a run noted of its machine; the report does without it where it is damaged."""
    path = folder / "environment.json"
    if not path.exists():
        return {}
    try:
        facts = read_json(path, "the note that `effivlm run` wrote", StoreError)
    except StoreError as error:
        return {"environment.json": f"cannot be read: {error}"}
    return mapping(facts)


def _settings(folder: Path) -> list[str]:
    """The settings in the order they were asked for."""
    path = folder / "experiment.yaml"
    if not path.exists():
        raise StoreError(
            f"{folder} holds no experiment.yaml: expected the folder of a run, such as runs/default"
        )
    expected = "the file that `effivlm run` wrote: restore it, or run again"
    found = mapping(read_yaml(path, expected, StoreError)).get("settings")
    settings = cast("list[object]", found) if isinstance(found, list) else []
    if not settings:
        raise StoreError(f"{path} names no settings: expected {expected}")
    return [str(s) for s in settings]
