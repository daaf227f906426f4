"""Writes a run's report: Markdown, CSV, PNG and HTML, from records only."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from effivlm.records import StoreError, read_run, read_timings
from effivlm.report import figures, latex, tables
from effivlm.report.page.write import stamp, view_path, write_page, write_view
from effivlm.report.rows import Row, rows_of

LARGE = 20_000  # answers from which the view is written with the report, to open at once


def write(
    folder: Path, axes: Sequence[str] = ("prompt_kv", "visual_mean")
) -> tuple[list[Row], list[Path]]:
    """Write ``report/`` into a run folder: tables as Markdown, CSV and LaTeX, one figure for each
    cost axis (see `report.rows.AXES`), and the page.

    Returns:
        The rows, and the files written.

    Raises:
        StoreError: if the folder holds no run or no records. MetricError: if they cannot be
            compared.
        ImportError: without matplotlib or Plotly, after the tables are written; names the extra.
        KeyError: for an unknown axis.
    """
    rows = read_rows(folder)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    texts = {
        "table.md": tables.markdown(rows) + tables.explained(rows),
        "table.csv": tables.as_csv(rows),
        "table.tex": latex.table(rows, axes),
    }
    written = [out / name for name in texts]
    for path, text in zip(written, texts.values(), strict=True):
        path.write_text(text)
    try:
        for axis in axes:
            written += figures.trade_off(rows, out / f"quality_{axis}", axis)
        page = write_page(folder, rows, facts_of(folder))
    except ImportError as error:
        done = ", ".join(map(str, written[:3]))
        raise ImportError(f"{error}. The tables are written: {done}") from None
    written.append(page.path)
    if page.left_out or sum(r.documents for r in rows) > LARGE:
        written.append(_written_view(folder, rows))
    return rows, written


def view(folder: Path) -> Path:
    """The page of a run of any size, written again only where the run has changed.

    Raises:
        StoreError, MetricError, ImportError: as `write`.
    """
    path, made_of = view_path(folder), folder / "report" / "view" / "stamp"
    if path.exists() and made_of.exists() and made_of.read_text() == stamp(folder):
        return path
    return _written_view(folder, read_rows(folder))


def _written_view(folder: Path, rows: Sequence[Row]) -> Path:
    now = stamp(folder)  # before: what changes meanwhile is seen next time
    path = write_view(folder, rows, facts_of(folder))
    (path.parent / "stamp").write_text(now)
    return path


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run, in the order its settings were asked for.

    Raises:
        StoreError: if the folder holds no run or no records. MetricError: if they cannot be
            compared.
    """
    place = {text: i for i, text in enumerate(_settings(folder))}
    ordered = sorted(read_run(folder), key=lambda r: place.get(r.setting, len(place)))
    return rows_of(ordered, read_timings(folder))


def facts_of(folder: Path) -> dict[str, Any]:
    """The environment that a run noted; empty where it noted none."""
    path = folder / "environment.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _settings(folder: Path) -> list[str]:
    """The settings in the order they were asked for."""
    path = folder / "experiment.yaml"
    if not path.exists():
        raise StoreError(
            f"{folder} holds no experiment.yaml: expected the folder of a run, such as runs/default"
        )
    try:
        return list(yaml.safe_load(path.read_text())["settings"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}): it is the file that `effivlm run` wrote; restore it,"
            " or run again"
        ) from None
