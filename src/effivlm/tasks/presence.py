"""What is on this machine: packages, judges and data sets of the official benchmarks."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from effivlm import registry
from effivlm.tasks.base import TaskError
from effivlm.tasks.builtin import task_names
from effivlm.tasks.loading import Official, load_suite, official_tasks, suite_names

ENGINE = "lmms_eval"


def suites() -> Iterator[str]:
    """One line for every suite: how many of its tasks can be asked, need a judge, are refused."""
    engine = importlib.util.find_spec(ENGINE) is not None
    known = official_tasks()
    for name in suite_names():
        suite = load_suite(name)
        facts = [known[t] for t in suite.tasks if t in known]
        judged = sum(f.judge for f in facts)
        broken = sum(bool(f.broken) for f in facts)
        parts = [f"{len(suite.tasks)} tasks"]
        parts += [f"{judged} need a judge"] if judged else []
        parts += [f"{broken} refused"] if broken else []
        if facts:
            parts.append(f"{sum(_present(f) for f in facts)} with data in the hub's cache")
        if facts and not engine:
            parts.append("lmms-eval is not installed: `make benchmarks`")
        yield f"{name:16} {', '.join(parts)}"


def check(name: str, data: Path | None = None) -> Iterator[str]:
    """One line for every task of a suite: data set, split, rows, licence, and what is missing.

    Args:
        name: of a suite or a task.
        data: as in an experiment; None means the hub's cache.

    Raises:
        UnknownName: with near names.
    """
    known = official_tasks()
    suite = load_suite(name)
    names = [*suite_names(), *task_names(), *known]
    for task in suite.tasks:
        if task not in known:
            registry.lookup("task or suite", task, dict.fromkeys(names))
            yield f"{task:28} built in"
            continue
        folder = (data / task if len(suite.tasks) > 1 else data) if data else None
        yield f"{task:28} {_described(known[task])}: {_state(known[task], folder)}"


def _described(facts: Official) -> str:
    rows = "rows unknown" if facts.rows is None else f"{facts.rows} rows"
    judge = ", needs a judge" if facts.judge else ""
    licence = facts.licence or "licence not stated"
    return f"{facts.benchmark}, {facts.data} {facts.split}, {rows}, {licence}{judge}"


def _state(facts: Official, folder: Path | None) -> str:
    if facts.broken:
        return f"refused: {facts.broken}"
    if folder is not None:
        files = [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
        size = sum(p.stat().st_size for p in files)
        return f"present, {size / 1e6:.1f} MB" if files else f"missing: {folder} holds no files"
    home = _cache(facts)
    if not home.is_dir():
        return f"missing: `hf download --repo-type dataset {facts.data}`, or data: FOLDER"
    size = sum(p.stat().st_size for p in home.rglob("*") if p.is_file() and not p.is_symlink())
    return f"present, {size / 1e6:.1f} MB"


def _present(facts: Official) -> bool:
    return _cache(facts).is_dir()


def _cache(facts: Official) -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError as error:  # transformers brings it
        raise TaskError(f"the hub's cache cannot be found: {error}") from None
    return Path(HF_HUB_CACHE) / ("datasets--" + facts.data.replace("/", "--"))
