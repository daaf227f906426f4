"""Typed records, provenance, and an append-only store that survives being killed.

    runs/NAME/experiment.yaml      the experiment as resolved, with its hash
    runs/NAME/environment.json     commit, versions, device
    runs/NAME/records/MODEL/SETTING-HASH/TASK.jsonl      one line per document

One line is one `write`; a torn last line is cut off before anything is added; a finished line is never lost, repeated or
mixed with another setting, for a setting's folder is named by a hash of all that can change its answers.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class StoreError(RuntimeError):
    """A run folder that cannot be used; the message says why and what is intact."""


@dataclass(frozen=True)
class DocumentRecord:
    """One answer of one model under one setting.

    Attributes:
        model, setting, task, document: what was answered under what (text forms).
        answer: the text, or None where the document failed. score: the task's own, in [0, 1], or None.
        metric: the score's name. references: accepted answers. new_tokens: generated. finish: ``stop`` or ``length``.
        error: None, or ``{"type", "message"}``. digest: of prompt and media.
        cost: see `runtime.audit.Account.as_dict`; None where the document failed.
    """

    model: str
    setting: str
    task: str
    document: str
    metric: str
    answer: str | None
    score: float | None
    references: tuple[str, ...]
    new_tokens: int
    finish: str
    error: dict[str, str] | None
    digest: str
    cost: dict[str, Any] | None = field(repr=False, default=None)

    @property
    def failed(self) -> bool:
        """Whether the document has no answer."""
        return self.error is not None


def content_hash(content: Any, length: int = 16) -> str:
    """Hexadecimal hash of plain data, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def environment(device: str, image_backend: str) -> dict[str, Any]:
    """Commit, dirty flag, versions, device, image back end, date."""
    versions = {}
    for name in ("effivlm", "torch", "transformers", "tokenizers", "pillow", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit, dirty = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit, "dirty": None if commit is None else bool(dirty), "versions": versions, "python": platform.python_version(),
        "machine": platform.machine(), "system": platform.platform(), "device": device, "image_backend": image_backend,
        "cores": os.cpu_count(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _git(*args: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class RunStore:
    """One run's folder, open for writing by one process.

    Args:
        folder: ``runs/NAME``. experiment: the resolved YAML. identity: plain data that two runs of one folder must share.

    Raises:
        StoreError: if the folder holds another experiment, or another process writes to it.
    """

    def __init__(self, folder: Path, experiment: str, identity: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = self._locked()
        self.files: dict[Path, int] = {}
        stamp = content_hash(identity)
        marker = folder / "identity"
        if marker.exists() and marker.read_text().strip() != stamp:
            self.close()
            raise StoreError(f"{folder} holds another experiment (its experiment.yaml differs): choose another name, or delete the folder")
        (folder / "experiment.yaml").write_text(experiment)
        marker.write_text(stamp + "\n")

    def _locked(self) -> int:
        path = self.folder / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = path.read_text().strip() or "unknown"
            os.close(lock)
            raise StoreError(f"{self.folder} is in use by process {owner}: wait for it, or choose another name") from None
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        return lock

    def close(self) -> None:
        """Flush everything and release the folder."""
        for handle in self.files.values():
            os.fsync(handle)
            os.close(handle)
        self.files = {}
        os.close(self.lock)  # releases the lock; a killed process releases it too

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def path(self, model: str, setting_hash: str, task: str) -> Path:
        """Where a setting's answers to a task are."""
        return self.folder / "records" / model / setting_hash / f"{task}.jsonl"

    def done(self, model: str, setting_hash: str, task: str) -> set[str]:
        """Documents that need not be answered again; failures count as done, for they are recorded."""
        return {r.document for r in read_records(self.path(model, setting_hash, task))}

    def append(self, path: Path, record: DocumentRecord) -> None:
        """Add one finished line.

        Raises:
            StoreError: if the disk is full; what was finished before is intact.
        """
        handle = self.files.get(path)
        if handle is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_line(path)
            handle = self.files[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        line = (json.dumps(asdict(record), ensure_ascii=False) + "\n").encode()
        end = os.fstat(handle).st_size
        try:
            written = os.write(handle, line)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            written = -1
        if written != len(line):
            os.ftruncate(handle, end)
            raise StoreError(f"no space left on the disk of {path}: every finished line is intact; free space and run the same command again")


def cut_torn_line(path: Path) -> None:
    """Remove a last line that was not finished when its writer was killed."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as handle:
            handle.truncate(data.rfind(b"\n") + 1)


def read_records(path: Path) -> Iterator[DocumentRecord]:
    """Finished lines of one file; a torn last line is left out.

    Raises:
        StoreError: for any other line that is not a record; names file and line.
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            data = json.loads(line)
            data["references"] = tuple(data["references"])
            yield DocumentRecord(**data)
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{path}, line {number} is not a record ({error}): move the file away and run the same command again") from None


def read_run(folder: Path) -> list[DocumentRecord]:
    """All records of a run.

    Raises:
        StoreError: if the folder holds none.
    """
    found = [r for path in sorted((folder / "records").rglob("*.jsonl")) for r in read_records(path)]
    if not found:
        raise StoreError(f"{folder} holds no records: expected the folder of a run, such as runs/default")
    return found
