"""Whole files or nothing, and folders; a full disk is one message."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effivlm.files.reading import Failure, reason, said

FULL = (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, content: str | bytes, failure: Failure, intact: str) -> None:
    """Write a whole file, or leave what was there.

    Args:
        path: of the file.
        content: text (UTF-8) or bytes.
        failure: the error raised.
        intact: what is not lost and what to do, for its message.

    Raises:
        EffivlmError: of the kind ``failure``, where the system does not let it be written.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    fresh = path.with_name(path.name + ".new")
    appendable(fresh, failure)
    with explained(path, failure, intact):
        try:
            fresh.write_bytes(data)
            fresh.replace(path)
        except OSError:
            if fresh.is_file():
                fresh.unlink()
            raise


def make_folder(path: Path, failure: Failure) -> None:
    """Make a folder and those above it, unless it is there.

    Raises:
        EffivlmError: of the kind ``failure``, such as where a file is in its place.
    """
    with explained(path, failure, "choose another folder"):
        path.mkdir(parents=True, exist_ok=True)


def appendable(path: Path, failure: Failure) -> None:
    """Refuse to write to a pipe or a device, which would wait.

    Raises:
        EffivlmError: of the kind ``failure``.
    """
    with explained(path, failure, "move it away"):
        there = path.exists() and not path.is_file()
    if there:
        raise failure(f"{said(path)} is in the way: expected a file or nothing; move it away")


@contextmanager
def explained(path: Path, failure: Failure, intact: str) -> Iterator[None]:
    """Errors of the system inside the block are raised as ``failure``."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, failure):
            raise
        if getattr(error, "errno", None) in FULL:
            raise failure(f"no space left on the disk of {said(path)}: {intact}") from error
        raise failure(f"cannot write {said(path)}: {reason(error)}") from error
