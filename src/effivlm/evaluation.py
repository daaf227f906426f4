"""Scores answers that are on disk; no model is needed."""

from collections.abc import Callable, Iterable
from pathlib import Path

from effivlm.config import load_experiment
from effivlm.records import StoreError, read_answers, read_records, record_files
from effivlm.scores import Scores, read_scores, write_scores
from effivlm.tasks.base import Task
from effivlm.tasks.loading import load_tasks
from effivlm.tasks.per_answer import invalid


def score_run(
    folder: Path, again: bool = False, progress: Callable[[str], None] = lambda what: None
) -> list[Scores]:
    """Score what a run answered.

    Args:
        folder: of the run.
        again: score also what is scored already, by the scorers as they are now.
        progress: called with the task that is scored next.

    Returns:
        All scores of the run, in the order of its files.

    Raises:
        StoreError: if the folder holds no answers. TaskError, UnknownName: if a task that has to be
            scored is not there any more.
    """
    paths = record_files(folder)
    if not paths:
        raise StoreError(
            f"{folder} holds no records: expected the folder of a run, such as runs/default"
        )
    todo = [p for p in paths if again or not _scored(p)]
    tasks = {t.name: t for t in _tasks(folder)} if todo else {}
    out: list[Scores] = []
    for path in paths:
        progress(path.stem)
        if path in todo:
            out.append(score_file(path, _task_of(path, tasks), again))
        elif (scores := read_scores(path)) is not None:
            out.append(scores)
    return out


def _scored(path: Path) -> bool:
    """Whether the answers have scores: beside them, or, of older versions, in their lines."""
    return read_scores(path) is not None or all(
        r.failed or r.score is not None for r in read_records(path)
    )


def _tasks(folder: Path) -> Iterable[Task]:
    experiment = load_experiment(folder / "experiment.yaml")
    for spec in experiment.tasks:
        yield from load_tasks(spec.name, spec.data, experiment.judge)


def _task_of(path: Path, tasks: dict[str, Task]) -> Task:
    if path.stem not in tasks:
        raise StoreError(
            f"{path} holds answers to {path.stem}, which the run's experiment.yaml does not ask"
            f" ({', '.join(sorted(tasks))}): move the file away"
        )
    return tasks[path.stem]


def score_file(path: Path, task: Task, again: bool = False) -> Scores:
    """Scores of one setting's answers, computed and written unless they are there.

    Raises:
        TaskError: if the scorer fails.
    """
    if not again and (before := read_scores(path)) is not None:
        return before
    size = path.stat().st_size
    answers = [task.cut(a) for a in read_answers(path)]
    result = task.scorer.score(answers)
    said = [a.text for a in answers if a.text is not None]
    scores = Scores(
        task.name,
        task.version,
        task.scorer.metrics,
        result.total,
        {a.document: s for a, s in zip(answers, result.each, strict=True)},
        size,
        documents=len(answers),
        failed=len(answers) - len(said),
        empty=sum(not text.strip() for text in said),
        invalid=sum(bool(t.strip()) and invalid(t, task.scorer.form) for t in said),
        void=result.void,
    )
    write_scores(path, scores)
    return scores
