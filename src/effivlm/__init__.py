"""Training-free acceleration of vision-language models: which method, what it costs in quality,
what it saves.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("effivlm")
__all__ = ["Experiment", "__version__", "compress", "load", "report", "run"]

if TYPE_CHECKING:
    from effivlm.config import Experiment
    from effivlm.experiment import run
    from effivlm.families.loading import load
    from effivlm.report.write import write as report
    from effivlm.runtime.session import compress

_HOMES = {
    "Experiment": ("effivlm.config", "Experiment"),
    "compress": ("effivlm.runtime.session", "compress"),
    "load": ("effivlm.families.loading", "load"),
    "report": ("effivlm.report.write", "write"),
    "run": ("effivlm.experiment", "run"),
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `effivlm --help` need not wait for torch."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'effivlm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
