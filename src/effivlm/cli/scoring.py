"""`score`, `compare` and `data`: what is made of answers without a model, and what tasks need."""

from pathlib import Path
from typing import Annotated

import typer

from effivlm.cli.shell import console, guard, line

Run = Annotated[Path, typer.Argument(help="A run's folder, such as runs/default.")]
data = typer.Typer(no_args_is_help=True, help="Data sets of the official benchmarks.")


def score(folder: Run) -> None:
    """Score a run's answers again, with the scorers as they are now; no model is needed."""
    guard(lambda: _score(folder))


def _score(folder: Path) -> None:
    from effivlm.evaluation import score_run
    from effivlm.records import read_totals
    from effivlm.report.official import lines

    with console.status("preparing") as status:
        score_run(folder, again=True, progress=lambda what: status.update(f"scoring {what}"))
    for text in lines(read_totals(folder)):
        line(text)


def compare(folder: Run) -> None:
    """Our numbers beside published ones of the same model, method, budget and benchmark."""
    guard(lambda: _compare(folder))


def _compare(folder: Path) -> None:
    from effivlm.evaluation import score_run
    from effivlm.records import read_totals
    from effivlm.report.beside import beside, lines

    score_run(folder)
    for text in lines(beside(read_totals(folder))):
        line(text)


@data.command(name="check")
def data_check(
    suite: Annotated[str, typer.Argument(help="A suite or a task: effivlm list suites.")],
    folder: Annotated[
        Path | None, typer.Option("--data", help="Local folder, as 'data' of an experiment.")
    ] = None,
) -> None:
    """What is present of a suite's data sets, what is missing, how large they are."""
    guard(lambda: _data_check(suite, folder))


def _data_check(suite: str, folder: Path | None) -> None:
    from effivlm.tasks.presence import check

    for text in check(suite, folder):
        line(text)
