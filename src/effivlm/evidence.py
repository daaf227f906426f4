"""What a page shows beside the records: questions, pictures, and what became of visual tokens.

    runs/NAME/documents/TASK.jsonl        one line a document: prompt, references, its pictures
    runs/NAME/pictures/DIGEST.png         at most `SIDE` pixels wide or high, each once
    runs/NAME/traces/MODEL/TASK.jsonl     one line a traced answer; a later line replaces an earlier
    runs/NAME/views/MODEL/TASK.jsonl      one line a document: tiles as the encoder took them

None of it enters a table: a run without it is complete.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from effivlm.records import StoreError
from effivlm.tasks.base import Question

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
            self.known[task] = {d["document"] for d in lines(path)}
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
            path.parent.mkdir(parents=True, exist_ok=True)
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
    """Add one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    line = ("\n" if torn else "") + json.dumps(data, ensure_ascii=False) + "\n"
    with path.open("ab") as handle:
        handle.write(line.encode(errors="backslashreplace"))


def lines(path: Path) -> Iterator[Any]:
    """Finished lines of a file; torn ones are left out."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError:
            if line.startswith(b"{") and not line.endswith(b"}"):  # its writer was killed
                continue
            raise StoreError(f"{path}, line {number} is not JSON: delete the file") from None


def shown(folder: Path) -> dict[tuple[str, str], Shown]:
    """(task, document) -> what was asked."""
    return {
        (path.stem, d["document"]): Shown(
            path.stem,
            d["document"],
            d["prompt"],
            tuple(d["references"]),
            tuple((name, width, height) for name, width, height in d["pictures"]),
        )
        for path in sorted((folder / "documents").glob("*.jsonl"))
        for d in lines(path)
    }


def views(folder: Path) -> dict[tuple[str, str, str], list[str]]:
    """(model, task, document) -> file names of its tiles."""
    home = folder / "views"
    return {
        (str(path.parent.relative_to(home)), path.stem, d["document"]): d["tiles"]
        for path in sorted(home.rglob("*.jsonl"))
        for d in lines(path)
    }


def traced(folder: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """(model, setting, task, document) -> trace."""
    home = folder / "traces"
    return {
        (str(path.parent.relative_to(home)), d["setting"], path.stem, d["document"]): d["trace"]
        for path in sorted(home.rglob("*.jsonl"))
        for d in lines(path)
    }
