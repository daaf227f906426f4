"""What every verb stands on: consoles, exit statuses, and errors as one message."""

import io
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from effivlm.errors import EffivlmError, printable
from effivlm.files.reading import reason

BROKEN_CONTRACT, USER_ERROR, FAILED_DOCUMENTS, DEFECT, INTERRUPTED = 1, 2, 3, 70, 130
WORD = 400  # characters of a name that a message repeats
PIPE = 110  # columns where nothing says how many there are
# a terminal may be resized; COLUMNS counts in a pipe too
console = Console(
    width=None if sys.stdout.isatty() else shutil.get_terminal_size((PIPE, 24)).columns
)


def line(text: str, style: str = "") -> None:
    """Print a line as it is: no markup is read in it, nothing is cut or coloured."""
    console.print(Text(printable(text), style), soft_wrap=True)


def guard(verb: Callable[[], None]) -> None:
    """Errors that a user can mend are one message, not a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot write a sign shows its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        verb()
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        _end("interrupted: the same command goes on from there", INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has read enough
        raise typer.Exit(USER_ERROR) from None
    except (EffivlmError, ImportError, NotImplementedError) as error:
        _end(str(error), USER_ERROR)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        _end(f"{name}{reason(error)}", USER_ERROR)
    except MemoryError:
        _end("there is not enough memory: take fewer documents or a smaller width", USER_ERROR)
    except Exception as error:
        _end(_defect(error), DEFECT)


def _defect(error: Exception) -> str:
    """What is ours to mend, with a file that says where it happened."""
    said = " ".join(str(error).split())[:200]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="effivlm-", suffix=".txt", delete=False, errors="backslashreplace"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
        where = f"; please report it with {Path(file.name)}"
    except OSError:
        where = ""
    return f"a defect of effivlm: {type(error).__name__}: {said}{where}"


def _end(message: str, status: int) -> None:
    message = re.sub(rf"\S{{{WORD},}}", lambda m: f"{m[0][: WORD - 20]}... (shortened)", message)
    text = Text.assemble(("error: ", "bold red"), printable(message))
    Console(stderr=True).print(text, soft_wrap=True)
    raise typer.Exit(status) from None
