"""What a page shows beside the records: questions, pictures, and what became of visual tokens.

    runs/NAME/documents/TASK.jsonl        one line a document: prompt, references, its pictures
    runs/NAME/pictures/DIGEST.png         at most `SIDE` pixels wide or high, each once
    runs/NAME/traces/MODEL/TASK.jsonl     one line a traced answer; a later line replaces an earlier
    runs/NAME/views/MODEL/TASK.jsonl      one line a document: tiles as the encoder took them

None of it enters a table: a run without it is complete.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from effivlm.errors import shown as quoted
from effivlm.files.reading import read_lines, reason
from effivlm.files.typed import reader_of
from effivlm.files.writing import appendable, explained, make_folder
from effivlm.records import StoreError
from effivlm.tasks.base import Question

T = TypeVar("T")
INTACT = "every finished line is intact; free space and run the same command again"
_PICTURE = re.compile(r"[0-9a-f]{20}\.(png|jpg)")
SIDE = 384  # pixels
LOSSLESS = 160  # pixels; what is smaller is drawn, not photographed


@dataclass(frozen=True)
class Shown:
    """What one document asked.

    Attributes:
        task, document: as in the records. prompt: its words. references: accepted answers.
        pictures: file names in ``pictures/``, each with the original's width and height.
    """

    task: str
    document: str
    prompt: str
    references: tuple[str, ...]
    pictures: tuple[tuple[str, int, int], ...]


@dataclass
class Evidence:
    """A run's folder, to which questions, pictures and traces are added.

    Args:
        folder: ``runs/NAME``.
    """

    folder: Path
    known: dict[str, set[str]] = field(default_factory=dict)

    def show(
        self,
        task: str,
        document: str,
        question: Question,
        references: Sequence[str],
    ) -> None:
        """Note a document once; pictures that are there already are not written again."""
        path = self.folder / "documents" / f"{task}.jsonl"
        if task not in self.known:
            self.known[task] = {d.document for d in lines(path, _document)}
        if document in self.known[task]:
            return
        pictures = [(self._picture(image), *image.size) for image in question.images]
        line = {"document": document, "prompt": question.text, "references": list(references)}
        append(path, line | {"pictures": pictures})
        self.known[task].add(document)

    def _picture(self, image: Image.Image) -> str:
        digest = hashlib.sha256(str(image.size).encode() + image.tobytes()).hexdigest()[:20]
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        name = digest + (".png" if max(small.size) <= LOSSLESS else ".jpg")
        path = self.folder / "pictures" / name
        if not path.exists():
            make_folder(path.parent, StoreError)
            with explained(path, StoreError, INTACT):
                small.save(path, quality=82)  # PNG has no quality, and does not mind
        return name

    def view(self, model: str, task: str, document: str, tiles: Sequence[Image.Image]) -> None:
        """Note what the encoder was given: cropped, padded, cut into tiles as the model does it."""
        path = self.folder / "views" / model / f"{task}.jsonl"
        if tiles:
            append(path, {"document": document, "tiles": [self._picture(tile) for tile in tiles]})

    def trace(
        self, model: str, setting: str, task: str, document: str, trace: Mapping[str, Any]
    ) -> None:
        """Note what became of the visual tokens of one answer (`PromptTrace.compact`)."""
        path = self.folder / "traces" / model / f"{task}.jsonl"
        append(path, {"document": document, "setting": setting, "trace": trace})


def append(path: Path, data: Any) -> None:
    """Add one line.

    Raises:
        StoreError: where the system does not let it be written.
    """
    make_folder(path.parent, StoreError)
    appendable(path, StoreError)
    line = json.dumps(data, ensure_ascii=False) + "\n"
    with explained(path, StoreError, INTACT), path.open("ab+") as handle:
        if handle.tell():
            handle.seek(-1, os.SEEK_END)
            line = line if handle.read(1) == b"\n" else "\n" + line  # after a torn one
        handle.write(line.encode(errors="backslashreplace"))


@dataclass(frozen=True)
class _DocumentLine:
    document: str
    prompt: str
    references: tuple[str, ...]
    pictures: tuple[tuple[str, int, int], ...]

    def __post_init__(self) -> None:
        _check_names(name for name, *_ in self.pictures)


@dataclass(frozen=True)
class _ViewLine:
    document: str
    tiles: list[str]

    def __post_init__(self) -> None:
        _check_names(self.tiles)


@dataclass(frozen=True)
class _TraceLine:
    document: str
    setting: str
    trace: dict[str, Any]


def _check_names(names: Iterable[str]) -> None:
    """Pictures of ours and no other file, which a page would take in."""
    for name in names:
        if not _PICTURE.fullmatch(name):
            raise ValueError(f"expected the name of a picture, got {quoted(name, 60)}")


_document, _view, _trace = reader_of(_DocumentLine), reader_of(_ViewLine), reader_of(_TraceLine)


def lines(path: Path, read: Callable[[Any], T]) -> Iterator[T]:
    """Finished lines of a file; torn ones are left out.

    Raises:
        StoreError: for anything else; names file and line.
    """
    if not path.exists():
        return
    for number, line in read_lines(path, "what `effivlm run` noted for the page", StoreError):
        text = line.rstrip(b"\n")
        if text.startswith(b"{") and not text.endswith(b"}"):  # its writer was killed
            continue
        try:
            yield read(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise StoreError(
                f"{path}, line {number} is not what `effivlm run` noted ({reason(error)}): delete"
                " the file, which no table needs"
            ) from None


def shown(folder: Path) -> dict[tuple[str, str], Shown]:
    """(task, document) -> what was asked."""
    return {
        (path.stem, d.document): Shown(path.stem, d.document, d.prompt, d.references, d.pictures)
        for path in sorted((folder / "documents").glob("*.jsonl"))
        for d in lines(path, _document)
    }


def views(folder: Path) -> dict[tuple[str, str, str], list[str]]:
    """(model, task, document) -> file names of its tiles."""
    home = folder / "views"
    return {
        (str(path.parent.relative_to(home)), path.stem, d.document): d.tiles
        for path in sorted(home.rglob("*.jsonl"))
        for d in lines(path, _view)
    }


def traced(folder: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """(model, setting, task, document) -> trace."""
    home = folder / "traces"
    return {
        (str(path.parent.relative_to(home)), d.setting, path.stem, d.document): d.trace
        for path in sorted(home.rglob("*.jsonl"))
        for d in lines(path, _trace)
    }
