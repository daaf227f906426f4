"""Writes a run's report: Markdown, CSV, JSON, PNG and HTML, from records only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from effivlm.files.reading import mapping, read_json
from effivlm.files.writing import explained, make_folder, write_whole
from effivlm.files.yaml_text import read_yaml
from effivlm.records import DocumentRecord, StoreError, read_run, read_timings, read_totals
from effivlm.report import figures, html, tables
from effivlm.report.rows import Row, rows_of

INTACT = "the records are intact; free space and run `effivlm report` again"


def write(
    folder: Path, axes: Sequence[str] = ("prompt_kv", "visual_mean")
) -> tuple[list[Row], list[Path]]:
    """Write ``report/`` into a run folder; one figure for each cost axis (see `report.rows.AXES`).

    Returns:
        The rows, and the files written.

    Raises:
        StoreError: if the folder holds no run or no records. MetricError: if they cannot be
            compared.
        ImportError: without matplotlib, after the tables are written; names the extra. KeyError:
            for an unknown axis.
    """
    rows = rows_of(ordered_records(folder), read_timings(folder), totals=read_totals(folder))
    out = folder / "report"
    make_folder(out, StoreError)
    paths = [out / "table.md", out / "table.csv", out / "table.json"]
    text = tables.markdown(rows) + tables.explained(rows)
    write_whole(paths[0], text, StoreError, INTACT)
    write_whole(paths[1], tables.as_csv(rows), StoreError, INTACT)
    write_whole(paths[2], tables.as_json(rows), StoreError, INTACT)
    pictures = [out / f"quality_{axis}.png" for axis in axes]
    try:
        for axis, picture in zip(axes, pictures, strict=True):
            with explained(picture, StoreError, INTACT):
                figures.trade_off(rows, picture, axis)
    except ImportError as error:
        raise ImportError(f"{error}. The tables are written: {paths[0]}, {paths[1]}") from None
    page = out / "report.html"
    text = html.page(folder.name, rows, pictures, _environment(folder / "environment.json"))
    write_whole(page, text, StoreError, INTACT)
    return rows, [*paths, *pictures, page]


def ordered_records(folder: Path) -> list[DocumentRecord]:
    """The records of a run, settings in the order they were asked for.

    Raises:
        StoreError: if the folder holds no run or no records.
    """
    place = {text: i for i, text in enumerate(_settings(folder))}
    return sorted(read_run(folder), key=lambda r: place.get(r.setting, len(place)))


def _environment(path: Path) -> dict[str, Any]:
    """What a run noted of its machine; the report does without it where it is damaged."""
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
