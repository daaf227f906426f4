"""Changes of an experiment from the command line: ``tasks.0.documents=5``."""

from collections.abc import Sequence
from typing import Any

from effivlm.errors import shown
from effivlm.files.reading import Failure
from effivlm.files.yaml_text import parse_yaml

DEEPEST = 20  # keys of a path; an experiment has fewer


def changed(data: dict[str, Any], changes: Sequence[str], failure: Failure) -> dict[str, Any]:
    """An experiment's plain data with every ``key.path=value`` carried out; values are YAML.

    Raises:
        EffivlmError: of the kind ``failure``, for a change that cannot be read or a place that is
            not there.
    """
    for text in changes:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > DEEPEST:
            raise failure(f"--set {shown(text)}: expected key=value, such as tasks.0.documents=5")
        parsed = parse_yaml(value, f"--set {path}", "a value", failure)
        data = _with(data, keys, parsed, text, failure)
    return data


def _with(at: Any, keys: Sequence[str], value: Any, text: str, failure: Failure) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(at, list | tuple):
        if not (key.isascii() and key.isdigit()) or int(key[:9]) >= len(at):
            raise failure(
                f"--set {shown(text)}: expected a number from 0 to {len(at) - 1} in place of"
                f" {shown(key, 40)}"
            )
        number = int(key)
        return [
            _with(item, rest, value, text, failure) if i == number else item
            for i, item in enumerate(at)
        ]
    if isinstance(at, str):  # the short form of a model or a task
        at = {"name": at}
    if at is None:
        at = {}
    if not isinstance(at, dict):
        raise failure(f"--set {shown(text)}: {shown(at, 40)} has no key {shown(key, 40)}")
    return {**at, key: _with(at.get(key), rest, value, text, failure)}
