"""JSON lines, as people and other programs write them: one object a line; blank lines, a byte order
mark and U+2028 inside a text are no mistakes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effivlm.errors import shown
from effivlm.files.reading import MIB, Failure, decoded, parse_json, read_bytes, said

MOST = 2048 * MIB  # of a file; media belong beside it, not inside
LONGEST = 64 * MIB  # of a line


def read_rows(path: Path, failure: Failure) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a file.

    Raises:
        EffivlmError: of the kind ``failure``: the file cannot be read, or a line is not a JSON
            object; names file and line.
    """
    expected = "rows in JSON, one object a line"
    data = read_bytes(path, expected, failure, MOST)
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{said(path)}, line {number}"
        if len(line) > LONGEST:
            raise failure(
                f"{where} has {len(line) // MIB} MiB: expected {LONGEST // MIB} at most; name image"
                " files instead of putting images into rows"
            )
        row = parse_json(decoded(line, where, expected, failure), where, expected, failure)
        if not isinstance(row, dict):
            raise failure(
                f"{where} is a {type(row).__name__}: expected fields such as question and answers,"
                f" got {shown(row, 60)}"
            )
        yield number, row
