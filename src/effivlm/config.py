"""What a run is: frozen specifications and their YAML form. Unknown keys are errors; every mistake
names its key.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from effivlm import registry
from effivlm.budget import BudgetError
from effivlm.errors import EffivlmError
from effivlm.registry import UnknownName
from effivlm.setting import Setting, SettingError, parse_setting


class ConfigError(EffivlmError, ValueError):
    """An experiment that cannot be read; lists every mistake by key."""


class Spec(BaseModel):
    """Base: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(Spec):
    """A model to load.

    Attributes:
        name: hub id, checkpoint folder, ``zoo:NAME`` for a built-in checkpoint, or a published
            shape.
        dtype: ``auto``, ``float32``, ``bfloat16``, ``float16``. attn: attention back end. device:
            where it runs.
        random_weights: build the published shape ``name`` without weights (speed and memory only).
        without: methods that are not run on this model, such as ``downsample`` where an encoder
            takes one size.
    """

    name: str
    dtype: str = "auto"
    attn: str = "sdpa"
    device: str = "cpu"
    random_weights: bool = False
    without: tuple[str, ...] = ()

    @field_validator("without")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            try:
                registry.lookup("method", name, registry.methods())
            except UnknownName as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        known = ("auto", "float32", "bfloat16", "float16")
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}, got {value!r}")
        return value


class TaskSpec(Spec):
    """A task or suite to answer.

    Attributes:
        name: built-in task, or a folder with ``task.yaml``. documents: how many; None means all.
    """

    name: str
    documents: int | None = Field(default=None, ge=1)


class MeasureSpec(Spec):
    """How speed is measured.

    Attributes:
        workload: see `effivlm.measure`. repeats: timed runs of every setting. warmup: untimed runs.
        seconds: stop a setting's repeats after this long.
    """

    workload: str = "effivlm-bench"
    repeats: int = Field(default=20, ge=2)
    warmup: int = Field(default=2, ge=0)
    seconds: float = Field(default=120.0, gt=0)


def _grid(given: dict[str, Any]) -> list[str]:
    """Every method at every budget."""
    if set(given) != {"methods", "keep"}:
        raise ValueError(
            "a settings grid needs exactly the keys methods and keep, got"
            f" {', '.join(map(str, given))}"
        )
    for key, values in given.items():
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"a settings grid needs lists, got {key}: {values!r}; write {key}: [{values}]"
            )
    return [f"{m}@{k}" for m in given["methods"] for k in given["keep"]]


class Experiment(Spec):
    """One comparison: models x settings x tasks.

    Attributes:
        name: the run's folder under ``runs/``. settings: in text form; ``none`` is always included,
            first.
        tasks: may be left out where the experiment is only measured, on a fixed workload.
        seed: sampling of documents. width: answers decoded side by side.
        keep: record what became of every visual token, for the report to draw.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    models: tuple[ModelSpec, ...] = Field(min_length=1)
    settings: tuple[str, ...] = Field(min_length=1)
    tasks: tuple[TaskSpec, ...] = ()
    measure: MeasureSpec | None = None
    seed: int = 0
    width: int = Field(default=16, ge=1)
    keep: bool = False

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
        if not isinstance(value, list | tuple):
            return value
        out: list[str] = ["none"]
        for item in cast("Sequence[object]", value):
            if isinstance(item, dict):
                out += _grid(cast("dict[str, Any]", item))
            else:
                out.append(str(item))
        return tuple(dict.fromkeys(out))

    @field_validator("settings")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        problems: list[str] = []
        for text in value:
            try:
                parse_setting(text)
            except (SettingError, BudgetError, UnknownName, ValueError) as error:
                problems.append(f"{text!r}: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return tuple(dict.fromkeys(str(parse_setting(t)) for t in value))


def load_experiment(path: Path) -> Experiment:
    """Read an experiment.

    Raises:
        ConfigError: if the file is missing, is not YAML, or has mistakes; all of them are listed.
    """
    if not path.exists():
        raise ConfigError(
            f"no experiment file {path}: give a YAML file, or no argument for the built-in default"
        )
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        held = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise ConfigError(f"{path} {held}: expected keys name, models, settings, tasks")
    return build_experiment(cast("dict[str, Any]", data), str(path))


def build_experiment(data: dict[str, Any], where: str) -> Experiment:
    """An experiment from plain data.

    Raises:
        ConfigError: listing every mistake by key.
    """
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        found = [(e["loc"], e["type"], e["msg"]) for e in error.errors()]
        inside = {
            where[0] for where, *_ in found if len(where) > 1
        }  # a list of which every item is wrong is not "too short"
        lines = [
            f"  {'.'.join(map(str, where))}: {_said(where, kind, text)}"
            for where, kind, text in found
            if kind != "too_short" or where[0] not in inside
        ]
        raise ConfigError(f"{where} has {len(lines)} mistake(s):\n" + "\n".join(lines)) from None


def _said(where: tuple[int | str, ...], kind: str, text: str) -> str:
    """What is wrong at a place, in words; near names for a key that does not exist."""
    if kind != "extra_forbidden":
        return text.removeprefix("Value error, ")
    owners: dict[int | str, type[Spec]] = {
        "models": ModelSpec,
        "tasks": TaskSpec,
        "measure": MeasureSpec,
    }
    *_, key = where
    known = (owners.get(where[0], Experiment) if len(where) > 1 else Experiment).model_fields
    near = difflib.get_close_matches(str(key), known, n=2)
    return (
        f"unknown key: did you mean {' or '.join(near)}?"
        if near
        else f"unknown key: known are {', '.join(known)}"
    )


def dump_experiment(experiment: Experiment) -> str:
    """The YAML form; reading it back gives the same experiment."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)


def default_experiment() -> Path:
    """The built-in default."""
    return Path(__file__).parent / "default.yaml"
