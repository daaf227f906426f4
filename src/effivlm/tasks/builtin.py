"""Tasks in the built-in format: a folder with ``task.yaml`` and rows in JSONL or parquet, or rows
that a renderer makes.

name: scene_colour
version: 1
prompt: "{question}"          # row fields in braces
metric: exact_match           # effivlm list metrics
max_new_tokens: 6
stands_for: GQA
rows: rows.jsonl              # each row: id, question, answers, images (paths or base64 bytes),
                              # cluster (optional: documents that depend on each other)
# or: generator: {task: colour, count: 200}
"""

import base64
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from effivlm import registry
from effivlm.errors import EffivlmError, shown
from effivlm.files.reading import read_bytes, reason
from effivlm.files.rows import MOST, read_rows
from effivlm.files.yaml_text import read_yaml
from effivlm.metrics.metric import Score
from effivlm.tasks.checks import (
    check_ids,
    check_prompt,
    check_task,
    identity,
    pictures,
    references,
)

HOME = Path(__file__).parent / "builtin"
SUITES = Path(__file__).parent / "suites"
Opener = Callable[[], Image.Image]


class TaskError(EffivlmError, ValueError):
    """A task that cannot be read; the message names folder and key."""


class MediaError(EffivlmError, RuntimeError):
    """An image of one document that cannot be opened."""


@dataclass(frozen=True)
class Document:
    """One question.

    Attributes:
        id: unique in its task. prompt: text after the images. answers: accepted answers.
        images: one function each that opens the image (RGB); MediaError is raised there, not
            earlier.
        cluster: documents of the same one depend on each other; empty: those that share media do.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    images: tuple[Opener, ...]
    cluster: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """The chat turn that `apply_chat_template` takes."""
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in self.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.prompt}]}]


@dataclass(frozen=True)
class Task:
    """A task: its documents and how an answer is scored."""

    name: str
    version: int
    metric: str
    max_new_tokens: int
    stands_for: str
    documents: tuple[Document, ...]

    @property
    def scorer(self) -> Score:
        """(answer, references) -> score in [0, 1]."""
        return registry.metrics()[self.metric].score


def task_names() -> list[str]:
    """Built-in tasks."""
    return sorted(p.parent.name for p in HOME.glob("*/task.yaml"))


def suite_names() -> list[str]:
    """Built-in suites."""
    return sorted(p.stem for p in SUITES.glob("*.yaml"))


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name that no file can have
        return False


def load_task(name: str) -> Task:
    """A built-in task by name, or a folder.

    Raises:
        UnknownName: with near names. TaskError: if the folder's files are not in the format.
    """
    folder = Path(name)
    if not _is_there(folder / "task.yaml"):
        if "/" in name or folder.is_dir():
            raise TaskError(
                f"{folder} holds no task.yaml: expected a folder in the built-in task format"
            )
        folder = HOME / name
        registry.lookup("task or suite", name, dict.fromkeys([*task_names(), *suite_names()]))
    spec = read_yaml(folder / "task.yaml", "a task in YAML", TaskError)
    return _build(check_task(spec, folder, TaskError), folder)


def _build(spec: dict[str, Any], folder: Path) -> Task:
    registry.lookup("metric", spec["metric"], registry.metrics())
    rows = (
        enumerate(_generated(spec["generator"], folder), start=1)
        if "generator" in spec
        else _rows(folder / spec["rows"])
    )
    documents = tuple(_document(row, i, spec["prompt"], folder) for i, row in rows)
    check_ids([d.id for d in documents], folder, TaskError)
    return Task(
        spec["name"],
        spec.get("version", 1),
        spec["metric"],
        spec.get("max_new_tokens", 16),
        spec.get("stands_for", ""),
        documents,
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers (of lines, from 1) and rows."""
    if path.suffix != ".parquet":
        yield from read_rows(path, TaskError)
        return
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingModuleSource]  # optional: typings/ has its types
    except ImportError:
        raise ImportError(
            f"{path} is parquet, which needs pyarrow: pip install 'effivlm[parquet]', or use JSONL"
        ) from None
    read_bytes(path, "rows in parquet", TaskError, MOST)
    try:
        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
    except Exception as error:  # whatever pyarrow makes of a damaged file
        raise TaskError(f"{path} is not parquet: {reason(error)}") from None


def _generated(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    from effivlm.zoo import suite

    try:
        return suite.rows(**spec)
    except (TypeError, ValueError, KeyError) as error:
        raise TaskError(f"{folder}/task.yaml: generator: {error}") from None


def _document(row: dict[str, Any], number: int, template: str, folder: Path) -> Document:
    place = f"{folder}: row {number}"
    try:
        prompt = template.format(**row)
        answers = row["answers"] if "answers" in row else [row["answer"]]
    except KeyError as error:
        raise TaskError(
            f"{place} has no field {shown(error.args[0])}, which the task needs"
        ) from None
    except (ValueError, IndexError, AttributeError, TypeError, OverflowError) as error:
        raise TaskError(
            f"{folder}/task.yaml: the prompt {shown(template)} cannot be filled in: {error}"
        ) from None
    images = row.get("images", [row["image"]] if "image" in row else [])
    return Document(
        identity(row, number - 1, place, TaskError),
        check_prompt(prompt, place, TaskError),
        references(answers, place, TaskError),
        tuple(_opener(image, folder) for image in pictures(images, place, TaskError)),
        str(row.get("cluster", "")),
    )


def _opener(image: Opener | bytes | dict[str, Any] | str, folder: Path) -> Opener:
    if callable(image):
        return image

    def read() -> Image.Image:
        where = f"{len(image)} bytes" if isinstance(image, bytes) else str(image)[:80]
        try:
            if isinstance(image, bytes):
                data = image
            elif isinstance(image, dict):
                data = (
                    image["bytes"]
                    if isinstance(image["bytes"], bytes)
                    else base64.b64decode(image["bytes"])
                )
            else:
                data = read_bytes(folder / image, "an image", MediaError)
            return Image.open(io.BytesIO(data)).convert("RGB")
        except Exception as error:
            raise MediaError(f"cannot read image {where}: {error}") from error

    return read


def media_digest(images: Sequence[Image.Image]) -> str:
    """Hash of pixels, for records."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(str(image.size).encode() + image.tobytes())
    return digest.hexdigest()[:16]


def load_suite(name: str) -> list[str]:
    """The tasks of a suite, by name; a task's own name is a suite of one."""
    path = SUITES / f"{name}.yaml"
    return list(yaml.safe_load(path.read_text())["tasks"]) if path.exists() else [name]
