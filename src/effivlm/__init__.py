"""Training-free acceleration of vision-language models: which method, what it costs in quality,
what it saves.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("effivlm")
__all__ = [
    "Audit",
    "AuditError",
    "Budget",
    "BudgetError",
    "EffivlmError",
    "Experiment",
    "LoadError",
    "Method",
    "Recommendation",
    "Result",
    "Sample",
    "Setting",
    "SettingError",
    "UnknownName",
    "Unsupported",
    "UnsupportedCall",
    "__version__",
    "compress",
    "load",
    "native_arguments",
    "parse_setting",
    "recommend",
    "report",
    "run",
    "write_report",
]

if TYPE_CHECKING:
    from effivlm.budget import Budget, BudgetError
    from effivlm.config import Experiment
    from effivlm.errors import EffivlmError
    from effivlm.families.loading import LoadError, load
    from effivlm.methods.base import Method
    from effivlm.native import native_arguments
    from effivlm.recommendation import Recommendation, recommend
    from effivlm.registry import UnknownName
    from effivlm.report.write import write as write_report
    from effivlm.result import Result, run
    from effivlm.runtime.account import Audit
    from effivlm.runtime.audit import AuditError
    from effivlm.runtime.entrance import compress
    from effivlm.runtime.host import UnsupportedCall
    from effivlm.runtime.passage import Sample
    from effivlm.runtime.support import Unsupported
    from effivlm.setting import Setting, SettingError, parse_setting

_HOMES = {
    "Audit": ("effivlm.runtime.account", "Audit"),
    "AuditError": ("effivlm.runtime.audit", "AuditError"),
    "Budget": ("effivlm.budget", "Budget"),
    "BudgetError": ("effivlm.budget", "BudgetError"),
    "EffivlmError": ("effivlm.errors", "EffivlmError"),
    "Experiment": ("effivlm.config", "Experiment"),
    "LoadError": ("effivlm.families.loading", "LoadError"),
    "Method": ("effivlm.methods.base", "Method"),
    "Sample": ("effivlm.runtime.passage", "Sample"),
    "Setting": ("effivlm.setting", "Setting"),
    "SettingError": ("effivlm.setting", "SettingError"),
    "UnknownName": ("effivlm.registry", "UnknownName"),
    "Unsupported": ("effivlm.runtime.support", "Unsupported"),
    "UnsupportedCall": ("effivlm.runtime.host", "UnsupportedCall"),
    "compress": ("effivlm.runtime.entrance", "compress"),
    "load": ("effivlm.families.loading", "load"),
    "native_arguments": ("effivlm.native", "native_arguments"),
    "parse_setting": ("effivlm.setting", "parse_setting"),
    "write_report": ("effivlm.report.write", "write"),
    "Recommendation": ("effivlm.recommendation", "Recommendation"),
    "Result": ("effivlm.result", "Result"),
    "recommend": ("effivlm.recommendation", "recommend"),
    "run": ("effivlm.result", "run"),
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `effivlm --help` need not wait for torch."""
    import importlib

    if name == "report":  # a package that can be called, see there
        return importlib.import_module("effivlm.report")
    if name not in _HOMES:
        raise AttributeError(f"module 'effivlm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """The public names, whether imported yet or not."""
    return sorted({*globals(), *__all__})
