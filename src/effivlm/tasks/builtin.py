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
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from effivlm import registry
from effivlm.errors import shown
from effivlm.files.reading import read_bytes, reason, said
from effivlm.files.rows import MOST, read_rows
from effivlm.files.yaml_text import read_yaml
from effivlm.tasks.base import Document, MediaError, Question, Task, TaskError, one_turn
from effivlm.tasks.checks import (
    check_ids,
    check_prompt,
    check_task,
    identity,
    pictures,
    references,
)
from effivlm.tasks.per_answer import PerAnswer

HOME = Path(__file__).parent / "builtin"
Opener = Callable[[], Image.Image]


def task_names() -> list[str]:
    """Built-in tasks."""
    return sorted(p.parent.name for p in HOME.glob("*/task.yaml"))


def is_there(path: Path) -> bool:
    """Whether a path names something, which a name that no file can have does not."""
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):
        return False


def read_task(folder: Path) -> Task:
    """A task of the folder format.

    Raises:
        TaskError: if the folder's files are not in the format.
    """
    if not is_there(folder / "task.yaml"):
        raise TaskError(
            f"{said(folder)} holds no task.yaml: expected a folder in the built-in task format"
        )
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
    clusters = [d.cluster or d.id for d in documents] if any(d.cluster for d in documents) else []
    return Task(
        spec["name"],
        str(spec.get("version", 1)),
        documents,
        PerAnswer(spec["metric"]),
        int(spec.get("max_new_tokens", 16)),
        stands_for=str(spec.get("stands_for", "")),
        clusters=clusters,
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
    openers = tuple(_opener(image, folder) for image in pictures(images, place, TaskError))
    return Document(
        identity(row, number - 1, place, TaskError),
        references(answers, place, TaskError),
        partial(_question, check_prompt(prompt, place, TaskError), openers),
        str(row.get("cluster", "")),
    )


def _question(prompt: str, openers: Sequence[Opener]) -> Question:
    return one_turn(prompt, [opened() for opened in openers])


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
