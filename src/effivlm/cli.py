"""The command line: verbs only, no logic."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from effivlm.errors import EffivlmError

QUESTION = (
    "Which training-free acceleration should I use on this vision-language model, what does it"
    " cost, what does it save?"
)
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=QUESTION
)
console = Console(width=None if sys.stdout.isatty() else 110)
BROKEN_CONTRACT, FAILED_DOCUMENTS, USER_ERROR, INTERRUPTED = 1, 3, 2, 130


@app.command()
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
    _guard(lambda: _run(experiment, root, retry_failed))


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


@app.command()
def measure(
    experiment: Annotated[Path, typer.Argument(help="YAML file with a section 'measure'.")],
    root: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
) -> None:
    """Time every setting, stage by stage, baseline interleaved; speed tables go into the run's
    report.
    """
    _guard(lambda: _measure(experiment, root))


def _measure(path: Path, root: Path) -> None:
    from effivlm.config import load_experiment
    from effivlm.measure.run import measure as measure_experiment
    from effivlm.report.speed import write_speed

    experiment = load_experiment(path)
    with console.status("preparing") as line:
        result = measure_experiment(
            experiment,
            root,
            lambda what, done, total: line.update(f"{what}: round {done} of {total}"),
        )
    for path in write_speed(root / experiment.name):
        text = path.read_text() if path.suffix == ".md" else f"  {path}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{result.recorded} samples recorded, {result.found} found from before, in"
        f" {root / experiment.name / 'timings'}"
    )
    for what, why in result.failed.items():
        console.print(f"[bold red]not timed[/] {what}: {why}", soft_wrap=True)
    if result.failed:
        raise typer.Exit(FAILED_DOCUMENTS)


@app.command()
def predict(
    shape: Annotated[str, typer.Argument(help="A published shape: effivlm list models.")],
    settings: Annotated[list[str], typer.Argument(help="Settings, such as visionzip@0.1.")],
    device: Annotated[
        str,
        typer.Option(
            help="a100-80gb, h100-sxm, h200, l40s, or cpu or cuda to measure this machine."
        ),
    ] = "h200",
    workload: Annotated[
        str, typer.Option(help="What is asked; see docs/measuring.md.")
    ] = "effivlm-bench",
) -> None:
    """Least time and memory of settings on a device, from shapes and budgets alone; no model is
    run.
    """
    _guard(lambda: _predict(shape, settings, device, workload))


def _predict(shape: str, settings: list[str], device: str, workload: str) -> None:
    from effivlm.measure.predict import table

    for line in table(shape, settings, device, workload):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def calibrate(
    method: Annotated[str, typer.Argument(help="vtw or fitprune.")],
    model: Annotated[str, typer.Argument(help="zoo:NAME, a hub id or a checkpoint folder.")],
    task: Annotated[str, typer.Option(help="Task whose documents are used; one image each.")],
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    eta: Annotated[
        float,
        typer.Option(min=0, help="vtw: most nats between the whole model and the shortened one."),
    ] = 0.003,
    reduction: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="fitprune: share of the cost to save.")
    ] = 0.6,
) -> None:
    """Fit VTW's layer or FitPrune's curve to a model; the last line printed is the setting."""
    _guard(lambda: _calibrate(method, model, task, documents, eta, reduction))


def _calibrate(
    method: str, model: str, task: str, documents: int, eta: float, reduction: float
) -> None:
    from effivlm.fitting import calibrate as fit

    with console.status("preparing") as status:
        for line in fit(
            method,
            model,
            task,
            documents,
            eta,
            reduction,
            lambda n: status.update(f"document {n} of {documents}"),
        ):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def check(
    name: Annotated[
        str, typer.Argument(help="A method or family, of this package or found by entry point.")
    ],
) -> None:
    """Put a method through the contract on a tiny random model of every family, or a family through
    its own rules and those of every method.
    """
    _guard(lambda: _check(name))


def _check(name: str) -> None:
    from effivlm.contract.gate import check as verdicts

    broken = 0
    for verdict in verdicts(name):
        for line in verdict.lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        broken += len(verdict.broken)
    if broken:
        raise typer.Exit(BROKEN_CONTRACT)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/default.")],
) -> None:
    """Write the report of a run again, from its records."""
    _guard(lambda: _report(folder))


def _report(folder: Path) -> None:
    from effivlm.report.tables import terminal
    from effivlm.report.write import write

    rows, paths = write(folder)
    for table in terminal(rows):
        console.print(table)
    for path in paths:
        console.print(f"  {path}", highlight=False)


@app.command()
def view(
    folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/default.")],
) -> None:
    """Open a run of any size in the browser: its documents are read as they are opened."""
    _guard(lambda: _view(folder))


def _view(folder: Path) -> None:
    import webbrowser

    from effivlm.report.write import view as written

    page = written(folder).resolve()
    console.print(f"  {page}", highlight=False, soft_wrap=True)
    webbrowser.open(page.as_uri())


@app.command()
def explain(
    folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/default.")],
    document: Annotated[str, typer.Argument(help="DOCUMENT, or TASK/DOCUMENT.")],
    setting: Annotated[str, typer.Argument(help="A setting of any kind, of the run or not.")],
) -> None:
    """Ask one document again and record what became of every visual token; the page draws it."""
    _guard(lambda: _explain(folder, document, setting))


def _explain(folder: Path, document: str, setting: str) -> None:
    from effivlm.explain import explain as explained

    with console.status("asking again"):
        lines = list(explained(folder, document, setting))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(name="list")
def list_(
    what: Annotated[
        str, typer.Argument(help="methods, families, suites, tasks, models or support")
    ],
) -> None:
    """List what there is."""
    _guard(lambda: _list(what))


def _list(what: str) -> None:
    from effivlm import lists, registry

    for line in registry.lookup("list", what, lists.LISTS)():
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A method or a family.")]) -> None:
    """Paper, parameters, deviations, stages and supported families of a method; facts about a
    family.
    """
    _guard(lambda: _show(name))


def _show(name: str) -> None:
    from effivlm import catalogue

    for line in catalogue.describe(name):
        console.print(line, highlight=False, soft_wrap=True)


def _guard(verb: Callable[[], None]) -> None:
    """Errors that a user can mend are one message, not a traceback."""
    known = (EffivlmError, ImportError, NotImplementedError)
    try:
        verb()
    except known as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {error!s}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(USER_ERROR) from None


if __name__ == "__main__":
    app()
