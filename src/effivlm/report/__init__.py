"""Tables, figures and a page, from records only; `effivlm.report(folder)` writes them."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _Report(ModuleType):
    """A package that can be called, so that `effivlm.report` is both."""

    def __call__(self, folder: str | Path) -> Any:
        """See `effivlm.result.report`."""
        from effivlm.result import report

        return report(folder)


sys.modules[__name__].__class__ = _Report
