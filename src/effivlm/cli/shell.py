"""What every verb stands on: consoles, exit statuses, and errors as one message."""

import sys
from collections.abc import Callable

import typer
from rich.console import Console

from effivlm.errors import EffivlmError

BROKEN_CONTRACT, FAILED_DOCUMENTS, USER_ERROR, INTERRUPTED = 1, 3, 2, 130
console = Console(width=None if sys.stdout.isatty() else 110)


def guard(verb: Callable[[], None]) -> None:
    """Errors that a user can mend are one message, not a traceback."""
    known = (EffivlmError, ImportError, NotImplementedError)
    try:
        verb()
    except known as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {error!s}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(USER_ERROR) from None
