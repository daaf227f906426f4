"""`list`, `show` and `check`: what there is, and whether it keeps its contract."""

from typing import Annotated

import typer

from effivlm.cli.shell import BROKEN_CONTRACT, console, guard


def list_(
    what: Annotated[
        str, typer.Argument(help="methods, families, suites, tasks, models or support")
    ],
) -> None:
    """List what there is."""
    guard(lambda: _list(what))


def _list(what: str) -> None:
    from effivlm import lists, registry

    for line in registry.lookup("list", what, lists.LISTS)():
        console.print(line, highlight=False, soft_wrap=True)


def show(name: Annotated[str, typer.Argument(help="A method or a family.")]) -> None:
    """Paper, parameters, deviations, stages and supported families of a method; facts about a
    family.
    """
    guard(lambda: _show(name))


def _show(name: str) -> None:
    from effivlm import catalogue

    for line in catalogue.describe(name):
        console.print(line, highlight=False, soft_wrap=True)


def check(
    name: Annotated[
        str, typer.Argument(help="A method or family, of this package or found by entry point.")
    ],
) -> None:
    """Put a method through the contract on a tiny random model of every family, or a family through
    its own rules and those of every method.
    """
    guard(lambda: _check(name))


def _check(name: str) -> None:
    from effivlm.contract.gate import check as verdicts

    broken = 0
    for verdict in verdicts(name):
        for line in verdict.lines():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        broken += len(verdict.broken)
    if broken:
        raise typer.Exit(BROKEN_CONTRACT)
