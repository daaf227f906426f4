"""Shapes are checked here, and only here: every call of an annotated function, by beartype.

The hook must be in place before anything imports what it checks.
"""

from pathlib import Path

from jaxtyping import install_import_hook

import effivlm

SRC = Path(effivlm.__file__).parent
OPS = [f"effivlm.ops.{p.stem}" for p in SRC.glob("ops/*.py") if p.stem != "__init__"]
# kernels/ not: Triton reads the source of what it compiles
METHODS = ["effivlm.methods.base", "effivlm.methods.contexts"]
RUNTIME = [f"effivlm.runtime.{name}" for name in ("geometry", "tokens", "slots", "attention")]

install_import_hook([*OPS, *METHODS, *RUNTIME], "shapes.checked")
