"""Official scores of answers that are known already, by lmms-eval's own evaluator.

Each scoring runs in a forked child, for some tasks keep state in their modules and would count a
second setting's answers on top of the first's.
"""

import argparse
import contextlib
import io
import multiprocessing
import random
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import tenacity  # pyright: ignore[reportMissingImports]
import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms as Model  # pyright: ignore[reportMissingImports]
from lmms_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

from effivlm.scores import Answered, Metric
from effivlm.tasks.base import Result, Scorer, TaskError
from effivlm.tasks.judge import Endpoint, Judge, serve
from effivlm.tasks.loading import Official

WRONG = {"yes_no": ("No", "Yes"), "letter": tuple("ABCDE"), "free": ("no answer",)}


class OfficialScorer(Scorer):
    """lmms-eval's numbers over the documents that were answered."""

    def __init__(
        self,
        facts: Official,
        task: Any,
        split: str,
        where: socket.socket,
        endpoint: Endpoint | None,
        cache: Path,
    ) -> None:
        self.facts, self.task, self.split = facts, task, split
        self.where, self.endpoint, self.cache = (
            where,
            endpoint,
            cache,
        )  # what tasks ask, and who answers them
        listed = [m["metric"] for m in task.config.metric_list]
        self.name = facts.metric or listed[0]
        self.parts = self.name.split("+")  # a headline may be the sum of several numbers
        if unknown := set(self.parts) - set(listed):
            raise TaskError(
                f"{facts.task} has no metric {', '.join(sorted(unknown))}: it has"
                f" {', '.join(listed)}"
            )
        self.form = facts.form
        head = Metric(self.name, facts.direction, facts.scale)
        self.metrics = (head, *(Metric(m) for m in listed if m != self.name))

    def score(self, answers: Sequence[Answered]) -> Result:
        """Official numbers, computed in a child process."""
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=self._in_child, args=(there, answers))
        child.start()
        there.close()
        try:
            found = here.recv()
        except EOFError:
            found = "its process ended without a word (out of memory?)"
        finally:
            child.join()
        if isinstance(found, str):
            raise TaskError(
                f"{self.facts.task} could not be scored: {found}. The answers are kept: `effivlm"
                " score` on the run's folder tries again"
            )
        return found

    def _in_child(self, pipe: Any, answers: Sequence[Answered]) -> None:
        torch.set_num_threads(1)  # threads of the parent are not here
        random.seed(0)  # some tasks guess where they cannot read an answer
        np.random.seed(1234)
        quiet = io.StringIO()
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                judge = Judge(self.endpoint, self.cache)
                serve(self.where, judge)
                time.sleep = _at_once  # the judge has its own pauses; tasks wait minutes
                pipe.send(replace(self._scored(answers), void=judge.void))
        except BaseException as error:  # the parent tells the user
            pipe.send(said(error))

    def _scored(self, answers: Sequence[Answered]) -> Result:
        order = sorted(range(len(answers)), key=lambda i: int(answers[i].document))
        rows = [int(answers[i].document) for i in order]
        _only(self.task, self.split, rows)
        plain = self.task.dataset_no_image[self.split]
        with tempfile.TemporaryDirectory() as folder:  # for submissions that tasks write
            self.task.args = argparse.Namespace(
                output_path=folder, process_with_media=False, reasoning_tags=None
            )
            given = [
                answers[i] if answers[i].text is not None else self._wrong(answers[i], plain[k])
                for k, i in enumerate(order)
            ]
            results = _evaluated(self.facts.task, self.task, given)
            samples = {s["doc_id"]: s for s in results["samples"][self.facts.task]}
            each: list[float | None] = [None] * len(answers)
            for k, i in enumerate(order):
                each[i] = 0.0 if answers[i].text is None else self._single(samples[k])
        return Result(each, self._total(results["results"][self.facts.task]))

    def _total(self, numbers: Mapping[str, Any]) -> dict[str, float]:
        """Official numbers by metric; where a metric has several filters, by metric and filter."""
        found = {
            key: float(value)
            for key, value in numbers.items()
            if isinstance(value, int | float) and "stderr" not in key and np.isfinite(value)
        }
        names = [key.partition(",")[0] for key in found]
        total = {
            name if names.count(name) == 1 or key.endswith(",none") else key: value
            for (key, value), name in zip(found.items(), names, strict=True)
        }
        if self.name not in total and set(self.parts) & set(total):
            # of a sample, what it has: every setting is asked the same
            total[self.name] = sum(total.get(part, 0.0) for part in self.parts)
        return total

    def _single(self, values: Mapping[str, Any]) -> float | None:
        """One document's share of a perfect score by the headline metric."""
        name = next((part for part in self.parts if part in values), self.name)
        value = values.get(name)
        if isinstance(value, Mapping) and isinstance(value.get("score"), int | float):
            value = value["score"]
        if not isinstance(value, int | float):
            if not self.facts.alone:
                return None
            join = self.task.aggregation()[name]
            more = {"args": self.task.args} if "args" in signature(join).parameters else {}
            try:
                value = join([value], **more) / self.facts.scale
            except Exception:
                return None  # an aggregate that needs more than that
        number = float(value)
        return number if np.isfinite(number) and 0 <= number <= 1 else None

    def _wrong(self, answer: Answered, row: Mapping[str, Any]) -> Answered:
        """A failed document as one that was answered wrong: an empty answer would leave some
        benchmarks' denominators, or be guessed at.
        """
        texts = [
            t for t in WRONG[self.form] if t.lower() not in {r.lower() for r in answer.references}
        ]
        for text in texts if len(texts) > 1 else ():
            values = self.task.process_results(row, [text])
            if self._single(values) == 0:
                return replace(answer, text=text)
        return replace(answer, text=texts[0])


def _at_once(seconds: float) -> None:
    """Sleeps not at all."""


def _only(task: Any, split: str, rows: list[int]) -> None:
    """Narrow a task to some of its documents; in the child, so nobody else sees it."""
    tables = [task.dataset]
    if task.dataset_no_image is not task.dataset:
        tables.append(task.dataset_no_image)
    for table in tables:
        table[split] = table[split].select(rows)


def _evaluated(name: str, task: Any, answers: Sequence[Answered]) -> dict[str, Any]:
    return evaluate(
        lm=Replay(answers),
        task_dict={name: task},
        bootstrap_iters=0,
        log_samples=True,
        cli_args=task.args,
        distributed_executor_backend="torchrun",
        process_docs_parallel=1,
    )


class Replay(Model):
    """Gives answers that are known already."""

    is_simple = False

    def __init__(self, answers: Sequence[Answered]) -> None:
        super().__init__()
        self.answers, self.device = answers, "cpu"

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """The answer to every request."""
        found = [self.answers[r.doc_id] for r in requests]
        return [GenerationResult(a.text, TokenCounts(output_tokens=a.new_tokens)) for a in found]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Refused when the task is built."""
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Refused when the task is built."""
        raise NotImplementedError

    def clean(self) -> None:
        """Nothing is held."""


def said(error: BaseException) -> str:
    """The cause, out of the wrapper that says only that retries are over."""
    if isinstance(error, tenacity.RetryError):
        cause = error.last_attempt.exception()  # pyright: ignore[reportAttributeAccessIssue]
        return said(cause) if cause else "the retries are over"
    return f"{type(error).__name__}: {str(error)[:300]}"
