"""Whole files as bytes, text or JSON; only regular files are opened, so that nothing waits."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effivlm.errors import EffivlmError, printable

MIB = 1 << 20
Failure = type[EffivlmError]
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_bytes(path: Path, expected: str, failure: Failure, most: int = 64 * MIB) -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        expected: what it should be, in words, such as "a YAML file".
        failure: the error raised.
        most: bytes that are read at most.

    Raises:
        EffivlmError: of the kind ``failure``, whatever is wrong with the file.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
            raise failure(f"{said(path)} is {kind}: expected {expected}")
        if found.st_size > most:
            raise failure(
                f"{said(path)} has {found.st_size / MIB:.1f} MiB: expected {expected} of at most"
                f" {most // MIB} MiB"
            )
        limit = min(most, max(found.st_size, MIB))  # files of the system say 0 and may never end
        with open(path, "rb", opener=_unwaiting) as file:
            data = file.read(limit + 1)
        if data is None or len(data) > limit:
            raise failure(f"{said(path)} has no end or no content: expected {expected}")
        return data
    except failure:  # which may be a ValueError too
        raise
    except FileNotFoundError:
        raise failure(f"{said(path)} does not exist: expected {expected}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise failure(f"cannot read {said(path)}: {reason(error)}; expected {expected}") from None


def _unwaiting(name: str, flags: int) -> int:
    """Opens without waiting for whoever has to write first."""
    return os.open(name, flags | os.O_NONBLOCK)


def read_lines(path: Path, expected: str, failure: Failure) -> Iterator[tuple[int, bytes]]:
    """Lines of a regular file one by one, with their numbers; a torn last one is left out.

    Raises:
        EffivlmError: of the kind ``failure``.
    """
    if not path.is_file():
        read_bytes(path, expected, failure, 0)  # says what it is
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    yield number, line
    except OSError as error:
        raise failure(f"cannot read {said(path)}: {reason(error)}; expected {expected}") from None


def read_text(path: Path, expected: str, failure: Failure, most: int = 64 * MIB) -> str:
    """The content of a file in UTF-8, with or without a byte order mark; raises as `read_bytes`."""
    return decoded(read_bytes(path, expected, failure, most), said(path), expected, failure)


def decoded(data: bytes, where: str, expected: str, failure: Failure) -> str:
    """Bytes as UTF-8 text, without a byte order mark; the error names line and byte."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise failure(f"{where} is UTF-16: expected {expected} in UTF-8; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise failure(
            f"{where}, line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): expected"
            f" {expected} in UTF-8"
        ) from None


def read_json(path: Path, expected: str, failure: Failure, most: int = 64 * MIB) -> Any:
    """Plain data of a JSON file; raises as `read_bytes`."""
    return parse_json(read_text(path, expected, failure, most), said(path), expected, failure)


def parse_json(text: str, where: str, expected: str, failure: Failure) -> Any:
    """Plain data of JSON text; keys that come twice are refused."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise failure(
            f"{where} is not JSON: {error.msg} at character {error.pos + 1}; expected {expected}"
        ) from None
    except RecursionError:
        raise failure(f"{where} is nested too deeply: expected {expected}") from None
    except ValueError as error:  # a key twice; an integer of thousands of digits
        raise failure(f"{where}: {reason(error)}; expected {expected}") from None


def mapping(data: Any) -> dict[str, Any]:
    """Plain data that should have keys; none, where it has not."""
    return {str(k): v for k, v in data.items()} if isinstance(data, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"the key {twice[:80]!r} comes twice")
    return out


def said(path: Path) -> str:
    """A path as a message names it."""
    return printable(str(path))[:300]


def reason(error: Exception) -> str:
    """Why an operation of the system failed, in a few words."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text[:300]
