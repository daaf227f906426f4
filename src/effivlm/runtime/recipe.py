"""What is asked of a prefill."""

from dataclasses import dataclass

from effivlm.methods.base import IntraLLM, KVCache, PreLLM
from effivlm.setting import Part, Setting


@dataclass(frozen=True)
class Recipe:
    """What is asked of a prefill.

    Attributes:
        before: parts before the LLM. inside: parts inside it. live: the part that compresses the
            cache, or None.
        watch: cache methods that are scored but not applied (sharing).
        branches: settings that will resume from this prefill; the layers they need are recorded.
        repack: renumber positions over what is kept.
    """

    before: tuple[Part, ...] = ()
    inside: tuple[Part, ...] = ()
    live: Part | None = None
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
        inside = () if trunk else setting.stage(IntraLLM)
        repack = setting.positions == "repack"
        return Recipe(setting.stage(PreLLM), inside, live, watch, branches, repack)

    @property
    def observers(self) -> tuple[Part, ...]:
        """Cache methods that score the prefill."""
        return tuple(dict.fromkeys([*self.watch, *([self.live] if self.live else [])]))
