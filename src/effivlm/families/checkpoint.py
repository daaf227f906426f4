"""What a checkpoint says of itself before its weights are loaded, and which family serves it."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from effivlm import registry, zoo
from effivlm.errors import shown
from effivlm.families import unserved
from effivlm.families.base import Family
from effivlm.families.fitness import LoadError
from effivlm.files.names import label_of
from effivlm.files.reading import read_json, said

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")  # of a hub


def family_of(model: nn.Module) -> Family:
    """The family that serves a model, by ``config.model_type``.

    Raises:
        LoadError: if no family does; lists those that are supported.
    """
    config: Any = model.config
    return family_named(str(config.model_type), type(model).__name__)


def family_named(model_type: str, what: str) -> Family:
    """The family that serves a model type.

    Raises:
        LoadError: if none does.
    """
    table = {t: f for f in registry.families().values() for t in f.model_types}
    if model_type in unserved.REASONS:
        why = unserved.REASONS[model_type]
        raise LoadError(f"{what} has model_type {model_type!r}, which no family serves: {why}")
    if model_type not in table:
        near = difflib.get_close_matches(model_type, table, n=2)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise LoadError(
            f"{what} has model_type {model_type!r}, which no family serves{hint}: "
            f"supported are {', '.join(sorted(table))}; see docs/adding-a-family.md"
        )
    return table[model_type]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint on this machine says of itself before its weights are loaded.

    Attributes:
        weight_bytes: of its files.
    """

    path: str | Path
    name: str
    config: Any
    family: Family
    weight_bytes: int


def checkpoint_of(name: str) -> Checkpoint:
    """A checkpoint's facts, without its weights and without a network.

    Raises:
        LoadError: if it is not here, or no family serves it.
    """
    path = zoo.located(name)
    check_folder(str(path))
    from transformers import AutoConfig
    from transformers.utils import cached_file

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        home = Path(str(cached_file(str(path), "config.json", local_files_only=True))).parent
    except Exception as error:  # whatever transformers makes of damaged or absent files
        raise LoadError(
            f"the checkpoint {shown(name)} is not on this machine or cannot be read:"
            f" {said_by(error)[:160]}; a run downloads it first"
        ) from None
    family = family_named(config.model_type, f"the checkpoint {name!r}")
    size = sum(f.stat().st_size for f in home.glob("*.safetensors"))
    return Checkpoint(path, label_of(name), config, family, size)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def check_folder(name: str) -> None:
    """Refuse a folder that holds no checkpoint of ours, and what can be no name of a hub's.

    Raises:
        LoadError: saying what is missing.
    """
    folder = Path(name)
    if not _is_folder(folder):
        if (
            folder.is_absolute() or name.startswith(".") or not _REPOSITORY.fullmatch(name)
        ):  # cannot be the name of a hub's repository
            raise LoadError(
                f"{said(folder)} is not a folder: expected a transformers checkpoint folder, or a"
                " hub id such as owner/model"
            )
        return
    if not (folder / "config.json").exists():
        raise LoadError(f"{folder} holds no config.json: expected a transformers checkpoint folder")
    config = read_json(folder / "config.json", "a model configuration", LoadError)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LoadError(
            f"{folder}/config.json names no model_type: expected a transformers checkpoint folder"
        )
    family_named(config["model_type"], f"the checkpoint {name!r}")
    if not any(folder.glob("*.safetensors")):
        raise LoadError(
            f"{folder} holds no weights: expected *.safetensors (other formats can run code and are"
            " not loaded)"
        )


def said_by(error: BaseException) -> str:
    """What a library said, on one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__
