"""`recommend`: from records to a decision."""

import json
from pathlib import Path
from typing import Annotated

import typer

from effivlm.cli.running import Machine
from effivlm.cli.shell import console, guard, line


def recommend(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, such as runs/default.")],
    target: Annotated[
        str,
        typer.Option(
            help="Share of the original's cost that may remain: ttft=0.5x, decode=, total=,"
            " memory=, tokens=, kv=, flops=."
        ),
    ],
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Points of score that may be lost.")
    ] = 2.0,
    confidence: Annotated[
        float, typer.Option(help="That none of the settings shown to be within the drop is not.")
    ] = 0.95,
    device: Annotated[
        str | None,
        typer.Option(help="Predict for it where nothing was timed: a100-80gb, h100-sxm, h200."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Say of every setting why it was ruled out.")
    ] = False,
    machine: Machine = False,
) -> None:
    """Which settings meet a target and are not shown to lose more than a drop; at most five."""
    guard(lambda: _recommend(folders, target, max_drop, confidence, device, every, machine))


def _recommend(
    folders: list[Path],
    target: str,
    max_drop: float,
    confidence: float,
    device: str | None,
    every: bool,
    machine: bool,
) -> None:
    from effivlm.evaluation import score_run
    from effivlm.recommendation import recommend as recommended
    from effivlm.recommendation.choice import check_asked
    from effivlm.recommendation.target import parse_target

    parse_target(target)  # before anything is scored
    check_asked(max_drop, confidence)
    with console.status("comparing"):
        for folder in folders:
            score_run(folder)
        found = recommended(
            *folders, target=target, max_drop=max_drop, confidence=confidence, device=device
        )
    if machine:
        line(json.dumps(found.as_dict(), indent=1))
        return
    for text in found.lines(every):
        line(text)
