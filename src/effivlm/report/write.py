"""Writes a run's report: Markdown, CSV, PNG and HTML, from records only."""

import json
from pathlib import Path

import yaml

from effivlm.records import read_run
from effivlm.report import figures, html, tables


def write(folder: Path) -> tuple[list[tables.Row], list[Path]]:
    """Write ``report/`` into a run folder.

    Returns:
        The rows, and the files written.

    Raises:
        StoreError: if the folder holds no records.
    """
    asked = yaml.safe_load((folder / "experiment.yaml").read_text())["settings"]
    place = {text: i for i, text in enumerate(asked)}
    rows = tables.rows_of(sorted(read_run(folder), key=lambda r: place.get(r.setting, len(place))))
    out = folder / "report"
    out.mkdir(exist_ok=True)
    paths = [out / "table.md", out / "table.csv"]
    paths[0].write_text(tables.markdown(rows))
    paths[1].write_text(tables.as_csv(rows))
    pictures = []
    for axis in ("prompt_kv", "visual_mean"):
        pictures.append(out / f"quality_{axis}.png")
        figures.trade_off(rows, pictures[-1], axis)
    page = out / "report.html"
    facts = folder / "environment.json"
    page.write_text(html.page(folder.name, rows, pictures, json.loads(facts.read_text()) if facts.exists() else {}))
    return rows, [*paths, *pictures, page]
