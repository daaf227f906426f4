"""Finds tasks and suites by name: built-in ones, folders in their format, official benchmarks."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from effivlm import registry
from effivlm.config import JudgeSpec
from effivlm.scores import Direction
from effivlm.tasks import builtin
from effivlm.tasks.base import Form, Task, TaskError

SUITES = Path(__file__).parent / "suites"
ANY = "lmms:"  # any other task of lmms-eval, whose first metric is then the headline
OFFICIAL = Path(__file__).parent / "official.yaml"


@dataclass(frozen=True)
class Official:
    """An official benchmark as lmms-eval has it.

    Attributes:
        task: its name there. benchmark: as papers print it. data: hub id. split: that is asked.
        metric: the headline, by its name in lmms-eval. scale: value of a perfect score. direction:
            ``higher`` or ``lower``. judge: whether another model scores it. licence, rows: of the
            data set, where known. form: see `tasks.base.Scorer`. cluster: column of the rows that
            belong together. config: of the data set. media: ``image`` or ``video``. broken: why
            lmms-eval cannot score it; such a task is refused. joins: its pictures are a second data
            set of the hub; rows of a local folder have them in a column ``image``. alone: whether
            the aggregate of one document may be its score, where no other is stated.
    """

    task: str
    benchmark: str
    data: str
    split: str
    metric: str
    scale: float = 1.0
    direction: Direction = "higher"
    judge: bool = False
    licence: str = ""
    rows: int | None = None
    form: Form = "free"
    cluster: str = ""
    config: str = ""
    media: str = "image"
    broken: str = ""
    joins: bool = False
    alone: bool = True


@dataclass(frozen=True)
class Suite:
    """Tasks that are run together.

    Attributes:
        name: of its file. paper: where it comes from, or empty. tasks: by name. groups: dimension
            of the paper -> tasks.
    """

    name: str
    tasks: tuple[str, ...]
    paper: str = ""
    groups: dict[str, list[str]] = field(default_factory=dict)


@cache
def official_tasks() -> dict[str, Official]:
    """Official benchmarks by lmms-eval's name."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load(OFFICIAL.read_text())
    return {name: Official(name, **row) for name, row in rows.items()}


def suite_names() -> list[str]:
    """Suites."""
    return sorted(p.stem for p in SUITES.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """A suite; a task's own name is a suite of one."""
    if name not in suite_names():  # a path is none, wherever it leads
        return Suite(name, (name,))
    spec = yaml.safe_load((SUITES / f"{name}.yaml").read_text())
    tasks = tuple(builtin.task_names()) if spec["tasks"] == "builtin" else tuple(spec["tasks"])
    return Suite(name, tasks, spec.get("paper", ""), spec.get("groups", {}))


def load_tasks(name: str, data: Path | None = None, judge: JudgeSpec | None = None) -> list[Task]:
    """The tasks of a suite, or one task.

    Args:
        name: of a suite or a task, or a folder with ``task.yaml``.
        data: folder that holds an official task's rows; for a suite, with one folder per task.
        judge: for tasks that need one.

    Raises:
        UnknownName: with near names. TaskError, ImportError: before anything runs.
    """
    suite = load_suite(name)
    several = len(suite.tasks) > 1
    return [load_task(t, data / t if data and several else data, judge) for t in suite.tasks]


def load_task(name: str, data: Path | None = None, judge: JudgeSpec | None = None) -> Task:
    """A built-in task by name, a folder, an official benchmark, or ``lmms:NAME``.

    Raises:
        UnknownName: with near names. TaskError: if the files are not in the format, or lmms-eval
            cannot score the task. ImportError: without the packages that official tasks need.
    """
    official = official_tasks()
    if name in official:
        return _official(official[name], data, judge)
    if name.startswith(ANY):
        task = name.removeprefix(ANY)
        return _official(Official(task, task, "", "", ""), data, judge)
    if data is not None:
        raise TaskError(
            f"data: {data} was given for {name}, which is no official benchmark: its folder names"
            " its rows"
        )
    if builtin.is_there(Path(name) / "task.yaml") or builtin.is_there(Path(name)) or "/" in name:
        return builtin.read_task(Path(name))
    known = [*builtin.task_names(), *suite_names(), *official]
    registry.lookup("task or suite", name, dict.fromkeys(known))
    return builtin.read_task(builtin.HOME / name)


def _official(facts: Official, data: Path | None, judge: JudgeSpec | None) -> Task:
    if facts.broken:
        raise TaskError(f"{facts.task}: {facts.broken}; leave it out")
    if facts.judge and judge is None:
        raise TaskError(
            f"{facts.task} is scored by a judge: name one in the experiment (judge: {{url: ...,"
            " model: ..., key_env: ...}), or leave it out"
        )
    try:
        from effivlm.tasks import lmms
    except ImportError as error:
        raise ImportError(
            f"{facts.task} is scored by lmms-eval, which is not here ({error}): `make benchmarks`,"
            " or the two commands of docs/benchmarks.md"
        ) from None
    return lmms.load(facts, data, judge)
