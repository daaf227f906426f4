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
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from effivlm.files.names import file_name
from effivlm.files.reading import read_bytes, read_json
from effivlm.files.writing import explained, make_folder, write_whole
from effivlm.provenance import package_version
from effivlm.records import DocumentRecord, StoreError, TimingRecord, content_hash, read_records

log = logging.getLogger("effivlm")
INTACT = "every finished line is intact; free space and run the same command again"


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
        make_folder(folder, StoreError)
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
        with explained(path, StoreError, "choose another name, or another folder with --root"):
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = path.read_text(errors="replace").strip()[:20] or "unknown"
            os.close(lock)
            raise StoreError(
                f"{self.folder} is in use by process {owner}: wait for it, or choose another name"
            ) from None
        try:
            with explained(path, StoreError, INTACT):
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
        except StoreError:
            os.close(lock)
            raise
        return lock

    def _claim(self, experiment: str, stamp: str) -> None:
        marker = self.folder / "identity"
        if marker.exists() and _read(marker).strip() == stamp:
            self._restore(experiment)
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
        # of an experiment that never got as far as a first line: nothing is lost
        with explained(marker, StoreError, INTACT):
            marker.unlink(missing_ok=True)
        write_whole(self.folder / "experiment.yaml", experiment, StoreError, INTACT)
        # last: a folder with a marker is complete
        write_whole(marker, stamp + "\n", StoreError, INTACT)

    def _restore(self, experiment: str) -> None:
        """The experiment's file, which the report reads, where it was lost or damaged."""
        path = self.folder / "experiment.yaml"
        if not path.exists() or _read(path) != experiment:
            write_whole(path, experiment, StoreError, INTACT)

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
        folder = self.folder / "records" / file_name(model) / setting_hash
        return folder / f"{file_name(task)}.jsonl"

    def timings(self, workload: str) -> Path:
        """Where a workload's timed samples are."""
        return self.folder / "timings" / f"{file_name(workload)}.jsonl"

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
        before, earlier = self._environment(path)
        if before and {**before, "date": None} != {**json.loads(json.dumps(facts)), "date": None}:
            earlier = [*earlier, before]
        whole = facts | ({"earlier": earlier} if earlier else {})
        write_whole(path, json.dumps(whole, indent=1) + "\n", StoreError, INTACT)

    @staticmethod
    def _environment(path: Path) -> tuple[dict[str, Any], list[Any]]:
        """What was noted before, and what before that; a damaged note is set aside, for no answer
        depends on it.
        """
        if not path.exists():
            return {}, []
        try:
            before = read_json(path, "the note that `effivlm run` wrote", StoreError)
            if isinstance(before, dict) and isinstance(before.get("earlier", []), list):
                return {k: v for k, v in before.items() if k != "earlier"}, before.get(
                    "earlier", []
                )
            why = f"{path} is no such note"
        except StoreError as error:
            why = str(error)
        log.warning("%s: kept as environment.json.damaged", why)
        with explained(path, StoreError, INTACT):
            path.replace(path.with_name("environment.json.damaged"))
        return {}, []

    def append(self, path: Path, record: DocumentRecord | TimingRecord) -> None:
        """Add one finished line.

        Raises:
            StoreError: if the disk is full; what was finished before is intact.
        """
        handle = self.files.get(path)
        if handle is None:
            with explained(path, StoreError, INTACT):
                path.parent.mkdir(parents=True, exist_ok=True)
                cut_torn_line(path)
                handle = self.files[path] = os.open(
                    path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
                )
        # a lone surrogate (from a file name, say) becomes its own JSON escape, and so reads back
        # unchanged
        line = (json.dumps(asdict(record), ensure_ascii=False) + "\n").encode(
            errors="backslashreplace"
        )
        end = os.fstat(handle).st_size
        with explained(path, StoreError, INTACT):
            try:
                if os.write(handle, line) != len(line):
                    raise OSError(errno.ENOSPC, "")
            except OSError:
                os.ftruncate(handle, end)
                raise


def _read(path: Path) -> str:
    return read_bytes(path, "a file that `effivlm run` wrote", StoreError).decode(errors="replace")


def cut_torn_line(path: Path) -> None:
    """Remove a last line that was not finished when its writer was killed."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as handle:
            handle.truncate(data.rfind(b"\n") + 1)
