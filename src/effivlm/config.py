"""What a run is: frozen specifications and their YAML form. Unknown keys are errors; every mistake
names its key.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from effivlm.budget import BudgetError
from effivlm.changes import changed
from effivlm.errors import EffivlmError, printable, shown
from effivlm.files.reading import said
from effivlm.files.yaml_text import dump_yaml, read_yaml
from effivlm.registry import UnknownName
from effivlm.setting import Setting, SettingError, parse_setting
from effivlm.specs import CalibrationSpec, JudgeSpec, MeasureSpec, ModelSpec, Spec, TaskSpec

MOST_SETTINGS = 2000  # more than any table or figure could show
MOST_SAID = 20  # mistakes of one file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ConfigError(EffivlmError, ValueError):
    """An experiment that cannot be read; lists every mistake by key."""


def _grid(given: dict[str, Any]) -> list[str]:
    """Every method at every budget."""
    if set(given) != {"methods", "keep"}:
        raise ValueError(
            "a settings grid needs exactly the keys methods and keep, got"
            f" {', '.join(map(shown, given))}"
        )
    for key, values in given.items():
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"a settings grid needs lists, got {key}: {shown(values)}; write {key}: [{values}]"
            )
        kinds = (str,) if key == "methods" else (str, int, float)
        for item in cast("Sequence[object]", values):
            if not isinstance(item, kinds) or isinstance(item, bool):
                want = "names" if key == "methods" else "budgets such as 0.1"
                raise ValueError(f"a settings grid needs {want} in {key}, got {shown(item)}")
        if not values:
            raise ValueError(f"a settings grid needs at least one of {key}, got none")
    return [f"{m}@{k}" for m in given["methods"] for k in given["keep"]]


class Experiment(Spec):
    """One comparison: models x settings x tasks.

    Attributes:
        name: the run's folder under ``runs/``. settings: in text form; ``none`` is always included,
            first.
        tasks: may be left out where the experiment is only measured, on a fixed workload.
        seed: sampling of documents. width: answers decoded side by side.
        calibration: of weights methods. judge: for tasks that need one.
        keep: record what became of every visual token, for the report to draw.
    """

    name: str = Field(max_length=100)
    models: tuple[ModelSpec, ...] = Field(min_length=1)
    settings: tuple[str, ...] = Field(min_length=1, max_length=MOST_SETTINGS)
    tasks: tuple[TaskSpec, ...] = ()
    measure: MeasureSpec | None = None
    judge: JudgeSpec | None = None
    calibration: CalibrationSpec | None = None
    seed: int = Field(default=0, strict=True)
    width: int = Field(default=16, ge=1, strict=True)
    keep: bool = Field(default=False, strict=True)

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(
                "expected letters, digits, '.', '_' and '-', the first a letter or a digit (it"
                f" names the run's folder), got {shown(value)}"
            )
        return value

    @model_validator(mode="after")
    def _models_differ(self) -> "Experiment":
        labels = [m.label for m in self.models]
        for i, label in enumerate(labels):
            if (first := labels.index(label)) < i:
                raise ValueError(
                    f"models.{first} and models.{i} would both be called {shown(label)} in tables"
                    " and records: compare them in two experiments, or leave one out"
                )
        return self

    @model_validator(mode="after")
    def _asks_something(self) -> "Experiment":
        if not self.tasks and (self.measure is None or self.measure.workload == "tasks"):
            raise ValueError("tasks: Field required (or a section 'measure' with a fixed workload)")
        return self

    @model_validator(mode="after")
    def _leaves_out_something(self) -> "Experiment":
        used = {p.method.name for text in self.settings for p in parse_setting(text).parts}
        for model in self.models:
            for name in model.without:
                if name not in used:
                    raise ValueError(
                        f"without: {name} is in no setting of this experiment, so leaving it out of"
                        f" {model.name} does nothing; methods used: {', '.join(sorted(used))}"
                    )
        return self

    def settings_for(self, model: ModelSpec) -> list[Setting]:
        """The settings of one of the models: all but those of its ``without``."""
        read = [parse_setting(text) for text in self.settings]
        return [s for s in read if not {p.method.name for p in s.parts} & set(model.without)]

    @field_validator("settings", mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        """``{methods: [a, b], keep: [0.1, 0.2]}`` stands for every method at every budget."""
        if isinstance(cast("object", value), str | dict):
            raise ValueError(f"expected a list, got {shown(value)}; write [...] around it")
        if not isinstance(value, list | tuple) or not value:
            got = shown(cast("object", value))
            raise ValueError(f"expected a list of at least one setting, got {got}")
        out: list[str] = ["none"]
        for item in cast("Sequence[object]", value):
            if isinstance(item, dict):
                out += _grid(cast("dict[str, Any]", item))
            elif isinstance(item, str):
                out.append(item)
            else:
                raise ValueError(f"expected texts such as fastv@0.1, got {shown(item)}")
        return tuple(dict.fromkeys(out))

    @field_validator("settings")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        problems: list[str] = []
        for text in value:
            try:
                parse_setting(text)
            except (SettingError, BudgetError, UnknownName, ValueError) as error:
                problems.append(f"{shown(text)}: {error}")
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError("; ".join(problems[:5]) + more)
        return tuple(dict.fromkeys(str(parse_setting(t)) for t in value))


def load_experiment(path: Path, changes: Sequence[str] = ()) -> Experiment:
    """Read an experiment; ``changes`` such as ``tasks.0.documents=5`` are carried out first.

    Raises:
        ConfigError: if the file is missing, is not YAML, or has mistakes; all of them are listed.
    """
    if not path.exists() and not path.is_symlink():
        raise ConfigError(
            f"no experiment file {said(path)}: give a YAML file, or no argument for the built-in"
            " default"
        )
    data = read_yaml(path, "an experiment in YAML", ConfigError)
    if not isinstance(data, dict):
        held = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise ConfigError(f"{path} {held}: expected keys name, models, settings, tasks")
    data = changed(cast("dict[str, Any]", data), changes, ConfigError)
    return build_experiment(data, str(path))


def build_experiment(data: dict[str, Any], where: str) -> Experiment:
    """An experiment from plain data.

    Raises:
        ConfigError: listing every mistake by key.
    """
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        found = [(e["loc"], e["type"], _came(e)) for e in error.errors(include_url=False)]
        inside = {
            where[0] for where, *_ in found if len(where) > 1
        }  # a list of which every item is wrong is not "too short"
        lines = [
            f"  {printable('.'.join(map(str, where)))[:100]}: {_said(where, kind, text)}"
            for where, kind, text in found
            if kind != "too_short" or where[0] not in inside
        ]
        more = f"\n  and {len(lines) - MOST_SAID} more" if len(lines) > MOST_SAID else ""
        text = "\n".join(lines[:MOST_SAID]) + more
        raise ConfigError(f"{where} has {len(lines)} mistake(s):\n{text}") from None


def _came(error: Any) -> str:
    """Pydantic's message and, unless it is one of ours, what came."""
    text = printable(error["msg"])
    if error["type"] in ("value_error", "missing", "extra_forbidden"):
        return text
    return f"{text}, got {shown(error['input'], 60)}"


def _said(where: tuple[int | str, ...], kind: str, text: str) -> str:
    """What is wrong at a place, in words; near names for a key that does not exist."""
    if kind != "extra_forbidden":
        return text.removeprefix("Value error, ")
    owners: dict[int | str, type[Spec]] = {
        "models": ModelSpec,
        "tasks": TaskSpec,
        "measure": MeasureSpec,
        "judge": JudgeSpec,
        "calibration": CalibrationSpec,
    }
    *_, key = where
    known = (owners.get(where[0], Experiment) if len(where) > 1 else Experiment).model_fields
    near = difflib.get_close_matches(str(key)[:100], known, n=2)
    return (
        f"unknown key: did you mean {' or '.join(near)}?"
        if near
        else f"unknown key: known are {', '.join(known)}"
    )


def dump_experiment(experiment: Experiment) -> str:
    """The YAML form; reading it back gives the same experiment."""
    return dump_yaml(experiment.model_dump(mode="json"))


def default_experiment() -> Path:
    """The built-in default."""
    return Path(__file__).parent / "default.yaml"
