"""An append-only folder of records that survives being killed.

    runs/NAME/experiment.yaml      the experiment as resolved; `identity` holds its hash
    runs/NAME/environment.json     commit, versions, device; environments of earlier sessions under
    "earlier" runs/NAME/records/MODEL/SETTING-HASH/TASK.jsonl      one line per document
    runs/NAME/timings/WORKLOAD.jsonl                     one line per timed sample

One line is one `write`; a torn last line is cut off before anything is added; a finished line is
never lost, repeated or mixed with another setting, for a setting's folder is named by a hash of all
that can change its answers. Only a failed document may have a second line, which replaces the first
(see `RunStore.done`).
"""

import errno
import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from effivlm.provenance import package_version
from effivlm.records import DocumentRecord, StoreError, TimingRecord, content_hash, read_records


class RunStore:
    """One run's folder, open for writing by one process.

    Args:
        folder: ``runs/NAME``. experiment: the resolved YAML. identity: plain data that two runs of
            one folder must share; the package's version is added to it, so that answers of two
            versions never meet in one table.

    Raises:
        StoreError: if the folder holds another experiment, another process writes to it, or the
            disk is full.
    """

    def __init__(self, folder: Path, experiment: str, identity: Any) -> None:
        self.folder = folder
        self.files: dict[Path, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = self._locked()
        try:
            self._claim(
                experiment,
                content_hash({"identity": identity, "version": package_version("effivlm")}),
            )
        except BaseException:
            self.close()
            raise

    def _locked(self) -> int:
        path = self.folder / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = path.read_text().strip() or "unknown"
            os.close(lock)
            raise StoreError(
                f"{self.folder} is in use by process {owner}: wait for it, or choose another name"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        return lock

    def _claim(self, experiment: str, stamp: str) -> None:
        marker = self.folder / "identity"
        if marker.exists() and marker.read_text().strip() == stamp:
            return
        if marker.exists() and self._holds_lines():
            why = "its experiment.yaml differs, or another version of effivlm wrote it"
            raise StoreError(
                f"{self.folder} holds another experiment ({why}): "
                "choose another name, or delete the folder"
            )
        if self._holds_lines():
            raise StoreError(
                f"{self.folder} holds records but not the file 'identity' that says of what: "
                "choose another name, or delete the folder"
            )
        marker.unlink(
            missing_ok=True
        )  # of an experiment that never got as far as a first line: nothing is lost
        _replace(self.folder / "experiment.yaml", experiment)
        _replace(marker, stamp + "\n")  # last: a folder with a marker is complete

    def _holds_lines(self) -> bool:
        return any(
            path.stat().st_size
            for part in ("records", "timings")
            for path in (self.folder / part).rglob("*.jsonl")
        )

    def close(self) -> None:
        """Flush everything and release the folder, also where flushing fails."""
        files, self.files = self.files, {}
        try:
            for handle in files.values():
                os.fsync(handle)
        finally:
            for handle in files.values():
                os.close(handle)
            os.close(self.lock)  # releases the lock; a killed process releases it too

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def path(self, model: str, setting_hash: str, task: str) -> Path:
        """Where a setting's answers to a task are."""
        return self.folder / "records" / model / setting_hash / f"{task}.jsonl"

    def timings(self, workload: str) -> Path:
        """Where a workload's timed samples are."""
        return self.folder / "timings" / f"{workload}.jsonl"

    def done(self, path: Path, retry_failed: bool = False) -> dict[str, bool]:
        """Documents of a file that need not be answered again -> whether they failed.

        Failures count as done, for they are recorded, unless they are to be tried again.
        """
        return {r.document: r.failed for r in read_records(path) if not (r.failed and retry_failed)}

    def note_environment(self, facts: dict[str, Any]) -> None:
        """Write ``environment.json``; a different environment of an earlier session is kept under
        ``earlier``.
        """
        path = self.folder / "environment.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        earlier = before.pop("earlier", [])
        if before and {**before, "date": None} != {**json.loads(json.dumps(facts)), "date": None}:
            earlier = [*earlier, before]
        _replace(
            path, json.dumps(facts | ({"earlier": earlier} if earlier else {}), indent=1) + "\n"
        )

    def append(self, path: Path, record: DocumentRecord | TimingRecord) -> None:
        """Add one finished line.

        Raises:
            StoreError: if the disk is full; what was finished before is intact.
        """
        handle = self.files.get(path)
        if handle is None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                cut_torn_line(path)
                handle = self.files[path] = os.open(
                    path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
                )
            except OSError as error:
                raise _explained(error, path) from error
        # a lone surrogate (from a file name, say) becomes its own JSON escape, and so reads back
        # unchanged
        line = (json.dumps(asdict(record), ensure_ascii=False) + "\n").encode(
            errors="backslashreplace"
        )
        end = os.fstat(handle).st_size
        try:
            written = os.write(handle, line)
        except OSError as error:
            os.ftruncate(handle, end)
            raise _explained(error, path) from error
        if written != len(line):
            os.ftruncate(handle, end)
            raise _explained(OSError(errno.ENOSPC, ""), path)


def _explained(error: OSError, path: Path) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return StoreError(
        f"no space left on the disk of {path}: every finished line is intact; free space and run"
        " the same command again"
    )


def _replace(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_text(text)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise _explained(error, path) from error


def cut_torn_line(path: Path) -> None:
    """Remove a last line that was not finished when its writer was killed."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as handle:
            handle.truncate(data.rfind(b"\n") + 1)
