"""The command line: verbs only, no logic; one module per group of verbs."""

import typer

from effivlm.cli.looking import check, list_, show
from effivlm.cli.running import report, run
from effivlm.cli.shell import BROKEN_CONTRACT, FAILED_DOCUMENTS, INTERRUPTED, USER_ERROR
from effivlm.cli.timing import calibrate, measure, predict

__all__ = ["BROKEN_CONTRACT", "FAILED_DOCUMENTS", "INTERRUPTED", "USER_ERROR", "app"]

QUESTION = (
    "Which training-free acceleration should I use on this vision-language model, what does it"
    " cost, what does it save?"
)
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=QUESTION
)
for verb in (run, measure, predict, calibrate, check, report):
    app.command()(verb)
app.command(name="list")(list_)
app.command()(show)
