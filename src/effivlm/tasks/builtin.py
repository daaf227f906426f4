"""Tasks in the built-in format: a folder with ``task.yaml`` and rows in JSONL or parquet, or rows
that a renderer makes.

name: scene_colour
version: 1
prompt: "{question}"          # row fields in braces
metric: exact_match           # see tasks.scoring
max_new_tokens: 6
stands_for: GQA
rows: rows.jsonl              # each row: id, question, answers, images (paths or base64 bytes)
# or: generator: {task: colour, count: 200}
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from effivlm import registry
from effivlm.tasks.base import Document, MediaError, Question, Task, TaskError, one_turn
from effivlm.tasks.scoring import SCORERS, PerAnswer

HOME = Path(__file__).parent / "builtin"
Opener = Callable[[], Image.Image]


def task_names() -> list[str]:
    """Built-in tasks."""
    return sorted(p.parent.name for p in HOME.glob("*/task.yaml"))


def read_task(folder: Path) -> Task:
    """A task of the folder format.

    Raises:
        TaskError: if the folder's files are not in the format.
    """
    if not (folder / "task.yaml").exists():
        raise TaskError(
            f"{folder} holds no task.yaml: expected a folder in the built-in task format"
        )
    try:
        spec = yaml.safe_load((folder / "task.yaml").read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{folder}/task.yaml is not YAML: {error}") from None
    return _build(spec, folder)


_KEYS = {"name", "version", "prompt", "metric", "max_new_tokens", "stands_for", "rows", "generator"}


def _build(spec: Any, folder: Path) -> Task:
    if not isinstance(spec, dict) or not {"name", "prompt", "metric"} <= set(spec):
        raise TaskError(
            f"{folder}/task.yaml: expected the keys name, prompt, metric and rows or generator"
        )
    unknown = set(spec) - _KEYS
    if unknown:
        raise TaskError(
            f"{folder}/task.yaml: unknown key(s) {', '.join(sorted(unknown))}; known:"
            f" {', '.join(sorted(_KEYS))}"
        )
    if ("rows" in spec) == ("generator" in spec):
        raise TaskError(f"{folder}/task.yaml: expected either rows or generator")
    registry.lookup("metric", spec["metric"], SCORERS)
    rows = (
        _generated(spec["generator"], folder)
        if "generator" in spec
        else _rows(folder / spec["rows"])
    )
    documents = tuple(_document(row, i, spec["prompt"], folder) for i, row in enumerate(rows))
    if len({d.id for d in documents}) < len(documents):
        twice = next(d.id for i, d in enumerate(documents) if d.id in {e.id for e in documents[:i]})
        raise TaskError(
            f"{folder}: two rows have the id {twice!r}: ids must differ, for answers are found by"
            " them"
        )
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


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise TaskError(f"{path} does not exist: task.yaml names it as rows")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet  # pyright: ignore[reportMissingModuleSource]  # optional: typings/ has its types
        except ImportError:
            raise ImportError(
                f"{path} is parquet, which needs pyarrow: pip install 'effivlm[parquet]', or use"
                " JSONL"
            ) from None
        return parquet.read_table(path).to_pylist()
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise TaskError(f"{path}, line {number} is not JSON") from None
    return rows


def _generated(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    from effivlm.zoo import suite

    try:
        return suite.rows(**spec)
    except (TypeError, ValueError) as error:
        raise TaskError(f"{folder}/task.yaml: generator: {error}") from None


def _document(row: dict[str, Any], number: int, template: str, folder: Path) -> Document:
    if not isinstance(row, dict):
        raise TaskError(
            f"{folder}: row {number + 1} is a {type(row).__name__}: expected fields such as"
            " question and answers"
        )
    try:
        prompt = template.format(**row)
        answers = row["answers"] if "answers" in row else [row["answer"]]
    except KeyError as error:
        raise TaskError(
            f"{folder}: row {number + 1} has no field {error}, which the task needs"
        ) from None
    except (ValueError, IndexError, AttributeError) as error:
        raise TaskError(
            f"{folder}/task.yaml: the prompt {template!r} cannot be filled in: {error}"
        ) from None
    images = row.get("images", [row["image"]] if "image" in row else [])
    for field, values in (("answers", answers), ("images", images)):
        if isinstance(values, str | bytes | dict):  # a text would be read letter by letter
            raise TaskError(
                f"{folder}: row {number + 1}: {field} is one value: give a list, or name the field"
                f" {field[:-1]}"
            )
    openers = tuple(_opener(image, folder) for image in images)
    return Document(
        str(row.get("id", number)),
        tuple(map(str, answers)),
        partial(_question, prompt, openers),
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
                data = (folder / image).read_bytes()
            return Image.open(io.BytesIO(data)).convert("RGB")
        except Exception as error:
            raise MediaError(f"cannot read image {where}: {error}") from error

    return read
