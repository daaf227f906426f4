"""`run` and `report`: answers, and what is made of them."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from effivlm.cli.shell import FAILED_DOCUMENTS, INTERRUPTED, console, guard


def run(
    experiment: Annotated[
        Path | None, typer.Argument(help="YAML file; without one, the built-in default.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask documents again that failed before.")
    ] = False,
) -> None:
    """Answer every document under every setting, and write the report. Run it again to go on after
    an interruption.
    """
    guard(lambda: _run(experiment, root, retry_failed))


def _run(path: Path | None, root: Path, retry_failed: bool) -> None:
    from effivlm.config import default_experiment, load_experiment
    from effivlm.experiment import run as run_experiment

    experiment = load_experiment(path or default_experiment())
    folder = root / experiment.name
    _log_to(folder)
    try:
        with _documents(len(experiment.settings)) as progress:
            summary = run_experiment(experiment, root, progress, retry_failed)
    except KeyboardInterrupt:
        console.print(
            f"\ninterrupted: what was finished is in {folder}; the same command goes on from there"
        )
        raise typer.Exit(INTERRUPTED) from None
    _report(folder)
    console.print(f"{summary.recorded} answers recorded, {summary.found} found from before")
    if summary.failed:
        total = summary.recorded + summary.found
        console.print(
            f"[bold red]{summary.failed} of {total} answers failed[/]: see the column 'failed' and"
            f" {folder}/log.txt; --retry-failed asks them again"
        )
        raise typer.Exit(FAILED_DOCUMENTS)


def _log_to(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("effivlm").addHandler(handler)
    logging.getLogger("effivlm").setLevel(logging.INFO)


@contextmanager
def _documents(settings: int) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for every model; what it gives is called with the model's name, documents done, all."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("documents"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        bars: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = bar.add_task(f"{what}, {settings} settings", total=total)
            bar.update(bars[what], completed=done)

        yield progress


def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/default.")],
) -> None:
    """Write the report of a run again, from its records."""
    guard(lambda: _report(folder))


def _report(folder: Path) -> None:
    from effivlm.report.tables import terminal
    from effivlm.report.write import write

    rows, paths = write(folder)
    for table in terminal(rows):
        console.print(table)
    for path in paths:
        console.print(f"  {path}", highlight=False)
