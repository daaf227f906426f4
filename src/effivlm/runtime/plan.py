"""The prefix tree of settings and its execution: vision encoding, prefill and early layers run once
per document.

document ─ encoder group (what happens in the encoder) ─ trunk (what is cut before the LLM)
─ branch (what is cut inside: resumed from its first cut) ─ leaf (the cache: a fork) ─ decode
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from effivlm.errors import EffivlmError
from effivlm.methods.base import (
    EncoderReducer,
    IntraLLM,
    KVCache,
    KVFormat,
    Method,
    PreEncoder,
    PreLLM,
)
from effivlm.methods.signals import Signal
from effivlm.runtime import generate
from effivlm.runtime.audit import Account
from effivlm.runtime.cache import slot_layers
from effivlm.runtime.generate import Generated, Prefilled
from effivlm.runtime.session import Session
from effivlm.runtime.trace import PromptTrace, traces
from effivlm.runtime.vision import ENCODER_SIGNALS
from effivlm.runtime.weights import check_weights
from effivlm.setting import Part, Setting

Leaf = tuple[Setting, Prefilled]


class NotANumber(EffivlmError, ArithmeticError):
    """What a model computed holds NaN, so no answer can be read from it."""


@dataclass(frozen=True)
class Outcome:
    """What one setting did on one document: answer, cost and, where asked for, the trace; or the
    error that stopped it.
    """

    setting: Setting
    generated: Generated | None
    account: Account | None
    error: Exception | None = None
    trace: PromptTrace | None = None


@dataclass(frozen=True)
class Trunk:
    """Settings that share everything up to the LLM's first layer."""

    setting: Setting
    leaves: tuple[Setting, ...]


def tree(settings: Sequence[Setting]) -> dict[tuple[Part, ...], list[Trunk]]:
    """Encoder group -> trunks; the order of the settings is kept within each."""
    groups: dict[tuple[Part, ...], dict[Setting, list[Setting]]] = {}
    for setting in settings:
        encoder = _parts(setting, PreEncoder, EncoderReducer)
        trunk = Setting(_parts(setting, PreEncoder, EncoderReducer, PreLLM), setting.positions)
        groups.setdefault(encoder, {}).setdefault(trunk, []).append(setting)
    return {
        e: [Trunk(t, tuple(leaves)) for t, leaves in trunks.items()] for e, trunks in groups.items()
    }


def grouped(
    settings: Iterable[Setting], stage: type[Method]
) -> dict[tuple[Part, ...], list[Setting]]:
    """Settings by their parts at a stage, those without first; the order is kept within each."""
    groups: dict[tuple[Part, ...], list[Setting]] = {(): []}
    for setting in settings:
        groups.setdefault(setting.stage(stage), []).append(setting)
    return {parts: some for parts, some in groups.items() if some}


def _parts(setting: Setting, *stages: Any) -> tuple[Part, ...]:
    return tuple(p for p in setting.parts if not p.full and any(p.at(s) for s in stages))


class Plan:
    """Runs many settings over documents, sharing what they share.

    Args:
        model: a transformers vision-language model. settings: what to compare.
        width: how many answers are decoded side by side. keep: trace the visual tokens.

    Raises:
        Unsupported: at once, if a setting cannot apply to the model's family.
    """

    def __init__(
        self, model: nn.Module, settings: Sequence[Setting], width: int = 16, keep: bool = False
    ) -> None:
        self.settings, self.width, self.keep = tuple(settings), width, keep
        self.decoder = Session(model, Setting(()))
        self.encoders: list[tuple[Session, list[tuple[Session, Trunk]]]] = []
        for parts, trunks in tree(self.settings).items():
            sessions = [(self._trunk(model, t), t) for t in trunks]
            signals = frozenset(s for t in trunks for x in t.leaves for s in _encoder_signals(x))
            self.encoders.append(
                (Session(model, Setting(parts), trunk=True, signals=signals), sessions)
            )

    @staticmethod
    def _trunk(model: nn.Module, trunk: Trunk) -> Session:
        for leaf in trunk.leaves:
            Session(model, leaf)  # refuses what the family cannot do before anything runs
        return Session(
            model,
            trunk.setting,
            trunk=True,
            watch=_caches(trunk.leaves),
            branches=[x for x in trunk.leaves if x.stage(IntraLLM)],
        )

    def run(self, inputs: Mapping[str, Any], limit: int, stop: Sequence[int]) -> Iterable[Outcome]:
        """Answer one document under every setting; errors are outcomes, not exceptions.

        Args:
            inputs: one prompt, as the processor gave it.
            limit: new tokens at most.
            stop: ids that end an answer.

        Raises:
            UnsupportedCall: if the model's weights are not those of all settings.
        """
        for setting in self.settings:
            check_weights(self.decoder.host, setting, whole=True)
        waiting: dict[tuple[Part, ...], list[Leaf]] = {}  # those stored alike decode together
        for encoder, trunks in self.encoders:
            leaves = [leaf for _, t in trunks for leaf in t.leaves]
            try:
                with encoder:
                    encoded = generate.encode(encoder, inputs)
            except Exception as error:  # recorded as this document's failure under these settings
                yield from (Outcome(s, None, None, error) for s in leaves)
                continue
            for session, trunk in trunks:
                for setting, done in self._leaves(session, trunk, inputs, encoded):
                    if isinstance(done, Exception):
                        yield Outcome(setting, None, None, done)
                        continue
                    alike = waiting.setdefault(setting.stage(KVFormat), [])
                    alike.append((setting, done))
                    if len(alike) == self.width:
                        yield from self._decode(waiting.pop(setting.stage(KVFormat)), limit, stop)
        for leaves in waiting.values():
            yield from self._decode(leaves, limit, stop)

    def _leaves(
        self, session: Session, trunk: Trunk, inputs: Mapping[str, Any], encoded: Any
    ) -> Iterable[tuple[Setting, Any]]:
        """Every leaf's compressed prefill, or the exception that stopped it."""
        try:
            with session:
                base = generate.prefill(session, inputs, encoded)
                branches: dict[tuple[Part, ...], list[Setting]] = {}
                for leaf in trunk.leaves:
                    branches.setdefault(leaf.stage(IntraLLM), []).append(leaf)
                out: list[tuple[Setting, Any]] = []
                for parts, leaves in branches.items():
                    out += self._branch(session, base, parts, leaves)
        except Exception as error:
            return [(leaf, error) for leaf in trunk.leaves]
        return out

    @staticmethod
    def _branch(
        session: Session, base: Prefilled, parts: tuple[Part, ...], leaves: list[Setting]
    ) -> list[tuple[Setting, Any]]:
        try:
            done = generate.resume(session, base, leaves[0], _caches(leaves)) if parts else base
        except Exception as error:
            return [(leaf, error) for leaf in leaves]
        out: list[tuple[Setting, Any]] = []
        for leaf in leaves:
            try:
                live, form = (next(iter(leaf.stage(s)), None) for s in (KVCache, KVFormat))
                made = generate.compress(session, done, live, form)
                out.append((leaf, _numbers(made)))
            except Exception as error:
                out.append((leaf, error))
        return out

    def _decode(self, waiting: list[Leaf], limit: int, stop: Sequence[int]) -> list[Outcome]:
        found = [traced(done) if self.keep else None for _, done in waiting]
        try:
            with self.decoder:
                answers = generate.decode(self.decoder, [done for _, done in waiting], limit, stop)
        except Exception as error:
            return [Outcome(s, None, None, error) for s, _ in waiting]
        return [
            Outcome(s, a, d.accounts[0], trace=t)
            for (s, d), a, t in zip(waiting, answers, found, strict=True)
        ]


def traced(done: Prefilled) -> PromptTrace:
    """The trace of a prompt and of its compressed cache."""
    slots = slot_layers(done.cache)
    return traces(done.state.prompt, [(x.index, x.valid) for x in slots], done.state.layers)[0]


def _numbers(done: Prefilled) -> Prefilled:
    """The prefill, if its logits are numbers: an answer read from NaN would be a wrong answer."""
    if bool(done.logits.isnan().any()):
        raise NotANumber(
            "the model computed NaN: its weights are damaged, or its dtype overflows (try float32"
            " or bfloat16)"
        )
    return done


def _caches(settings: Sequence[Setting]) -> list[Part]:
    return list(dict.fromkeys(p for s in settings for p in s.stage(KVCache)))


def _encoder_signals(setting: Setting) -> list[Signal]:
    return [
        s
        for p in setting.parts
        if not p.full
        for s in p.method.signals
        if isinstance(s, ENCODER_SIGNALS)
    ]
