"""The store: nothing finished is lost, repeated or mixed, whatever happens to the writer."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from record_samples import document, timing

from effivlm import store as store_module
from effivlm.provenance import commit_of, environment
from effivlm.records import (
    DocumentRecord,
    StoreError,
    content_hash,
    read_records,
    read_run,
    read_timings,
)
from effivlm.store import RunStore

WRITER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from record_samples import document
from effivlm.store import RunStore
with RunStore(Path({folder!r}), "name: x", "identity") as store:
    path = store.path("tiny", "abc", "colour")
    done = store.done(path)
    print("open", len(done), flush=True)
    for number in range({total}):
        if f"d{{number}}" not in done:
            store.append(path, document(number, answer="x" * 3000))
print("finished", flush=True)
"""


def writer(folder, total):
    code = textwrap.dedent(WRITER).format(
        tests=str(Path(__file__).parent), folder=str(folder), total=total
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def opened(folder, identity="identity"):
    return RunStore(folder, "name: x\n", identity)


def test_what_is_written_reads_back_unchanged(tmp_path):
    odd = document(1, answer='quote " newline \n separator \u2028 torn \udc80 è 漢')
    failed = document(2, error={"type": "MediaError", "message": "cannot read"})
    with opened(tmp_path) as store:
        path = store.path("tiny", "abc", "colour")
        for record in (document(0), odd, failed):
            store.append(path, record)
        store.append(store.timings("effivlm-bench"), timing(0))
    assert [replace(r, cost=None) for r in read_records(path)] == [
        replace(r, cost=None) for r in (document(0), odd, failed)
    ]
    assert read_records(path)[0].cost == document(0).cost
    assert read_timings(tmp_path) == [timing(0)]
    assert [r.document for r in read_run(tmp_path)] == ["d0", "d1", "d2"]


def test_killed_in_the_middle_then_resumed(tmp_path):
    """kill -9 at whatever byte the writer is at; the second writer adds exactly what is missing."""
    total, process = 20000, writer(tmp_path, 20000)
    path = tmp_path / "records/tiny/abc/colour.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 300_000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = read_records(path)
    assert 0 < len(before) < total, "the writer finished before it was killed"
    with path.open("ab") as handle:  # the worst moment: half a line reached the disk
        handle.write(b'{"model": "tiny", "setti')
    assert len(read_records(path)) == len(before)
    total = len(before) + 50
    out, _ = (again := writer(tmp_path, total)).communicate(timeout=60)
    assert again.returncode == 0 and out.split() == ["open", str(len(before)), "finished"]
    after = [json.loads(line)["document"] for line in path.read_text().splitlines()]
    assert after == [f"d{i}" for i in range(total)]


def test_two_processes(tmp_path):
    code = textwrap.dedent(WRITER).format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), total=0
    )
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code.replace(
                'print("open"', 'print("open", flush=True); sys.stdin.read(); print("open"'
            ),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(
        StoreError, match=f"in use by process {holder.pid}: wait for it, or choose another name"
    ):
        opened(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)  # a stale lock vanishes with its process
    holder.communicate()
    opened(tmp_path).close()


def test_lock_is_released_when_opening_fails(tmp_path):
    with opened(tmp_path, "one") as store:
        store.append(store.path("tiny", "abc", "colour"), document(0))
    for _ in range(2):  # the second refusal must be the same one, not "in use"
        with pytest.raises(
            StoreError,
            match=r"holds another experiment .*choose another name, or delete the folder",
        ):
            opened(tmp_path, "two")
    opened(tmp_path, "one").close()
    assert (tmp_path / "experiment.yaml").read_text() == "name: x\n"


def test_an_experiment_that_answered_nothing_makes_room_for_the_mended_one(tmp_path):
    """A misspelt model is found once the folder is claimed: mending it must not need another name."""
    opened(tmp_path, "misspelt").close()
    with opened(tmp_path, "mended") as store:
        store.append(store.path("tiny", "abc", "colour"), document(0))
    with pytest.raises(StoreError, match="holds another experiment"):
        opened(tmp_path, "misspelt")
    assert len(read_run(tmp_path)) == 1


def test_another_version_of_the_package_is_another_experiment(tmp_path, monkeypatch):
    with opened(tmp_path) as store:
        store.append(store.path("tiny", "abc", "colour"), document(0))
    monkeypatch.setattr(store_module, "package_version", lambda name: "999")
    with pytest.raises(StoreError, match="another version of effivlm wrote it"):
        opened(tmp_path)


def test_records_without_identity_are_refused(tmp_path):
    with opened(tmp_path) as store:
        store.append(store.path("tiny", "abc", "colour"), document(0))
    (tmp_path / "identity").unlink()
    with pytest.raises(StoreError, match="holds records but not the file 'identity'"):
        opened(tmp_path)


@pytest.mark.parametrize("written", [0, 10])
@pytest.mark.parametrize("says", [True, False], ids=["error", "short count"])
def test_disk_full(tmp_path, monkeypatch, written, says):
    real = os.write

    def full(handle, data):
        count = real(
            handle, data[:written]
        )  # network file systems may write a part and still say that they failed
        if says:
            raise OSError(errno.ENOSPC, "No space left on device")
        return count

    with opened(tmp_path) as store:
        path = store.path("tiny", "abc", "colour")
        store.append(path, document(0))
        monkeypatch.setattr(store_module.os, "write", full)
        with pytest.raises(
            StoreError,
            match=r"no space left on the disk of .*colour.jsonl: every finished line is intact; free space",
        ):
            store.append(path, document(1))
        monkeypatch.undo()
        assert path.read_bytes().endswith(b"}\n") and len(read_records(path)) == 1
        store.append(path, document(1))
    assert [r.document for r in read_records(path)] == ["d0", "d1"]


def test_other_write_errors_keep_their_name_and_the_file_whole(tmp_path, monkeypatch):
    def broken(handle, data):
        raise OSError(errno.EIO, "Input/output error")

    with opened(tmp_path) as store:
        path = store.path("tiny", "abc", "colour")
        store.append(path, document(0))
        monkeypatch.setattr(store_module.os, "write", broken)
        with pytest.raises(StoreError, match=r"cannot write .*Input/output error"):
            store.append(path, document(1))
    assert len(read_records(path)) == 1


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a file system needs root"
)
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("no permission to mount")
    try:
        with opened(disk / "run") as store:
            path, number = store.path("tiny", "abc", "colour"), 0
            with pytest.raises(StoreError, match="no space left on the disk"):
                while True:
                    store.append(path, document(number, answer="x" * 2000))
                    number += 1
            assert 5 < number < 40 and len(read_records(path)) == number
            with pytest.raises(StoreError, match="no space left on the disk"):
                store.note_environment({"device": "x" * 60_000})
            assert not (disk / "run/environment.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json", "Expecting value"),
        ("{", "Expecting"),
        ("[1]", "expected an object"),
        ('{"model": "tiny"}', "setting: Field required"),
        (json.dumps({**vars(document(7)), "extra": 1}), "extra"),
        (json.dumps({**vars(document(7)), "score": "x"}), "score: Input should be a valid number"),
        (json.dumps({**vars(document(7)), "answer": None}), "either an answer or an error"),
    ],
)
def test_bad_lines_are_errors_that_name_file_and_line(tmp_path, line, why):
    with opened(tmp_path) as store:
        path = store.path("tiny", "abc", "colour")
        store.append(path, document(0))
    with path.open("a") as handle:
        handle.write(line + "\n")
    with pytest.raises(StoreError, match=r"colour.jsonl, line 2 is not a record .*" + why):
        read_records(path)


def test_a_repeated_answer_is_an_error_but_a_failure_may_be_tried_again(tmp_path):
    with opened(tmp_path) as store:
        path = store.path("tiny", "abc", "colour")
        store.append(path, document(0))
        store.append(path, document(1, error={"type": "MediaError", "message": "cannot read"}))
        assert store.done(path) == {"d0": False, "d1": True}
        assert store.done(path, retry_failed=True) == {"d0": False}
        store.append(path, document(1, answer="blue"))
        assert store.done(path) == {"d0": False, "d1": False}
        assert [r.answer for r in read_records(path)] == ["red", "blue"]
        store.append(path, document(1, answer="green"))
    with pytest.raises(StoreError, match=r"line 4 answers document 'd1' again"):
        read_records(path)


def test_two_versions_of_one_setting_are_never_mixed(tmp_path):
    with opened(tmp_path) as store:
        store.append(store.path("tiny", "abc", "colour"), document(0))
        store.append(store.path("tiny", "def", "colour"), document(1))
    with pytest.raises(
        StoreError, match=r"abc.colour.jsonl and .*def.colour.jsonl both hold colour under none"
    ):
        read_run(tmp_path)


def test_records_refuse_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="expected a finite number"):
        document(0, score=float("nan"))
    with pytest.raises(ValueError, match="either an answer or an error"):
        replace(document(0), error={"type": "X", "message": "y"})
    with pytest.raises(ValueError, match="ttft took -1 s"):
        replace(timing(0), seconds={"ttft": -1})
    with pytest.raises(StoreError, match="holds no records: expected the folder of a run"):
        read_run(tmp_path)
    assert read_timings(tmp_path) == []


def test_environment(tmp_path):
    facts = environment("cpu", "pil")
    assert {"commit", "dirty", "versions", "python", "device", "image_backend", "date"} <= set(
        facts
    )
    with opened(tmp_path) as store:
        store.note_environment(facts)
        store.note_environment({**facts, "date": "later"})
        assert "earlier" not in json.loads((tmp_path / "environment.json").read_text())
        store.note_environment({**facts, "device": "cuda"})
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["device"] == "cuda" and [e["device"] for e in found["earlier"]] == ["cpu"]


def test_commit_is_not_that_of_a_repository_around_a_virtual_environment(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    installed, own = tmp_path / "installed.py", tmp_path / "own.py"
    installed.write_text("")
    own.write_text("")
    for command in (["init", "-q"], ["add", "own.py"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    assert commit_of(installed) == (None, None)
    commit, dirty = commit_of(own)
    assert len(commit or "") == 40 and dirty is False


def test_content_hash_depends_on_content_alone():
    assert content_hash({"a": 1, "b": [2, 3]}) == content_hash({"b": (2, 3), "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert DocumentRecord.__dataclass_params__.frozen
