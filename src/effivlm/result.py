"""What a run found, for code: rows as they are in the tables, as a data frame, as a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from effivlm.config import ConfigError, Experiment, load_experiment
from effivlm.errors import shown
from effivlm.evaluation import score_run
from effivlm.records import StoreError
from effivlm.report.rows import Row
from effivlm.report.write import read_rows, write


@dataclass(frozen=True)
class Result:
    """A run's folder and what is in it.

    Attributes:
        folder: of the run. recorded: answers of this call. found: answers from before.
        failed: of all.
    """

    folder: Path
    recorded: int = 0
    found: int = 0
    failed: int = 0

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the report: one per model and setting, ``none`` first."""
        return read_rows(self.folder)

    def to_pandas(self) -> Any:
        """The rows as a data frame; what has several numbers a row (scores, shares) has a column
        for each, such as ``score_count``.

        Raises:
            ImportError: without pandas.
        """
        try:
            import pandas  # pyright: ignore[reportMissingModuleSource,reportMissingTypeStubs]
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install pandas, or use .rows") from None
        return pandas.DataFrame(plain_rows(self.rows))

    def plot(self, path: str | Path | None = None, axis: str = "prompt_kv") -> Path:
        """Quality against a cost axis (see `report.rows.AXES`) as a picture.

        Returns:
            The PNG written: ``path`` with that ending, or one in the run's ``report/``; SVG and PDF
            stand beside it.

        Raises:
            ImportError: without matplotlib.
        """
        from effivlm.report import figures

        picture = Path(path) if path else self.folder / "report" / f"quality_{axis}"
        picture.parent.mkdir(parents=True, exist_ok=True)
        return figures.trade_off(self.rows, picture, axis)[0]


def run(
    experiment: Experiment | str | Path,
    root: str | Path = "runs",
    progress: Any = None,
    retry_failed: bool = False,
) -> Result:
    """Answer every document of an experiment under every setting; what the run's folder already
    holds is not done again.

    Args:
        experiment: an `Experiment`, or its YAML file.
        root: folder of runs.
        progress: called with a model's name, documents done, documents in all.
        retry_failed: ask documents again that failed before.

    Raises:
        ConfigError: for an experiment that cannot be read. StoreError, LoadError, TaskError,
            Unsupported: before anything runs, where it can be known.
    """
    from effivlm.experiment import run as answer

    asked = experiment if isinstance(experiment, Experiment) else load_experiment(_path(experiment))
    extra = {"progress": progress} if progress is not None else {}
    done = answer(asked, Path(root), retry_failed=retry_failed, **extra)
    return Result(Path(root) / asked.name, done.recorded, done.found, done.failed)


def report(folder: str | Path) -> Result:
    """Write a run's report again from its records.

    Raises:
        StoreError: if the folder holds no run.
    """
    if not isinstance(folder, str | Path):
        raise StoreError(f"expected the folder of a run, such as runs/default, got {shown(folder)}")
    score_run(Path(folder))  # an interrupted run has answers that nobody scored yet
    write(Path(folder))
    return Result(Path(folder))


def _path(given: object) -> Path:
    if not isinstance(given, str | Path):
        raise ConfigError(f"expected an Experiment or its YAML file, got {shown(given)}")
    return Path(given)


def plain_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain data: numbers in percent or shares as in `Row`, None where undefined."""
    out: list[dict[str, Any]] = []
    for row in rows:
        flat: dict[str, Any] = {}
        for field in fields(row):
            value = getattr(row, field.name)
            if field.name in ("pairs", "speed", "notes"):
                continue
            if isinstance(value, dict):
                name = {"scores": "score", "ratios": "ratio", "shares": "share", "costs": "cost"}
                flat |= {f"{name[field.name]}_{k}": _defined(v) for k, v in value.items()}
            else:
                flat[field.name] = _defined(value)
        flat |= {f"speedup {k}": s.ratio for k, s in row.speed.items()}
        out.append(flat)
    return out


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
