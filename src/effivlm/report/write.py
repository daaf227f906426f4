"""Writes a run's report: Markdown, CSV, PNG and HTML, from records only."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from effivlm.records import StoreError, read_run, read_timings
from effivlm.report import figures, tables
from effivlm.report.page import write_page
from effivlm.report.rows import Row, rows_of


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
    place = {text: i for i, text in enumerate(_settings(folder))}
    ordered = sorted(read_run(folder), key=lambda r: place.get(r.setting, len(place)))
    rows = rows_of(ordered, read_timings(folder))
    out = folder / "report"
    out.mkdir(exist_ok=True)
    paths = [out / "table.md", out / "table.csv"]
    paths[0].write_text(tables.markdown(rows) + tables.explained(rows))
    paths[1].write_text(tables.as_csv(rows))
    pictures = [out / f"quality_{axis}.png" for axis in axes]
    try:
        for axis, picture in zip(axes, pictures, strict=True):
            figures.trade_off(rows, picture, axis)
    except ImportError as error:
        raise ImportError(f"{error}. The tables are written: {paths[0]}, {paths[1]}") from None
    page = write_page(folder, rows, facts_of(folder))
    return rows, [*paths, *pictures, page]


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
