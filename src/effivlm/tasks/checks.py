"""What a task's file and its rows must be: types and counts, each mistake with its place."""

import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effivlm.errors import shown
from effivlm.files.reading import Failure

KEYS = {"name", "version", "prompt", "metric", "max_new_tokens", "stands_for", "rows", "generator"}
LONGEST_PROMPT = 1_000_000  # characters; no model takes so many, and a tokenizer would take minutes
MOST_TOKENS = 100_000  # of an answer
TEXTS = ("name", "prompt", "metric", "rows", "stands_for")


def check_task(spec: Any, folder: Path, failure: Failure) -> dict[str, Any]:
    """The content of a ``task.yaml``, if its keys and their types are right.

    Raises:
        EffivlmError: of the kind ``failure``, naming the key.
    """
    place = f"{folder}/task.yaml"
    if not isinstance(spec, dict) or not {"name", "prompt", "metric"} <= set(spec):
        raise failure(f"{place}: expected the keys name, prompt, metric and rows or generator")
    unknown = sorted(str(k) for k in set(spec) - KEYS)
    if unknown:
        raise failure(
            f"{place}: unknown key(s) {', '.join(unknown)[:200]}; known: {', '.join(sorted(KEYS))}"
        )
    if ("rows" in spec) == ("generator" in spec):
        raise failure(f"{place}: expected either rows or generator")
    for key in TEXTS:
        if key in spec and not isinstance(spec[key], str):
            raise failure(f"{place}: {key}: expected a text, got {shown(spec[key], 60)}")
    _check_name(spec["name"], place, failure)
    _check_template(spec["prompt"], place, failure)
    for key, least, most in (("version", 0, 10**9), ("max_new_tokens", 1, MOST_TOKENS)):
        value = spec.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise failure(
                f"{place}: {key}: expected a whole number from {least} to {most}, got"
                f" {shown(value, 60)}"
            )
    _check_generator(spec.get("generator", {"count": 1}), place, failure)
    return spec


def _check_name(name: str, place: str, failure: Failure) -> None:
    wrong = [c for c in name if c in "/\\:" or not c.isprintable()]
    if wrong or not name.strip() or name.startswith(".") or len(name.encode()) > 80:
        raise failure(
            f"{place}: name: expected 1 to 80 characters without / \\ : and no leading dot (it"
            f" names a file), got {shown(name, 60)}"
        )


def _check_template(prompt: str, place: str, failure: Failure) -> None:
    """Fields in braces and no more: a format such as ``:>99999999999`` would fill the memory."""
    if not prompt.strip():
        raise failure(
            f"{place}: prompt: expected a text such as '{{question}}', got {shown(prompt)}"
        )
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise failure(f"{place}: the prompt {shown(prompt)} cannot be filled in: {error}") from None
    for _, field, form, conversion in parts:
        if field is not None and (form or conversion or "." in field or not field):
            raise failure(
                f"{place}: the prompt {shown(prompt)} cannot be filled in: expected fields of the"
                f" rows in braces, got {shown('{' + field + '}', 60)}; write {{{{ and }}}} for"
                " braces"
            )


def _check_generator(given: Any, place: str, failure: Failure) -> None:
    if not isinstance(given, Mapping):
        raise failure(f"{place}: generator: expected keys task and count, got {shown(given, 60)}")
    for key, least in (("count", 1), ("first", 0)):
        value = given.get(key, 1)
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not least <= value <= MOST_TOKENS
        ):
            raise failure(
                f"{place}: generator: {key}: expected a whole number from {least} to"
                f" {MOST_TOKENS}, got {shown(value, 60)}"
            )


def check_ids(ids: Sequence[str], folder: Path, failure: Failure) -> None:
    """Refuse two rows of one id, and a task of none."""
    if not ids:
        raise failure(f"{folder} holds no rows: expected at least one")
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise failure(
                f"{folder}: two rows have the id {shown(name, 60)}: ids must differ, for answers"
                " are found by them"
            )
        seen.add(name)


def identity(row: Mapping[str, Any], number: int, place: str, failure: Failure) -> str:
    """A row's id, or its number where it has none."""
    value = row.get("id", number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise failure(
            f"{place}: id: expected a text or a whole number, got {shown(value, 60)}; leave it out"
            " to count rows"
        )
    text = str(value)
    if not 1 <= len(text) <= 1000:
        raise failure(f"{place}: id: expected 1 to 1000 characters, got {shown(text, 60)}")
    return text


def references(answers: Any, place: str, failure: Failure) -> tuple[str, ...]:
    """A row's accepted answers as texts."""
    if isinstance(answers, str | bytes) or not isinstance(answers, Sequence):
        raise failure(
            f"{place}: answers is one value: give a list, or name the field answer (got"
            f" {shown(answers, 60)})"
        )
    if not answers:
        raise failure(f"{place}: answers is empty: expected at least one accepted answer")
    for i, value in enumerate(answers):
        endless = isinstance(value, float) and not math.isfinite(value)
        if endless or isinstance(value, bool) or not isinstance(value, str | int | float):
            raise failure(
                f"{place}: answer {i + 1}: expected a text or a number, got {shown(value, 60)}"
            )
    if not any(str(value).strip() for value in answers):
        raise failure(
            f"{place}: answers: expected a text with a word in it, got {shown(answers, 60)}"
        )
    return tuple(map(str, answers))


def pictures(images: Any, place: str, failure: Failure) -> list[Any]:
    """A row's images: paths, bytes, ``{bytes: ...}`` or functions that draw."""
    if isinstance(images, str | bytes | dict) or not isinstance(images, Sequence):
        raise failure(
            f"{place}: images is one value: give a list, or name the field image (got"
            f" {shown(images, 60)})"
        )
    for i, image in enumerate(images):
        if isinstance(image, str | bytes) or callable(image):
            continue
        if not isinstance(image, dict) or not isinstance(image.get("bytes"), str | bytes):
            raise failure(
                f"{place}: image {i + 1}: expected a path or {{bytes: base64}}, got"
                f" {shown(image, 60)}"
            )
    return list(images)


def check_prompt(prompt: str, place: str, failure: Failure) -> str:
    """A filled-in prompt, if its length is one that a model could take."""
    if len(prompt) > LONGEST_PROMPT:
        raise failure(
            f"{place}: its prompt has {len(prompt)} characters: expected {LONGEST_PROMPT} at most"
        )
    return prompt
