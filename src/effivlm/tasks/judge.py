"""A judge: any OpenAI-compatible endpoint, behind a local address that every task can use.

lmms-eval's tasks spell the endpoint's address in two ways, name models of their own, and turn calls
that failed into scores. Here both spellings arrive at the same place; the model is the one that the
experiment names; equal requests are asked once, whatever the setting; and failures are counted, for
a number that needed them is none.
"""

import hashlib
import json
import os
import socket
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from effivlm.errors import EffivlmError

TRIES, PAUSE = 3, 0.5  # calls of one request; seconds before the second, doubled for the next


class JudgeError(EffivlmError, ValueError):
    """A judge that cannot be asked; the message never holds the key."""


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is.

    Attributes:
        url: base, such as ``http://127.0.0.1:8000/v1``. model: its name there. key: of the
            service, or empty. timeout: seconds for one call.
    """

    url: str
    model: str
    key: str = ""
    timeout: float = 60.0

    def __repr__(self) -> str:
        """Without the key."""
        return f"Endpoint({self.url}, {self.model})"


def read_key(variable: str = "", file: Path | None = None) -> str:
    """The key out of an environment variable or a file; empty where neither is named.

    Raises:
        JudgeError: if it is not there.
    """
    if variable:
        if not (key := os.environ.get(variable, "")):
            raise JudgeError(f"the judge's key is to be in ${variable}, which is not set")
        return key.strip()
    if file is None:
        return ""
    try:
        return file.read_text().strip()
    except OSError as error:
        raise JudgeError(f"the judge's key is to be in {file}: {error.strerror}") from None


class Judge:
    """Asks an endpoint; equal requests once.

    Args:
        endpoint: None answers every request with a failure.
        cache: SQLite file of replies, shared by settings and runs; None remembers nothing.

    Attributes:
        calls, failed: requests that were answered, and that were not. why: of the last failure.
    """

    def __init__(self, endpoint: Endpoint | None, cache: Path | None = None) -> None:
        self.endpoint, self.lock = endpoint, threading.Lock()
        self.calls = self.failed = 0
        self.why = ""
        self.replies = sqlite3.connect(cache or ":memory:", check_same_thread=False, timeout=60)
        self.replies.execute("create table if not exists replies (request text primary key, reply)")

    def ask(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """HTTP status and reply to one request; after a failure nothing more is asked."""
        if self.endpoint is None:
            return self._fails("the task asks a judge, and the experiment names none")
        if self.failed:
            return self._fails(self.why)
        asked = {**body, "model": self.endpoint.model}
        name = json.dumps([self.endpoint.url, asked], sort_keys=True)
        key = hashlib.sha256(name.encode()).hexdigest()
        with self.lock:
            found = self.replies.execute(
                "select reply from replies where request = ?", (key,)
            ).fetchone()
            self.calls += 1
        if found:
            return 200, found[0]
        why = ""
        for number in range(TRIES):
            threading.Event().wait(PAUSE * 2 ** (number - 1) if number else 0)
            reply, why = self._called(self.endpoint, asked)
            if not why:
                with self.lock, self.replies:
                    row = (key, reply)
                    self.replies.execute("insert or replace into replies values (?, ?)", row)
                return 200, reply
            if why.startswith("HTTP 4"):
                break  # it would say the same again
        return self._fails(why)

    def _fails(self, why: str) -> tuple[int, bytes]:
        with self.lock:
            self.failed += 1
            self.why = why
        return 502, json.dumps({"error": {"message": why}}).encode()

    def _called(self, endpoint: Endpoint, body: Mapping[str, Any]) -> tuple[bytes, str]:
        """One call: the reply, and what is wrong with it."""
        headers = {"Content-Type": "application/json"}
        if endpoint.key:
            headers["Authorization"] = f"Bearer {endpoint.key}"
        url = endpoint.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=endpoint.timeout) as answer:
                reply = answer.read()
        except urllib.error.HTTPError as error:
            return b"", f"HTTP {error.code} {error.reason}"  # a body might repeat the key
        except Exception as error:
            return b"", type(error).__name__ + (f" ({error})" if isinstance(error, OSError) else "")
        return reply, _wrong(reply)

    @property
    def void(self) -> str:
        """Why numbers that came of its replies are none; empty if they are some."""
        if not self.failed:
            return ""
        return f"{self.failed} calls of the judge failed, the last with: {self.why}"


def _wrong(reply: bytes) -> str:
    """What a reply lacks, or empty."""
    try:
        choice = json.loads(reply)["choices"][0]
        said, end = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "a reply that is no chat completion"
    if choice["message"].get("refusal") or end == "content_filter":
        return "the judge refused to answer"
    if end == "length":
        return "a reply that was cut off"
    return "" if isinstance(said, str) and said.strip() else "an empty reply"


def listening() -> socket.socket:
    """A socket on the loopback whose address tasks are told before anybody serves it."""
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    found.listen(64)
    return found


def serve(where: socket.socket, judge: Judge) -> None:
    """Answer requests to a socket for as long as the process lives."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            status, reply = judge.ask(json.loads(self.rfile.read(length)))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(where.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = where
    threading.Thread(target=server.serve_forever, daemon=True).start()
