"""A local OpenAI-compatible server that judges as told."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-4711"


def completion(text, **more):
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
        **more,
    }
    return json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
    ).encode()


@contextlib.contextmanager
def judge_server(mode="right", say=lambda text: "1"):
    """Yields its URL up to /v1 and the list of bodies it was sent."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            status, reply = 200, completion(say(json.dumps(body["messages"])))
            if mode == "wrong key" or self.headers.get("Authorization") != f"Bearer {KEY}":
                status, reply = 401, json.dumps({"error": f"no such key {KEY}"}).encode()
            elif mode == "500" or (mode == "500 once" and len(seen) == 1):
                status, reply = 500, b"{}"
            elif mode == "malformed":
                reply = b'{"choices": [{"mess'
            elif mode == "refused":
                reply = completion("", finish_reason="content_filter")
            elif mode == "cut off":
                reply = completion("The answ", finish_reason="length")
            elif mode == "slow":
                time.sleep(1)
            with contextlib.suppress(OSError):  # a client that gave up
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply) + (9 if mode == "torn" else 0)))
                self.end_headers()
                self.wfile.write(reply)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
