"""Official benchmarks: lmms-eval is the authority on tasks and scores, the sharing pass answers.

Prompts, media, generation arguments, filters, scoring (`lmms_scoring`) and aggregation are
lmms-eval's own; nothing of its models, caches or command line is used. These two are the only files
that import lmms_eval.
"""

import atexit
import base64
import contextlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import tenacity  # pyright: ignore[reportMissingImports]
from huggingface_hub import constants
from lmms_eval import tasks as catalogue  # pyright: ignore[reportMissingImports]
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask  # pyright: ignore[reportMissingImports]
from lmms_eval.evaluator import _enable_reentrant_filelocks  # pyright: ignore[reportMissingImports]
from lmms_eval.utils import load_yaml_config  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]
from PIL import Image

from effivlm.config import JudgeSpec
from effivlm.tasks.base import Document, MediaError, Question, Task, TaskError
from effivlm.tasks.judge import Endpoint, listening, read_key
from effivlm.tasks.lmms_scoring import OfficialScorer, said
from effivlm.tasks.loading import Official

JUDGE = listening()  # an address that tasks are told when they are imported; served while scoring
REPLIES = Path(mkdtemp(prefix="effivlm-judge-"))  # of judges without a cache, for this process
atexit.register(JUDGE.close)
atexit.register(rmtree, REPLIES, ignore_errors=True)
PROMPT = "effivlm"  # no task has a prompt for this name, so each takes its default one
LIMIT = 128  # new tokens where a task names none; lmms-eval leaves it to its model classes
_TASK = re.compile(r"^task\s*:\s*[\"']?([\w.-]+)[\"']?\s*$", re.MULTILINE)


def load(facts: Official, data: Path | None, judge: JudgeSpec | None = None) -> Task:
    """An official task.

    Args:
        facts: what is known of it.
        data: folder with rows of the official schema; None means the hub or its cache.
        judge: asked while answers are scored.

    Raises:
        TaskError: if the task is unknown or of a kind that greedy answers cannot serve, or if its
            data is missing or has other columns. JudgeError: if the judge's key is missing.
    """
    endpoint = _endpoint(judge)
    os.environ.setdefault("HF_HOME", constants.HF_HOME)  # some tasks cannot be imported without
    os.environ |= {
        "API_TYPE": "openai",
        "OPENAI_API_KEY": "none",
        "OPENAI_API_URL": f"http://127.0.0.1:{JUDGE.getsockname()[1]}/v1/chat/completions",
    }
    config = _config(facts.task)
    _greedy(facts.task, config)
    task = _built(facts, deepcopy(config), data)  # which adds an `until` that nobody stated
    split = task.config.test_split or task.config.validation_split
    rows = Rows(facts.task, task, split, _clusters(task.dataset_no_image[split], facts))
    generation = config.get("generation_kwargs") or {}
    until = generation.get("until") or ()
    cache = (judge and judge.cache) or REPLIES / "replies.sqlite"
    return Task(
        facts.task,
        f"lmms-eval {version('lmms_eval')}, default prompt",
        rows,
        OfficialScorer(facts, task, split, JUDGE, endpoint, cache),
        int(generation.get("max_new_tokens") or LIMIT),
        (until,) if isinstance(until, str) else tuple(until),
        clusters=rows.clusters,
    )


@cache
def _files() -> Mapping[str, Path]:
    """Task name -> its YAML; reading names from the text spares the index of 2,000 parsed files."""
    home = Path(str(catalogue.__file__)).parent
    found = ((m, p) for p in home.rglob("*.yaml") for m in _TASK.findall(p.read_text()))
    return dict(found)


def _config(name: str) -> dict[str, Any]:
    if name not in _files():
        raise TaskError(
            f"lmms-eval {version('lmms_eval')} has no single task {name!r}: `lmms-eval tasks list`"
            " names all; of a group, name the tasks"
        )
    config = load_yaml_config(str(_files()[name]), mode="full")
    return {k: v for k, v in config.items() if k not in ("tag", "group")}


def _greedy(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what answers of greedy decoding to single questions cannot be scored for."""
    kind = config.get("output_type", "generate_until")
    given = config.get("generation_kwargs") or {}
    sampled = given.get("do_sample", bool(given.get("temperature")))
    problem = {
        "generate_until": "",
        "generate_until_multi_round": "asks in several rounds",
        "generate_until_agentic": "lets the model use tools",
    }.get(kind, f"is scored by likelihoods ({kind})")
    if sampled:
        problem = f"samples its answers ({given})"
    elif (given.get("num_beams") or 1) > 1 or (config.get("repeats") or 1) > 1:
        problem = "needs beams or repeated answers"
    if problem:
        raise TaskError(
            f"{name} {problem}: only single questions with greedy answers are run here; leave it"
            " out"
        )


def _built(facts: Official, config: dict[str, Any], data: Path | None) -> ConfigurableMessagesTask:
    if data is not None:
        config.pop("process_docs" if facts.joins else "", None)
        if not data.is_dir():
            raise TaskError(f"{facts.task}: data: {data} is no folder")
        config |= {"dataset_path": str(data), "dataset_name": None, "dataset_kwargs": {}}
    else:  # a token is sent if there is one; lmms-eval demands one also for public sets
        kwargs = config.get("dataset_kwargs") or {}
        config["dataset_kwargs"] = {k: v for k, v in kwargs.items() if k != "token"}
    logger.disable("lmms_eval")
    _enable_reentrant_filelocks()
    for patient in (ConfigurableTask.download, ConfigurableTask.process_results):
        patient.retry.wait = tenacity.wait_none()  # type: ignore[attr-defined]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            task = ConfigurableMessagesTask(config=config, model_name=PROMPT)
    except Exception as error:
        where = data or facts.data or config.get("dataset_path")
        raise TaskError(
            f"{facts.task}: the data set {where} cannot be opened ({said(error)}): `effivlm data"
            f" check {facts.task}` says what is missing; data: FOLDER names a local copy"
        ) from error
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(1234)
    return task


def _endpoint(judge: JudgeSpec | None) -> Endpoint | None:
    if judge is None:
        return None
    return Endpoint(judge.url, judge.model, read_key(judge.key_env, judge.key_file), judge.timeout)


def _clusters(rows: Any, facts: Official) -> list[str]:
    if not facts.cluster:
        return []
    if facts.cluster not in rows.column_names:
        raise _schema(facts.task, f"no column {facts.cluster!r}", rows)
    return list(map(str, rows[facts.cluster]))


def _schema(name: str, problem: str, rows: Any) -> TaskError:
    return TaskError(
        f"{name}: its rows have {problem}; they have {', '.join(rows.column_names)}: the data is"
        " not of the official schema"
    )


# --------------------------------------------------------------------------------- what is asked
class Rows(Sequence[Document]):
    """A split of an official data set; rows are read when indexed, media when opened."""

    def __init__(self, name: str, task: Any, split: str, clusters: list[str]) -> None:
        self.task, self.split, self.clusters = task, split, clusters
        self.plain = task.dataset_no_image[split]  # the rows without their pictures
        if not len(self.plain):
            raise TaskError(f"{name}: its split {split} has no rows")
        try:
            self[0].open()
        except KeyError as error:
            raise _schema(name, f"no column {error}", task.dataset[split]) from None
        except MediaError:
            pass  # of this document alone; it is recorded when it is asked

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        row, stated = self.plain[number], self.task.config.doc_to_target
        target = self.task.doc_to_target(row)
        if target == stated and stated not in row:  # the name of a column that there is not
            target = row.get("answers") or ""
        answers = target if isinstance(target, list | tuple) else [target]
        return Document(
            str(number),
            tuple(map(str, answers)),
            partial(self._open, number),
            self.clusters[number] if self.clusters else "",
        )

    def _open(self, number: int) -> Question:
        messages, images, videos = [], [], []
        try:
            turns = self.task.doc_to_messages(self.task.dataset[self.split][number])
        except (OSError, SystemExit) as error:  # some tasks leave the process over a missing file
            raise MediaError(f"{self.task.config.task} {number}: {error}") from error
        for turn in turns:
            content: list[dict[str, str]] = []
            for part in turn["content"]:
                kind = part["type"]
                if kind == "text":
                    content.append({"type": "text", "text": part["text"]})
                    continue
                if kind not in ("image", "video"):
                    raise MediaError(f"{self.task.config.task} {number} has {kind}, not a picture")
                content.append({"type": kind})
                if kind == "image":
                    images.append(_image(part["url"]))
                else:
                    videos.append(_video(part["url"]))
            messages.append({"role": turn["role"], "content": content})
        return Question(tuple(messages), tuple(images), tuple(videos))


def _image(given: Any) -> Image.Image:
    """RGB of a picture, a path or a data URL."""
    try:
        if isinstance(given, str) and given.startswith("data:"):
            given = io.BytesIO(base64.b64decode(given.partition(",")[2]))
        return (given if isinstance(given, Image.Image) else Image.open(given)).convert("RGB")
    except Exception as error:
        raise MediaError(f"cannot read image {str(given)[:80]}: {error}") from error


def _video(given: Any) -> str:
    if not isinstance(given, str) or not Path(given).is_file():
        raise MediaError(f"cannot find video {str(given)[:200]}")
    return given
