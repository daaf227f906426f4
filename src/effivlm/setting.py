"""A setting: methods with their budgets, and its text form ``visionzip@0.1 +
snapkv@0.4:window=16``.

Grammar of one part: ``name[(method)][@budget][:field=value,...]``. Fields are the method's own
hyper-parameters; two words are reserved: ``unit`` (budget unit) and ``positions`` (``original`` or
``repack``). Tuples are written ``3-7-16``. A wrapper holds another method, with that one's fields,
in brackets: ``adakv(snapkv:rows=32,kernel=7)@0.2:floor=0.3``; the budget is the whole's. The text
form round-trips: ``parse_setting(str(setting)) == setting``.
"""

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, cast

from effivlm import registry
from effivlm.budget import Budget, BudgetError, parse_budget
from effivlm.errors import EffivlmError, shown
from effivlm.methods.base import (
    EncoderReducer,
    IntraLLM,
    KVCache,
    KVFormat,
    Method,
    PreEncoder,
    PreLLM,
    Processing,
    Weights,
)

PART = re.compile(
    r"(?P<name>\w+)(?:\((?P<held>.*)\))?(?:@(?P<budget>[^:()]*))?(?::(?P<fields>[^()]*))?"
)
LONGEST = 2000  # characters of a setting
POSITIONS = ("original", "repack")
STAGES: dict[str, type[Method]] = {
    "weights": Weights,
    "processing": Processing,
    "pre_encoder": PreEncoder,
    "encoder": EncoderReducer,
    "pre_llm": PreLLM,
    "intra_llm": IntraLLM,
    "kv_cache": KVCache,
    "kv_format": KVFormat,
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
        return self.text()

    def text(self, *more: str) -> str:
        """Its text form with ``more`` fields at its end."""
        budget = self.budget
        if budget and budget.unit != self.method.units[0]:
            more = (f"unit={budget.unit}", *more)
        return _text(self.method, f"@{budget.text}" if budget else "", more)


@dataclass(frozen=True)
class Setting:
    """One point of the comparison: parts in order, and what happens to positions after a cut before
    the LLM.
    """

    parts: tuple[Part, ...]
    positions: str = "original"

    def __str__(self) -> str:
        """The text form used in YAML, on the command line and in tables."""
        if not self.parts:
            return "none"
        more = () if self.positions == "original" else (f"positions={self.positions}",)
        return " + ".join([*map(str, self.parts[:-1]), self.parts[-1].text(*more)])

    @property
    def acting(self) -> tuple[Part, ...]:
        """The parts that change something."""
        return tuple(p for p in self.parts if not p.full and any(map(p.at, STAGES.values())))

    def without(self, stage: type[Method]) -> "Setting":
        """The same setting with no part that acts at ``stage``."""
        return Setting(tuple(p for p in self.parts if not p.at(stage)), self.positions)

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
    if not isinstance(cast("object", text), str):
        raise SettingError(
            f"a setting is a text such as 'fastv@0.1', got {shown(text)} of type"
            f" {type(text).__name__}"
        )
    if len(text) > LONGEST:
        raise SettingError(
            f"a setting of {len(text)} characters ({shown(text, 40)}): expected {LONGEST} at most"
        )
    parts: list[Part] = []
    said: list[str] = []
    for piece in text.split("+"):
        part, where = _parse_part(piece.strip(), text)
        parts.append(part)
        said += [where] if where else []
    if len(set(said)) > 1:
        raise SettingError(f"{text!r} says both positions={said[0]} and positions={said[1]}")
    setting = Setting(tuple(parts), said[0] if said else "original")
    _check(setting)
    return setting


def _check(setting: Setting) -> None:
    if setting.positions not in POSITIONS:
        raise SettingError(
            f"positions={setting.positions!r}: expected one of {', '.join(POSITIONS)}"
        )
    once = (
        (Weights, "compress the weights"),
        (Processing, "say how images are processed"),
        (KVCache, "choose what the cache keeps"),
        (KVFormat, "store the cache"),
    )
    for stage, what in once:
        parts = [p for p in setting.parts if p.at(stage)]
        if len(parts) > 1:
            names = " and ".join(p.method.name for p in parts)
            raise SettingError(f"{names} both {what}: a setting can hold one such method")
    for part in setting.parts:
        if len(setting.parts) > 1 and not any(map(part.at, STAGES.values())):
            raise SettingError(f"{part} changes nothing beside other methods: leave it out")
        if isinstance(part.method, Weights):
            part.method.check_budget(part.budget)
    before = any(setting.stage(s) for s in (PreEncoder, EncoderReducer, PreLLM))
    if setting.positions == "repack" and (not before or setting.stage(IntraLLM)):
        raise SettingError(
            "positions=repack renumbers what enters the LLM: it needs a method that cuts before the"
            " LLM and none inside"
        )


def _parse_part(piece: str, whole: str) -> tuple[Part, str | None]:
    found = _match(piece, whole)
    name, amount = found["name"], found["budget"]
    cls = registry.lookup("method", name, registry.methods())
    if amount is None and "@" in (found["fields"] or ""):
        fields, _, late = str(found["fields"]).rpartition("@")
        raise SettingError(
            f"cannot read {piece!r}: the budget stands before the fields: write"
            f" {piece.partition(':')[0]}@{late}:{fields}"
        )
    given = _pairs(found["fields"], piece)
    unit, positions = given.pop("unit", cls.units[0]), given.pop("positions", None)
    if unit not in cls.units:
        raise BudgetError(
            f"{name} does not honour the budget unit {unit!r}: expected one of"
            f" {', '.join(cls.units)}"
        )
    if amount is not None and cls.budget == "none":
        raise BudgetError(f"{name} takes no budget: write {name!r} instead of {name}@{amount}")
    held = _parse_held(cls, found["held"], whole)
    if amount is None and cls.budget == "required":
        head = piece.partition(")")[0] + ")" if held else name
        raise BudgetError(f"{name} needs a budget: write for example {head}@0.1")
    budget = parse_budget(amount, unit) if amount is not None else None
    fields = _read_fields(cls, given, ("unit", "positions"))
    return Part(_made(cls, {**held, **fields}), budget), positions


def _made(cls: type[Method], fields: dict[str, Any]) -> Method:
    try:
        return cls(**fields)
    except EffivlmError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # of a method's own checks
        raise SettingError(f"{cls.name}: {error}") from None


def _match(piece: str, whole: str) -> re.Match[str]:
    if (found := PART.fullmatch(piece)) is None:
        raise SettingError(
            f"cannot read {piece!r} in setting {whole!r}: expected name@budget:field=value, or"
            " name(method:field=value)@budget:field=value for a method around another, parts joined"
            " by +"
        )
    return found


def _parse_held(cls: type[Method], text: str | None, whole: str) -> dict[str, Method]:
    """The field of a wrapper that holds a method, filled from what stands in its brackets."""
    if text is None:
        return {}
    if (holder := _holder(cls)) is None:
        raise SettingError(f"{cls.name} wraps no other method: leave out ({text})")
    field, kind = holder
    found = _match(text.strip(), whole)
    inner = registry.lookup("method", found["name"], registry.methods())
    if not issubclass(inner, kind):
        fit = [n for n, c in registry.methods().items() if issubclass(c, kind)]
        raise SettingError(f"{cls.name} cannot wrap {inner.name}: expected one of {', '.join(fit)}")
    if found["held"] is not None:
        raise SettingError(f"{inner.name} wraps no other method: leave out ({found['held']})")
    if found["budget"] is not None:
        raise BudgetError(
            f"the budget belongs to the whole: write {cls.name}({inner.name})@{found['budget']}"
        )
    return {field: _made(inner, _read_fields(inner, _pairs(found["fields"], text)))}


def _holder(cls: type[Method]) -> tuple[str, type[Method]] | None:
    """The field of ``cls`` that holds another method, and the class that one must have."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if isinstance(kind, type) and issubclass(kind, Method):
            return field.name, kind
    return None


def _pairs(fields: str | None, piece: str) -> dict[str, str]:
    """The fields of a part, each once."""
    out: dict[str, str] = {}
    for item in fields.split(",") if fields else ():
        key, eq, value = (x.strip() for x in item.partition("="))
        if not eq or not key or not value:
            raise SettingError(f"cannot read {item!r} in {piece!r}: expected field=value")
        if key in out:
            raise SettingError(
                f"{piece!r} says {key}={out[key]} and {key}={value}: leave one of them out"
            )
        out[key] = value
    return out


def _read_fields(
    cls: type[Method], given: dict[str, str], reserved: tuple[str, ...] = ()
) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    holder = _holder(cls)
    known = {
        f.name: hints[f.name]
        for f in dataclasses.fields(cls)
        if f.init and not (holder and f.name == holder[0])
    }
    out: dict[str, Any] = {}
    for key, value in given.items():
        try:
            kind = registry.lookup(
                f"parameter of {cls.name}", key, {**known, **dict.fromkeys(reserved, str)}
            )
        except registry.UnknownName as error:
            hint = f"; what it wraps stands in brackets: {cls.name}({value})" if holder else ""
            raise SettingError(str(error) + hint) from None
        try:
            out[key] = _read(value, kind)
        except ValueError:
            raise SettingError(
                f"{cls.name}: {key}={shown(value, 60)} is not a {getattr(kind, '__name__', kind)}"
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
    if kind in (int, float) and (not value.isascii() or "_" in value):
        return _refuse(value)  # Python reads more than people take for a number
    number = kind(value)
    return number if kind is not float or math.isfinite(number) else _refuse(value)


def _refuse(value: str) -> Any:
    raise ValueError(value)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, cast("tuple[object, ...]", value)))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _text(method: Method, budget: str = "", more: tuple[str, ...] = ()) -> str:
    """``name(held)@budget:field=value``, without what has its default."""
    holder = _holder(type(method))
    name = method.name
    fields: list[str] = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if not field.init or value == field.default:
            continue
        if holder and field.name == holder[0]:
            name += f"({_text(value)})"
        else:
            fields.append(f"{field.name}={_show(value)}")
    return name + budget + (":" + ",".join([*fields, *more]) if fields or more else "")
