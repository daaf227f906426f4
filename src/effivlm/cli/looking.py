"""`list`, `show` and `check`: what there is, and whether it keeps its contract."""

import json
from typing import Annotated

import typer

from effivlm.cli.shell import BROKEN_CONTRACT, guard, line


def list_(
    what: Annotated[
        str, typer.Argument(help="methods, families, metrics, suites, tasks, models or support")
    ],
    machine: Annotated[bool, typer.Option("--json", help="Print the names as JSON.")] = False,
) -> None:
    """List what there is."""
    guard(lambda: _list(what, machine))


def _list(what: str, machine: bool) -> None:
    from effivlm import lists, registry

    texts = list(registry.lookup("list", what, lists.LISTS)())
    if machine:
        line(json.dumps([t.split()[0] for t in texts] if what != "support" else texts))
        return
    for text in texts:
        line(text)


def show(name: Annotated[str, typer.Argument(help="A method or a family.")]) -> None:
    """Paper, parameters, deviations, stages and supported families of a method; facts about a
    family.
    """
    guard(lambda: _show(name))


def _show(name: str) -> None:
    from effivlm import catalogue

    for text in catalogue.describe(name):
        line(text)


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
        for text in verdict.lines():
            line(text)
        broken += len(verdict.broken)
    if broken:
        raise typer.Exit(BROKEN_CONTRACT)
