"""`measure`, `predict` and `calibrate`: what models do, in time and in layers."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from effivlm.cli.running import Changes
from effivlm.cli.shell import FAILED_DOCUMENTS, console, guard, line


def measure(
    experiment: Annotated[Path, typer.Argument(help="YAML file with a section 'measure'.")],
    root: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    changes: Changes = None,
) -> None:
    """Time every setting, stage by stage, baseline interleaved; speed tables go into the run's
    report.
    """
    guard(lambda: _measure(experiment, root, changes or []))


def _measure(path: Path, root: Path, changes: list[str]) -> None:
    from effivlm.config import load_experiment
    from effivlm.families.fitness import quiet
    from effivlm.measure.run import measure as measure_experiment
    from effivlm.report.speed import write_speed

    experiment = load_experiment(path, changes)
    with quiet(), console.status("preparing") as status:
        result = measure_experiment(
            experiment,
            root,
            lambda what, done, total: status.update(escape(f"{what}: round {done} of {total}")),
        )
    if result.recorded or result.found:
        for written in write_speed(root / experiment.name):
            line(written.read_text() if written.suffix == ".md" else f"  {written}")
    line(
        f"{result.recorded} samples recorded, {result.found} found from before, in"
        f" {root / experiment.name / 'timings'}"
    )
    for what, why in result.failed.items():
        line(f"not timed {what}: {why}", "bold red")
    if result.failed:
        raise typer.Exit(FAILED_DOCUMENTS)


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
    guard(lambda: _predict(shape, settings, device, workload))


def _predict(shape: str, settings: list[str], device: str, workload: str) -> None:
    from effivlm.measure.predict import table

    for text in table(shape, settings, device, workload):
        line(text)


def calibrate(
    method: Annotated[
        str, typer.Argument(help="vtw, fitprune, or a setting of weights such as awq:group=64.")
    ],
    model: Annotated[str, typer.Argument(help="zoo:NAME, a hub id or a checkpoint folder.")],
    task: Annotated[str, typer.Option(help="Task whose documents are used; one image each.")],
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    files: Annotated[
        Path, typer.Option(help="weights: folder that the compressed ones are written into.")
    ] = Path("weights"),
    eta: Annotated[
        float,
        typer.Option(min=0, help="vtw: most nats between the whole model and the shortened one."),
    ] = 0.003,
    reduction: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="fitprune: share of the cost to save.")
    ] = 0.6,
) -> None:
    """Fit VTW's layer or FitPrune's curve to a model (the last line printed is the setting), or
    compress its weights once for all (the last line is the file).
    """
    if method in ("vtw", "fitprune"):
        guard(lambda: _calibrate(method, model, task, documents, eta, reduction))
    else:
        guard(lambda: _compress(method, model, task, documents, files))


def _compress(setting: str, model: str, task: str, documents: int, files: Path) -> None:
    from effivlm.config import CalibrationSpec, ModelSpec
    from effivlm.families.fitness import quiet
    from effivlm.weights_calibration import calibrate as compress

    spec = CalibrationSpec(task=task, samples=documents, files=str(files))
    with quiet(), console.status("compressing"):
        for text in compress(setting, ModelSpec(name=model), spec):
            line(text)


def _calibrate(
    method: str, model: str, task: str, documents: int, eta: float, reduction: float
) -> None:
    from effivlm.families.fitness import quiet
    from effivlm.fitting import calibrate as fit
    from effivlm.setting import SettingError

    if not math.isfinite(eta):
        raise SettingError(f"--eta: expected a number of nats, got {eta}")
    with quiet(), console.status("preparing") as status:
        for text in fit(
            method,
            model,
            task,
            documents,
            eta,
            reduction,
            lambda n: status.update(f"document {n} of {documents}"),
        ):
            line(text)
