"""The command line: verbs only, no logic; one module per group of verbs."""

from importlib.metadata import version
from typing import Annotated

import typer

from effivlm.cli.choosing import recommend
from effivlm.cli.looking import check, list_, show
from effivlm.cli.running import report, run
from effivlm.cli.scoring import compare, data, score
from effivlm.cli.shell import BROKEN_CONTRACT, FAILED_DOCUMENTS, INTERRUPTED, USER_ERROR, line
from effivlm.cli.timing import calibrate, measure, predict
from effivlm.cli.watching import explain, view

__all__ = ["BROKEN_CONTRACT", "FAILED_DOCUMENTS", "INTERRUPTED", "USER_ERROR", "app"]

QUESTION = (
    "Which training-free acceleration should I use on this vision-language model, what does it"
    " cost, what does it save?"
)
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=QUESTION)
VERBS = (run, measure, predict, calibrate, check, report, score, compare, recommend, view, explain)
for verb in VERBS:
    app.command()(verb)
app.command(name="list")(list_)
app.command()(show)
app.add_typer(data, name="data")


def _version(asked: bool) -> None:
    if asked:
        line(f"effivlm {version('effivlm')}")
        raise typer.Exit


@app.callback(help=QUESTION)
def main(
    asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Options that come before a verb."""
