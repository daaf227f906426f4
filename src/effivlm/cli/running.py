"""`run` and `report`: answers, and what is made of them."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from effivlm.cli.shell import FAILED_DOCUMENTS, INTERRUPTED, console, guard, line

Machine = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the experiment, such as tasks.0.documents=5."),
]


def run(
    experiment: Annotated[
        Path | None, typer.Argument(help="YAML file; without one, the built-in default.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask documents again that failed before.")
    ] = False,
    changes: Changes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    machine: Machine = False,
) -> None:
    """Answer every document under every setting, and write the report. Run it again to go on after
    an interruption.
    """
    if dry_run:
        guard(lambda: _rehearse(experiment, root, changes or [], machine))
    else:
        guard(lambda: _run(experiment, root, retry_failed, changes or [], machine))


def _rehearse(path: Path | None, root: Path, changes: list[str], machine: bool) -> None:
    from effivlm.config import default_experiment, load_experiment
    from effivlm.rehearsal import rehearse

    found = rehearse(load_experiment(path or default_experiment(), changes), root)
    if machine:
        _print_json(found.as_dict())
        return
    for text in found.lines():
        line(text)


def _run(
    path: Path | None, root: Path, retry_failed: bool, changes: list[str], machine: bool
) -> None:
    from effivlm.config import default_experiment, load_experiment
    from effivlm.experiment import run as run_experiment
    from effivlm.families.fitness import quiet
    from effivlm.progress import documents

    experiment = load_experiment(path or default_experiment(), changes)
    folder = root / experiment.name
    try:
        with (
            _logged(folder),
            quiet(),
            documents(console, len(experiment.settings), machine) as progress,
        ):
            summary = run_experiment(experiment, root, progress, retry_failed)
    except KeyboardInterrupt:
        line(
            f"\ninterrupted: what was finished is in {folder}; the same command goes on from there"
        )
        raise typer.Exit(INTERRUPTED) from None
    counts = {"recorded": summary.recorded, "found": summary.found, "failed": summary.failed}
    _report(folder, machine, counts)
    if not machine:
        line(f"{summary.recorded} answers recorded, {summary.found} found from before")
    if summary.failed:
        total = summary.recorded + summary.found
        if not machine:
            line(
                f"{summary.failed} of {total} answers failed: see the column 'failed' and"
                f" {folder}/log.txt; --retry-failed asks them again",
                "bold red",
            )
        raise typer.Exit(FAILED_DOCUMENTS)


class _Log(logging.FileHandler):
    """A log that a full disk does not interrupt."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: the record that could not be written says it."""


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """What the package logs goes into the run's folder."""
    from effivlm.files.writing import appendable, explained, make_folder
    from effivlm.records import StoreError

    make_folder(folder, StoreError)
    path = folder / "log.txt"
    appendable(path, StoreError)
    with explained(path, StoreError, "free space and run the same command again"):
        handler = _Log(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("effivlm")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with explained(path, StoreError, "every finished line is intact"):
            handler.close()


def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/default.")],
    machine: Machine = False,
) -> None:
    """Write the report of a run again, from its records."""
    guard(lambda: _report(folder, machine, {}))


def _report(folder: Path, machine: bool, counts: dict[str, int]) -> None:
    from effivlm.evaluation import score_run
    from effivlm.report.tables import fitting
    from effivlm.report.write import write
    from effivlm.result import plain_rows

    score_run(folder)  # an interrupted run has answers that nobody scored yet
    rows, paths = write(folder)
    if machine:
        _print_json({**counts, "rows": plain_rows(rows), "files": [str(p) for p in paths]})
        return
    for table in fitting(rows, console):
        console.print(table)
    for path in paths:
        line(f"  {path}")


def _print_json(data: Any) -> None:
    line(json.dumps(data, indent=1))
