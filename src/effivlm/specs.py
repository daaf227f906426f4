"""The parts of an experiment: models, tasks, what calibrates, judges and measures. Frozen; unknown
keys are errors.
"""

from pathlib import Path
from typing import Any

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from effivlm import registry
from effivlm.errors import shown
from effivlm.files.names import label_of
from effivlm.registry import UnknownName

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
MOST_FRAMES = 100_000  # of a video; no model takes so many


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
            takes one size. frames: images that a video becomes.
    """

    name: str = Field(min_length=1)
    dtype: str = "auto"
    attn: str = "sdpa"
    device: str = "cpu"
    random_weights: bool = Field(default=False, strict=True)
    without: tuple[str, ...] = ()
    frames: int = Field(default=8, ge=1, le=MOST_FRAMES, strict=True)

    @property
    def label(self) -> str:
        """What tables call it: a checkpoint's last name."""
        return label_of(self.name)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """A text is a model's name."""
        return {"name": value} if isinstance(value, str) else value

    @field_validator("without")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            try:
                registry.lookup("method", name, registry.methods())
            except UnknownName as error:
                raise ValueError(str(error)) from None
        return value

    @field_validator("attn")
    @classmethod
    def _attention(cls, value: str) -> str:
        if value not in ATTENTIONS:
            raise ValueError(f"expected one of {', '.join(ATTENTIONS)}, got {shown(value)}")
        return value

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        known = ("auto", "float32", "bfloat16", "float16")
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}, got {shown(value)}")
        return value


class TaskSpec(Spec):
    """A task or suite to answer.

    Attributes:
        name: a suite, a task, or a folder with ``task.yaml``; may be written ``suite``. documents:
            how many of each task; None means all. data: folder with an official task's rows; for a
            suite, with one folder per task; None means the hub's cache.
    """

    name: str = Field(min_length=1, validation_alias=AliasChoices("name", "suite"))
    documents: int | None = Field(default=None, ge=1, strict=True)
    data: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """A text is a task's name."""
        return {"name": value} if isinstance(value, str) else value


class CalibrationSpec(Spec):
    """What weights methods are calibrated on.

    Attributes:
        task: built-in task, or a folder with ``task.yaml``: the prompt and its first answer.
        samples: documents. seed: which. files: folder of compressed weights that `effivlm
            calibrate` wrote; what is there is taken, the rest is calibrated.
    """

    task: str = Field(default="caption", min_length=1)
    samples: int = Field(default=128, ge=1, strict=True)
    seed: int = Field(default=0, strict=True)
    files: str | None = Field(default=None, min_length=1)


class JudgeSpec(Spec):
    """The model that scores answers of tasks which need one.

    Attributes:
        url: of an OpenAI-compatible endpoint, up to ``/v1``. model: its name there. key_env,
            key_file: environment variable or file that holds the key, which is never stored.
        timeout: seconds for one call. cache: SQLite file of replies; None keeps them for one run.
    """

    url: str = Field(pattern=r"^https?://[^/\s]+")
    model: str = Field(min_length=1)
    key_env: str = ""
    key_file: Path | None = None
    timeout: float = Field(default=60.0, gt=0, strict=True, allow_inf_nan=False)
    cache: Path | None = None


class MeasureSpec(Spec):
    """How speed is measured.

    Attributes:
        workload: see `effivlm.measure`. repeats: timed runs of every setting. warmup: untimed runs.
        seconds: stop a setting's repeats after this long.
    """

    workload: str = "effivlm-bench"
    repeats: int = Field(default=20, ge=2, strict=True)
    warmup: int = Field(default=2, ge=0, strict=True)
    seconds: float = Field(default=120.0, gt=0, strict=True, allow_inf_nan=False)

    @field_validator("workload")
    @classmethod
    def _known_workload(cls, value: str) -> str:
        from effivlm.measure.workloads import WORKLOADS  # late: only who measures waits for it

        try:
            registry.lookup("workload", value, {**WORKLOADS, "tasks": None})
        except UnknownName as error:
            raise ValueError(str(error)) from None
        return value
