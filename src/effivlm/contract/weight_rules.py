"""The rules of weights methods: a method's name and a family's name in, ContractError out."""

import functools

import torch
from torch import Tensor

from effivlm import registry
from effivlm.contract.twin import generate, require
from effivlm.families.tiny import build, prompt
from effivlm.methods.base import Weights
from effivlm.runtime.passage import Sample
from effivlm.runtime.plan import Plan
from effivlm.runtime.session import Session
from effivlm.runtime.weights import CompressedWeights, compress_weights
from effivlm.setting import parse_setting

FIELDS = {"group": "group=16", "n_grid": "n_grid=3", "samples": "samples=1"}  # of tiny models


def is_weights(name: str) -> bool:
    """Whether a method compresses weights."""
    return issubclass(registry.methods()[name], Weights)


def weights_text(name: str, share: float = 0.5) -> str:
    """The method's setting on a tiny model."""
    cls = registry.methods()[name]
    fields = ",".join(FIELDS[f] for f in FIELDS if f in cls.__dataclass_fields__)
    budget = "" if cls.budget == "none" else f"@{share}"
    return f"{name}{budget}" + (f":{fields}" if fields else "")


@functools.lru_cache(maxsize=1)
def _found(name: str, family: str) -> CompressedWeights:
    samples = [Sample(prompt(family, 1, seed=seed), answer=3) for seed in (1, 2)]
    return compress_weights(build(family), parse_setting(weights_text(name)).parts[0], samples)


def promise_is_kept_and_something_changes(name: str, family: str) -> None:
    """Counts were audited on the way; the account says what is held, and logits differ."""
    found, model, inputs = _found(name, family), build(family), prompt(family, 1)
    plain = model(**inputs).logits
    with found:
        moved = float((model(**inputs).logits - plain).abs().max())
    account = found.account
    require(moved > 1e-4, "compressed weights change nothing")
    smaller = account.bytes < account.bytes_before or account.nonzero < account.weights
    require(smaller, f"nothing is smaller: {account}")


def originals_come_back(name: str, family: str) -> None:
    """The same objects with the same bits, also after an exception; the block opens again."""
    found, model = _found(name, family), build(family)
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    for _ in range(2):
        try:
            with found:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        now = dict(model.named_parameters())
        require(list(now) == list(before), "parameters have other names or another order")
        for key, (old, bits) in before.items():
            require(now[key] is old and torch.equal(old, bits), f"{key} is not what it was")


def only_decoder_layers_change(name: str, family: str) -> None:
    """Encoder, projector, embeddings and head keep their own parameters inside the block."""
    found, model = _found(name, family), build(family)
    inside = {id(p) for layer in found.host.layers for p in layer.parameters()}
    others = {n: p for n, p in model.named_parameters() if id(p) not in inside}
    with found:
        now: dict[str, Tensor] = dict(model.named_parameters())
        for key, parameter in others.items():
            require(now.get(key) is parameter, f"{key} was changed: it is outside the decoder")


def combines_with_tokens_and_cache(name: str, family: str) -> None:
    """With a cut before the LLM, one inside and a cache method, shared equals separate."""
    found, model, inputs = _found(name, family), build(family), prompt(family, 1)
    others = ("", " + random_pre@0.5 + fastv@0.5:layer=1 + snapkv@0.5", " + random_kv@0.5")
    settings = [parse_setting(weights_text(name) + more) for more in others]
    with found:
        shared = {o.setting: o for o in Plan(model, settings).run(inputs, 3, [])}
    for setting in settings:
        with Session(model, setting, weights=found):
            tokens = generate(model, inputs, 3)[0]
        outcome = shared[setting]
        require(outcome.generated is not None, f"{setting} failed when shared: {outcome.error}")
        assert outcome.generated is not None
        same = outcome.generated.tokens == tokens[0].tolist()
        require(same, f"{setting} gives other tokens when shared")
