"""What a task is: documents that are opened when they are asked, and a scorer that reads answers
when all are given.

Answers are recorded raw; scores are computed from them afterwards, as often as wanted (`scores`,
`evaluation`). So a new metric or a judge never needs the model again.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image

from effivlm.errors import EffivlmError
from effivlm.scores import Answered, Metric

Message = Mapping[str, Any]
Form = Literal["free", "yes_no", "letter"]


class TaskError(EffivlmError, ValueError):
    """A task that cannot be read or scored; the message names it and what to do."""


class MediaError(EffivlmError, RuntimeError):
    """An image or video of one document that cannot be opened."""


@dataclass(frozen=True)
class Question:
    """One document as it is asked.

    Attributes:
        messages: turns as ``apply_chat_template`` takes them: role, and parts (text, image) in the
            prompt's order. images: RGB, in order of appearance. videos: files, in order of
            appearance; `tasks.video.framed` makes images of them.
    """

    messages: tuple[Message, ...]
    images: tuple[Image.Image, ...] = ()
    videos: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All text of the prompt."""
        parts = [p for m in self.messages for p in m["content"]]
        return "\n".join(p["text"] for p in parts if p["type"] == "text")

    def digest(self) -> str:
        """Hash of messages and pixels, for records."""
        asked = json.dumps([self.messages, self.media()], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def media(self) -> str:
        """Hash of the pixels alone; empty without any."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(str(image.size).encode() + image.tobytes())
        return digest.hexdigest()[:16] if self.images else ""


def one_turn(text: str, images: Sequence[Image.Image] = ()) -> Question:
    """One user turn: the images, then the text."""
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    content = [*parts, {"type": "text", "text": text}]
    return Question(({"role": "user", "content": content},), tuple(images))


@dataclass(frozen=True)
class Document:
    """One question, not yet opened.

    Attributes:
        id: unique in its task. answers: accepted answers. open: text and pixels together;
            MediaError is raised there, not earlier. cluster: documents of the same one are sampled
            and resampled together (the two questions about one image of MME, say); empty where a
            document stands for itself.
    """

    id: str
    answers: tuple[str, ...]
    open: Callable[[], Question]
    cluster: str = ""


@dataclass(frozen=True)
class Result:
    """What a scorer finds.

    Attributes:
        each: per answer a score in [0, 1], or None where the task has none for single documents; a
            failed document scores 0. total: official numbers by metric; a failed document counts as
            answered wrong. void: why the numbers are no scores, or empty.
    """

    each: list[float | None]
    total: dict[str, float]
    void: str = ""


class Scorer(ABC):
    """Official numbers of a task.

    Attributes:
        name: what is recorded as the metric of the task. metrics: what `total` may give; the first
            is the headline. form: ``yes_no`` and ``letter`` answers are counted as invalid where
            they are neither.
    """

    name: str
    metrics: tuple[Metric, ...]
    form: Form = "free"

    @abstractmethod
    def score(self, answers: Sequence[Answered]) -> Result:
        """Scores of all answers that a setting gave."""


@dataclass(frozen=True)
class Task:
    """A task: its documents and how answers are scored.

    Attributes:
        name: unique in a run. version: of task, package and prompt, in words. documents: made when
            indexed. scorer: see there. max_new_tokens: of an answer. until: texts that end an
            answer; cut off afterwards, which under greedy decoding is the same. stands_for: the
            benchmark that a built-in task imitates. clusters: of every document, where they have
            any.
    """

    name: str
    version: str
    documents: Sequence[Document]
    scorer: Scorer
    max_new_tokens: int = 16
    until: tuple[str, ...] = ()
    stands_for: str = ""
    clusters: Sequence[str] = ()

    def cut(self, answer: Answered) -> Answered:
        """The answer up to the first of ``until``."""
        text = answer.text
        for stop in self.until:
            text = text.partition(stop)[0] if stop and text else text
        return replace(answer, text=text)
