"""A judge: asked once, its failures counted, its key nowhere."""

import json
import urllib.request

import pytest
from judge_server import KEY, judge_server

from effivlm.tasks import judge as judge_module
from effivlm.tasks.judge import Endpoint, Judge, JudgeError, listening, read_key, serve

BODY = {"model": "gpt-4", "messages": [{"role": "user", "content": "good?"}]}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(judge_module, "PAUSE", 0.0)


def test_equal_requests_are_asked_once_with_the_model_that_was_named(tmp_path):
    with judge_server() as (url, seen):
        for _ in range(2):  # a second process of the same run
            judge = Judge(Endpoint(url, "mine", KEY), tmp_path / "replies.sqlite")
            for _ in range(2):
                status, reply = judge.ask(BODY)
                assert (
                    status == 200 and json.loads(reply)["choices"][0]["message"]["content"] == "1"
                )
            assert judge.calls == 2 and not judge.void
        assert [b["model"] for b in seen] == ["mine"]
        judge.ask({**BODY, "temperature": 1})
        assert len(seen) == 2
    assert (
        KEY not in str(judge.endpoint)
        and KEY.encode() not in (tmp_path / "replies.sqlite").read_bytes()
    )


@pytest.mark.parametrize(
    ("mode", "calls", "why"),
    [
        ("malformed", 3, "a reply that is no chat completion"),
        ("500", 3, "HTTP 500"),
        ("wrong key", 1, "HTTP 401"),
        ("refused", 3, "the judge refused to answer"),
        ("cut off", 3, "a reply that was cut off"),
        ("torn", 3, "IncompleteRead"),
        ("slow", 3, "TimeoutError"),
    ],
)
def test_failures_void_and_are_not_asked_for_ever(mode, calls, why):
    with judge_server(mode) as (url, seen):
        judge = Judge(Endpoint(url, "mine", KEY, timeout=0.2 if mode == "slow" else 10))
        for _ in range(2):
            status, reply = judge.ask(BODY)
            assert status == 502 and KEY not in reply.decode()
        assert len(seen) == calls
        assert judge.void.startswith("2 calls of the judge failed") and why in judge.void
        assert KEY not in judge.void


def test_one_failure_is_tried_again():
    with judge_server("500 once") as (url, seen):
        judge = Judge(Endpoint(url, "mine", KEY))
        assert judge.ask(BODY)[0] == 200 and not judge.void and len(seen) == 2


def test_nobody_there_and_nobody_named():
    judge = Judge(Endpoint("http://127.0.0.1:9/v1", "mine"))
    assert judge.ask(BODY)[0] == 502 and "refused" in judge.void
    judge = Judge(None)
    assert judge.ask(BODY)[0] == 502 and "the experiment names none" in judge.void


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions/chat/completions"])
def test_both_spellings_of_the_address_arrive(path):
    with judge_server() as (url, seen):
        where = listening()
        serve(where, Judge(Endpoint(url, "mine", KEY)))
        address = f"http://127.0.0.1:{where.getsockname()[1]}{path}"
        with urllib.request.urlopen(
            urllib.request.Request(address, json.dumps(BODY).encode())
        ) as reply:
            assert json.loads(reply.read())["choices"] and len(seen) == 1


def test_keys_come_from_the_environment_or_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    (tmp_path / "key").write_text(KEY)
    assert read_key("JUDGE_KEY") == read_key(file=tmp_path / "key") == KEY and read_key() == ""
    with pytest.raises(JudgeError, match=r"\$NO_KEY, which is not set"):
        read_key("NO_KEY")
    with pytest.raises(JudgeError, match="No such file"):
        read_key(file=tmp_path / "none")
