"""A setting: methods with their budgets, and its text form ``visionzip@0.1 +
snapkv@0.4:window=16``.

Grammar of one part: ``name[@budget][:field=value,...]``. Fields are the method's own
hyper-parameters; two words are
reserved: ``unit`` (budget unit) and ``positions`` (``original`` or ``repack``). Tuples are written
``3-7-16``. The text form round-trips: ``parse_setting(str(setting)) == setting``.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any

from effivlm import registry
from effivlm.budget import Budget, BudgetError, parse_budget
from effivlm.errors import EffivlmError
from effivlm.methods.base import EncoderReducer, IntraLLM, KVCache, Method, PreEncoder, PreLLM

POSITIONS = ("original", "repack")
STAGES: dict[str, type[Method]] = {
    "pre_encoder": PreEncoder,
    "encoder": EncoderReducer,
    "pre_llm": PreLLM,
    "intra_llm": IntraLLM,
    "kv_cache": KVCache,
}


class SettingError(EffivlmError, ValueError):
    """A setting that cannot be read or whose parts do not fit together."""


@dataclass(frozen=True)
class Part:
    """One method with its budget (None: the method's own rule, or a method without a budget)."""

    method: Method
    budget: Budget | None

    def at(self, stage: type[Method]) -> bool:
        """Whether this part acts at ``stage`` (one of the stage classes of `methods.base`)."""
        return isinstance(self.method, stage)

    @property
    def full(self) -> bool:
        """Whether it keeps everything by its budget, so that it need not be attached at all."""
        return self.budget is not None and self.budget.full

    def __str__(self) -> str:
        """The part's text form; fields that have their default are left out."""
        text = self.method.name + (f"@{self.budget.text}" if self.budget else "")
        fields = [f"{f.name}={_show(v)}" for f, v in _values(self.method) if v != f.default]
        if self.budget and self.budget.unit != self.method.units[0]:
            fields.append(f"unit={self.budget.unit}")
        return text + (":" + ",".join(fields) if fields else "")


@dataclass(frozen=True)
class Setting:
    """One point of the comparison: parts in order, and what happens to positions after a cut before
    the LLM.
    """

    parts: tuple[Part, ...]
    positions: str = "original"

    def __str__(self) -> str:
        """The text form used in YAML, on the command line and in tables."""
        text = " + ".join(map(str, self.parts))
        if self.positions == "original":
            return text
        return text + ("," if ":" in str(self.parts[-1]) else ":") + f"positions={self.positions}"

    @property
    def acting(self) -> tuple[Part, ...]:
        """The parts that change something."""
        return tuple(p for p in self.parts if not p.full and any(map(p.at, STAGES.values())))

    def stage(self, stage: type[Method]) -> tuple[Part, ...]:
        """The parts that act at a stage and change something, in order."""
        return tuple(p for p in self.parts if p.at(stage) and not p.full)


def parse_setting(text: str) -> Setting:
    """Read a setting.

    Raises:
        SettingError: for a malformed part, an unknown field, a bad value, or parts that do not fit
            together.
        BudgetError: for a bad budget. UnknownName: for an unknown method, with near names.
    """
    positions = "original"
    parts: list[Part] = []
    for piece in text.split("+"):
        part, where = _parse_part(piece.strip(), text)
        parts.append(part)
        positions = where or positions
    setting = Setting(tuple(parts), positions)
    _check(setting)
    return setting


def _check(setting: Setting) -> None:
    if setting.positions not in POSITIONS:
        raise SettingError(
            f"positions={setting.positions!r}: expected one of {', '.join(POSITIONS)}"
        )
    if len(setting.stage(KVCache)) > 1:
        names = " and ".join(p.method.name for p in setting.stage(KVCache))
        raise SettingError(
            f"{names} both compress the KV cache: a setting can hold one cache method"
        )
    before = any(setting.stage(s) for s in (PreEncoder, EncoderReducer, PreLLM))
    if setting.positions == "repack" and (not before or setting.stage(IntraLLM)):
        raise SettingError(
            "positions=repack renumbers what enters the LLM: it needs a method that cuts before the"
            " LLM and none inside"
        )


def _parse_part(piece: str, whole: str) -> tuple[Part, str | None]:
    head, _, tail = piece.partition(":")
    name, at, amount = head.partition("@")
    if not name or not name.replace("_", "").isalnum():
        raise SettingError(
            f"cannot read {piece!r} in setting {whole!r}: expected name@budget:field=value, parts"
            " joined by +"
        )
    cls = registry.lookup("method", name, registry.methods())
    given = dict(_pair(item, piece) for item in tail.split(",")) if tail else {}
    unit, positions = given.pop("unit", cls.units[0]), given.pop("positions", None)
    if unit not in cls.units:
        raise BudgetError(
            f"{name} does not honour the budget unit {unit!r}: expected one of"
            f" {', '.join(cls.units)}"
        )
    if bool(at) and cls.budget == "none":
        raise BudgetError(f"{name} takes no budget: write {name!r} instead of {head!r}")
    if not at and cls.budget == "required":
        raise BudgetError(f"{name} needs a budget: write for example {name}@0.1")
    budget = parse_budget(amount, unit) if at else None
    return Part(cls(**_read_fields(cls, given)), budget), positions


def _pair(item: str, piece: str) -> tuple[str, str]:
    key, eq, value = item.partition("=")
    if not eq or not key.strip() or not value.strip():
        raise SettingError(f"cannot read {item!r} in {piece!r}: expected field=value")
    return key.strip(), value.strip()


def _read_fields(cls: type[Method], given: dict[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
    out = {}
    for key, value in given.items():
        try:
            kind = registry.lookup(
                f"parameter of {cls.name}", key, {**known, "unit": str, "positions": str}
            )
        except registry.UnknownName as error:
            raise SettingError(str(error)) from None
        try:
            out[key] = _read(value, kind)
        except ValueError:
            raise SettingError(
                f"{cls.name}: {key}={value!r} is not a {getattr(kind, '__name__', kind)}"
            ) from None
    return out


def _read(value: str, kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and value.lower() == "none":
            return None
        kinds = [a for a in (int, float, str) if a in args] or [
            a for a in args if a is not type(None)
        ]
        for candidate in kinds:
            try:
                return _read(value, candidate)
            except ValueError:
                continue
        raise ValueError(value)
    if origin is tuple:
        return tuple(_read(v, args[0]) for v in value.split("-"))
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(value)
        return value
    if kind is bool:
        return (
            {"true": True, "false": False}[value.lower()]
            if value.lower() in ("true", "false")
            else _refuse(value)
        )
    return kind(value)


def _refuse(value: str) -> Any:
    raise ValueError(value)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(method: Method) -> list[tuple[dataclasses.Field[Any], Any]]:
    return [(f, getattr(method, f.name)) for f in dataclasses.fields(method) if f.init]
