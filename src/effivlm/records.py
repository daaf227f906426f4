"""Typed records and how they are read back; `store` writes them.

One line of a JSONL file is one record. A last line that was torn when its writer was killed is left
out; any other bad line is an error that names file and line.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # of 3.12: pydantic reads it on older Pythons too

from effivlm.errors import EffivlmError
from effivlm.files.reading import mapping, read_lines, reason
from effivlm.files.typed import check_numbers, reader_of
from effivlm.scores import Answered, Scores, read_scores


class StoreError(EffivlmError, RuntimeError):
    """A run folder that cannot be used; the message says why and what is intact."""


class CostAccount(TypedDict):
    """What one answer cost, counted in the tensors (`runtime.audit.Account`) and derived from
    shapes (`measure.roofline`).

    Keys:
        prompt_tokens: logical prompt length. visual_tokens: visual tokens of the uncompressed
        prompt. visual_per_layer, tokens_per_layer: entering each decoder layer. kv_per_layer:
        prompt entries held after prefill, mean over KV heads. kv_bytes_per_layer, kv_bytes: their
        bytes. kv_held_per_layer, kv_bytes_held: bytes of the tensors that store them, where heads
        of unequal counts are padded. prefill_flops: multiply-adds counted twice.
        decode_bytes_per_token: bytes one decode step must read.
        realised: retained share by unit (visual, visual_mean, prompt_kv). weights: of a weights
        method, what the decoder's matrices hold (`runtime.weights.WeightsAccount`).
    """

    prompt_tokens: int
    visual_tokens: int
    visual_per_layer: list[int]
    tokens_per_layer: list[int]
    kv_per_layer: list[float]
    kv_bytes_per_layer: list[int]
    kv_bytes: int
    kv_held_per_layer: list[int]
    kv_bytes_held: int
    prefill_flops: int
    decode_bytes_per_token: int
    realised: dict[str, float]
    weights: NotRequired[dict[str, int]]


@dataclass(frozen=True)
class DocumentRecord:
    """One answer of one model under one setting.

    Attributes:
        model, setting, task, document: what was answered under what (text forms).
        answer: the text, raw, or None where the document failed. score: in [0, 1], joined from
            the scores beside the answers when a run is read; None where there is none.
        metric: the score's name. references: accepted answers. new_tokens: generated. finish:
            ``stop`` or ``length``.
        error: None, or ``{"type", "message"}``. digest: of prompt and media.
        cost: see `CostAccount`; None where the document failed. cluster: documents of the same one
            depend on each other and are drawn together: those that share media (digest of the media
            alone), or what the task declares; empty where a document stands for itself.

    Raises:
        ValueError: if it has both an answer and an error, or neither, or a score that is no finite
            number.
    """

    model: str
    setting: str
    task: str
    document: str
    metric: str
    answer: str | None
    references: tuple[str, ...]
    new_tokens: int
    finish: str
    error: dict[str, str] | None
    digest: str
    score: float | None = None
    cost: CostAccount | dict[str, Any] | None = field(repr=False, default=None)
    cluster: str = ""

    def __post_init__(self) -> None:
        if (self.answer is None) == (self.error is None):
            got = f"answer={self.answer!r}, error={self.error!r}"
            raise ValueError(
                f"{self.task} {self.document}: expected either an answer or an error, got {got}"
            )
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(
                f"{self.task} {self.document}: the score is {self.score!r}; expected a finite"
                " number, or None"
            )

    @property
    def failed(self) -> bool:
        """Whether the document has no answer."""
        return self.error is not None


@dataclass(frozen=True)
class TimingRecord:
    """One timed sample of one setting: the same prompt run once; baseline and settings alternate
    sample by sample.

    Attributes:
        model, setting, workload: what was timed (text forms). sample: number of the sample; samples
        of ``none`` and of a
            setting with the same number were run one after the other and form a pair.
        seconds: by stage: media, vision, method, prefill, decode (these sum to the total), ttft,
            decode_per_token, total.
        memory: bytes by kind: allocated, reserved, resident, kv, weights. new_tokens: decoded.
        busy: what else used the device meanwhile, or empty. correct: whether the setting's
            correctness check passed.

    Raises:
        ValueError: for a time that is negative or no finite number.
    """

    model: str
    setting: str
    workload: str
    sample: int
    seconds: dict[str, float]
    memory: dict[str, int] = field(default_factory=dict)
    new_tokens: int = 0
    busy: str = ""
    correct: bool = True

    def __post_init__(self) -> None:
        for stage, value in self.seconds.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{self.workload} sample {self.sample}: {stage} took {value!r} s; expected a"
                    " finite number, 0 or more"
                )


_NUMBERS = ("kv_bytes", "kv_bytes_held", "prefill_flops", "decode_bytes_per_token")
_SHARES = ("visual", "visual_mean", "prompt_kv")
_read_document, _timing = reader_of(DocumentRecord), reader_of(TimingRecord)


def _document(data: Any) -> DocumentRecord:
    """A record from plain data; raises ValueError."""
    record = _read_document(data)
    if record.cost:
        check_numbers(dict(record.cost), _NUMBERS)
        realised = record.cost.get("realised", dict.fromkeys(_SHARES, 0.0))
        if not isinstance(realised, dict) or not set(_SHARES) <= set(realised):
            raise ValueError(f"cost.realised: expected {', '.join(_SHARES)}")
        check_numbers(realised, _SHARES)
    return record


def content_hash(content: Any, length: int = 16) -> str:
    """Hexadecimal hash of plain data, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def read_records(path: Path) -> list[DocumentRecord]:
    """Finished lines of one file, one per document; a torn last line is left out, a later answer
    replaces a failure.

    Raises:
        StoreError: for a line that is not a record, or answers a document again; names file and
            line.
    """
    found: dict[str, DocumentRecord] = {}
    for number, data in _lines(path):
        try:
            record = _document(data)
        except (ValueError, OverflowError) as error:
            raise _unreadable(path, number, error) from None
        before = found.get(record.document)
        if before is not None and not before.failed:
            raise StoreError(
                f"{path}, line {number} answers document {record.document!r} again: the file is"
                " damaged; move it away and run the same command again"
            )
        found[record.document] = record
    return list(found.values())


def record_files(folder: Path) -> list[Path]:
    """Files of answers of a run, in order.

    Raises:
        StoreError: for one that is not where a run puts it.
    """
    home = folder / "records"
    paths = sorted(home.rglob("*.jsonl"))
    for path in paths:
        if len(path.relative_to(home).parts) != 3:
            raise StoreError(
                f"{path} is not where a run puts answers (records/MODEL/SETTING/TASK.jsonl): move"
                " it away"
            )
    return paths


def read_totals(folder: Path) -> dict[tuple[str, str, str], Scores]:
    """Official scores of a run by model, setting and task (text forms); what is not scored, or out
    of date, is left out.
    """
    found: dict[tuple[str, str, str], Scores] = {}
    for path in record_files(folder):
        scores = read_scores(path)
        first = next(_lines(path), None) if scores else None
        if scores and first:
            head = mapping(first[1])
            found[str(head.get("model")), str(head.get("setting")), scores.task] = scores
    return found


def read_answers(path: Path) -> list[Answered]:
    """What a file's documents answered, without their accounts: little enough to hold at once; a
    later answer replaces a failure.

    Raises:
        StoreError: for a line that is not a record.
    """
    found: dict[str, Answered] = {}
    for number, data in _lines(path):
        try:
            r = _document(data)
        except (ValueError, OverflowError) as error:
            raise _unreadable(path, number, error) from None
        found[r.document] = Answered(r.document, r.answer, r.references, r.new_tokens)
    return list(found.values())


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.exists():
        return
    for number, line in read_lines(path, "records, one a line", StoreError):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _unreadable(path, number, error) from None


def _unreadable(path: Path, number: int, error: Exception) -> StoreError:
    return StoreError(
        f"{path}, line {number} is not a record ({reason(error)}): move the file away and run the"
        " same command again"
    )


def read_run(folder: Path) -> list[DocumentRecord]:
    """All records of a run, each with its score where the run was scored.

    Raises:
        StoreError: if the folder holds none, or two versions of one setting's answers.
    """
    homes: dict[tuple[str, str, str], Path] = {}
    found: list[DocumentRecord] = []
    for path in record_files(folder):
        scores = read_scores(path)
        each = scores.each if scores else {}
        for r in read_records(path):
            home = homes.setdefault((r.model, r.setting, r.task), path)
            if home != path:
                raise StoreError(
                    f"{home} and {path} both hold {r.task} under {r.setting}, answered under"
                    " different conditions (task or model specification changed): delete the one"
                    " that is out of date"
                )
            found.append(replace(r, score=each.get(r.document, r.score)))
    if not found:
        raise StoreError(
            f"{folder} holds no records: expected the folder of a run, such as runs/default"
        )
    return found


def read_timings(folder: Path) -> list[TimingRecord]:
    """All timed samples of a run; none if it was never measured.

    Raises:
        StoreError: for a line that is not a timed sample; names file and line.
    """
    found = []
    for path in sorted((folder / "timings").glob("*.jsonl")):
        for number, data in _lines(path):
            try:
                found.append(_timing(data))
            except (ValueError, OverflowError) as error:
                raise _unreadable(path, number, error) from None
    return found
