"""What is asked of a prefill, and what it records for those that resume from it."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from effivlm.methods.base import IntraLLM, KVCache, KVFormat, PreLLM
from effivlm.methods.signals import ThresholdCounts
from effivlm.runtime.attention import AttentionCall
from effivlm.setting import Part, Setting


@dataclass(frozen=True)
class Recipe:
    """What is asked of a prefill.

    Attributes:
        before: parts before the LLM. inside: parts inside it. live: the part that compresses the
            cache, or None. form: the part that says how it is stored, or None.
        watch: cache methods that are scored but not applied (sharing).
        branches: settings that will resume from this prefill; the layers they need are recorded.
        repack: renumber positions over what is kept.
    """

    before: tuple[Part, ...] = ()
    inside: tuple[Part, ...] = ()
    live: Part | None = None
    form: Part | None = None
    watch: tuple[Part, ...] = ()
    branches: tuple[Setting, ...] = ()
    repack: bool = False

    @staticmethod
    def of(
        setting: Setting,
        trunk: bool = False,
        watch: tuple[Part, ...] = (),
        branches: tuple[Setting, ...] = (),
    ) -> "Recipe":
        """A setting's; ``trunk`` leaves out what happens inside the LLM and to the cache."""
        live = None if trunk else next(iter(setting.stage(KVCache)), None)
        form = None if trunk else next(iter(setting.stage(KVFormat)), None)
        inside = () if trunk else setting.stage(IntraLLM)
        repack = setting.positions == "repack"
        return Recipe(setting.stage(PreLLM), inside, live, form, watch, branches, repack)

    @functools.cached_property
    def observers(self) -> tuple[Part, ...]:
        """Cache methods that score the prefill."""
        return tuple(dict.fromkeys([*self.watch, *([self.live] if self.live else [])]))

    @functools.cached_property
    def thresholds(self) -> tuple[float, ...]:
        """What they compare attention with (`ThresholdCounts`)."""
        signals = {s for part in self.observers for s in part.method.signals}
        return tuple(sorted(s.p for s in signals if isinstance(s, ThresholdCounts)))


@dataclass(frozen=True)
class Recorded:
    """What resuming at a layer needs: its input (at the first cut of some branch), the keyword
    arguments it was called with, the attention call of the layer before.
    """

    hidden: Tensor | None
    kwargs: dict[str, Any]
    call: AttentionCall | None
