"""The whole run on one screen: load, plan, answer every document under every setting, record,
report.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from effivlm.answering import Runner
from effivlm.config import (
    ConfigError,
    Experiment,
    TaskSpec,
    dump_experiment,
)
from effivlm.families.fitness import check_template
from effivlm.prompts import load_model
from effivlm.provenance import environment
from effivlm.store import RunStore
from effivlm.tasks.base import Task
from effivlm.tasks.loading import load_task, load_tasks

Progress = Callable[[str, int, int], None]  # (what, documents done, documents in all)


@dataclass(frozen=True)
class Summary:
    """What a run did: answers recorded now, found from before, and failed (of all)."""

    recorded: int
    found: int
    failed: int


def run(
    experiment: Experiment,
    root: Path = Path("runs"),
    progress: Progress = lambda what, done, total: None,
    retry_failed: bool = False,
) -> Summary:
    """Answer every document of every task under every setting; what a folder already holds is not
    done again, failures only with ``retry_failed``.

    Raises:
        StoreError, LoadError, TaskError, Unsupported: before anything runs, where it can be known.
    """
    if not experiment.tasks:
        raise ConfigError(
            "this experiment has no tasks, so it can be measured but not run: use `effivlm"
            " measure`, or add tasks"
        )
    if unable := [spec.name for spec in experiment.models if spec.random_weights]:
        raise ConfigError(
            f"random weights of {', '.join(unable)} have no tokenizer and answer nothing: use"
            " `effivlm measure`"
        )
    tasks = experiment_tasks(experiment)
    counts = {"recorded": 0, "found": 0, "failed": 0}
    with RunStore(
        root / experiment.name,
        dump_experiment(experiment),
        experiment.model_dump(mode="json", exclude={"keep"}),
    ) as store:
        for spec in experiment.models:
            loaded = load_model(spec)
            check_template(loaded)
            store.note_environment(environment(str(loaded.model.device), "pil"))
            settings = experiment.settings_for(spec)
            given = (experiment.width, retry_failed, experiment.calibration, experiment.keep)
            runner = Runner(store, spec, loaded, settings, *given)
            chosen = [(task, sample(task, t, experiment.seed)) for t, task in tasks]
            total = sum(len(numbers) for _, numbers in chosen)
            work = [(task, number) for task, numbers in chosen for number in numbers]
            for done, answered in enumerate(runner.all(work)):
                progress(loaded.name, done % total, total)
                for kind, number in answered.items():
                    counts[kind] += number
            for task, _ in chosen:
                runner.score(task)
            progress(loaded.name, total, total)
    return Summary(**counts)


def experiment_tasks(experiment: Experiment) -> list[tuple[TaskSpec, Task]]:
    """The tasks of an experiment, suites resolved.

    Raises:
        ConfigError: if a task is named twice. UnknownName, TaskError: for one that is not there,
            also the one to calibrate on.
    """
    if experiment.calibration is not None:
        load_task(experiment.calibration.task)  # known now, not after hours
    tasks = [
        (spec, t)
        for spec in experiment.tasks
        for t in load_tasks(spec.name, spec.data, experiment.judge)
    ]
    names = [task.name for _, task in tasks]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(
            f"{', '.join(twice)} would be asked twice: suites overlap, or two folders name their"
            " task alike; leave one out"
        )
    return tasks


def sample(task: Task, spec: TaskSpec, seed: int) -> Sequence[int]:
    """Numbers of the documents to ask, in the task's order; the same for every model and setting.

    Documents of one cluster are drawn together: at most as many as asked for, at least one cluster.
    """
    whole = range(len(task.documents))
    if spec.documents is None or spec.documents >= len(whole):
        return whole
    draw = random.Random(f"{seed}:{task.name}")
    if not task.clusters:
        return sorted(draw.sample(whole, spec.documents))
    members: dict[str, list[int]] = {}
    for number, cluster in enumerate(task.clusters):
        members.setdefault(cluster, []).append(number)
    chosen: list[int] = []
    for cluster in draw.sample(sorted(members), len(members)):
        if not chosen or len(chosen) + len(members[cluster]) <= spec.documents:
            chosen += members[cluster]
    return sorted(chosen)
