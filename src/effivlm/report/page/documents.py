"""The documents of a run, for the page: an index with one mark per answer, and chunks that hold
questions, pictures, answers and traces.

The index is small (one character an answer), so that sorting by flips needs no chunk; a chunk is
read when one of its documents is opened.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effivlm import evidence
from effivlm.records import DocumentRecord
from effivlm.report.rows import Row
from effivlm.tasks.scoring import normalise

CHUNK = 40  # documents
FAILED, LOST, GAINED, CHANGED, SAME, MISSING = "!", "-", "+", "~", "=", " "


@dataclass(frozen=True)
class Asked:
    """One document and its answers: by place of the row (model and setting) in the report."""

    task: str
    document: str
    answers: Mapping[int, DocumentRecord]
    marks: str

    @property
    def flips(self) -> int:
        """Answers that were right under the original and are not, or the reverse."""
        return sum(self.marks.count(m) for m in (LOST, GAINED, FAILED))


def asked(rows: Sequence[Row]) -> list[Asked]:
    """Every document, those with most flips first."""
    found: dict[tuple[str, str], dict[int, DocumentRecord]] = {}
    marks: dict[tuple[str, str], list[str]] = {}
    for place, row in enumerate(rows):
        for mine, base in row.pairs:
            key = (mine.task, mine.document)
            found.setdefault(key, {})[place] = mine
            marks.setdefault(key, [MISSING] * len(rows))[place] = mark(mine, base)
    every = [Asked(t, d, a, "".join(marks[t, d])) for (t, d), a in found.items()]
    return sorted(every, key=lambda x: -x.flips)


def mark(mine: DocumentRecord, base: DocumentRecord) -> str:
    """What a setting did to one answer."""
    if mine.failed:
        return FAILED
    if mine.answer == base.answer:
        return SAME
    before, now = base.score or 0.0, mine.score or 0.0
    if now != before:
        return LOST if now < before else GAINED
    same = normalise(mine.answer or "") == normalise(base.answer or "")
    return SAME if same else CHANGED


def index(documents: Sequence[Asked]) -> dict[str, Any]:
    """The index: parallel lists, and tasks by number."""
    tasks = list(dict.fromkeys(d.task for d in documents))
    place = {t: i for i, t in enumerate(tasks)}
    return {
        "tasks": tasks,
        "task": [place[d.task] for d in documents],
        "id": [d.document for d in documents],
        "marks": [d.marks for d in documents],
        "chunk": CHUNK,
    }


def chunks(
    folder: Path, rows: Sequence[Row], documents: Sequence[Asked]
) -> Iterator[tuple[list[dict[str, Any]], set[str]]]:
    """Chunk by chunk: its documents as plain data, and the names of their pictures."""
    found = Found(evidence.shown(folder), evidence.traced(folder), evidence.views(folder))
    for start in range(0, len(documents), CHUNK):
        part = [_plain(d, rows, found) for d in documents[start : start + CHUNK]]
        names = {name for d in part for name, *_ in d["pictures"]}
        yield part, names | {n for d in part for tiles in d["views"].values() for n in tiles}


@dataclass(frozen=True)
class Found:
    """What a run's folder holds beside its records; see `evidence`."""

    shown: Mapping[tuple[str, str], evidence.Shown]
    traced: Mapping[tuple[str, str, str, str], Any]
    views: Mapping[tuple[str, str, str], list[str]]


def _plain(one: Asked, rows: Sequence[Row], found: Found) -> dict[str, Any]:
    question = found.shown.get((one.task, one.document))
    first = next(iter(one.answers.values()))
    keys = {i: (rows[i].model, rows[i].setting, one.task, one.document) for i in one.answers}
    return {
        "prompt": question.prompt if question else None,
        "references": list(first.references),
        "metric": first.metric,
        "pictures": list(question.pictures) if question else [],
        "answers": [_answer(i, r) for i, r in one.answers.items()],
        "traces": {str(i): found.traced[k] for i, k in keys.items() if k in found.traced},
        "views": {
            m: found.views[m, one.task, one.document]
            for m in dict.fromkeys(model for model, *_ in keys.values())
            if (m, one.task, one.document) in found.views
        },
    }


def _answer(place: int, record: DocumentRecord) -> list[Any]:
    error = None if record.error is None else f"{record.error['type']}: {record.error['message']}"
    return [place, record.answer, record.score, error, record.new_tokens]
