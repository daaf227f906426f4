"""The public names, lists that need not wait, errors of one family."""

import subprocess
import sys

import effivlm
from effivlm import outline, registry
from effivlm.catalogue import stages_of
from effivlm.errors import EffivlmError


def test_public_names_are_listed_and_importable():
    assert set(effivlm.__all__) <= set(dir(effivlm))
    for name in effivlm.__all__:
        assert getattr(effivlm, name) is not None, name


def test_every_error_of_ours_has_one_base():
    """So that a caller can catch what this package raises on purpose."""
    import importlib
    import pkgutil

    ours = set()
    for info in pkgutil.walk_packages(effivlm.__path__, "effivlm."):
        if any(part in info.name for part in (".kernels", ".zoo.training", ".lmms")):
            continue  # need a GPU compiler or another package
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, type) and issubclass(value, Exception):
                if value.__module__.startswith("effivlm"):
                    ours.add(value)
    private = {"Peeked", "UndeclaredSignal"}  # a signal inside the runtime; a programming error
    assert {c.__name__ for c in ours if not issubclass(c, EffivlmError)} <= private


def test_the_outline_is_the_registry():
    """Reading the source gives what importing it gives."""
    want = {
        name: (stages_of(cls), (cls.__doc__ or "").strip().splitlines()[0])
        for name, cls in registry.methods().items()
    }
    assert outline.methods() == want


def test_listing_methods_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom effivlm.cli import app\n"
        "try:\n    app(['list', 'methods'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "snapkv" in done.stdout
