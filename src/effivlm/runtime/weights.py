"""Compressed weights: found layer by layer, swapped in for a while, and the originals back: the
same objects, bit for bit, whatever happened.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

import torch
from torch import nn

from effivlm.methods.base import Weights
from effivlm.methods.linears import Linear, NewWeight, Promise, WeightsError, pruned_share
from effivlm.ops.precision import working
from effivlm.runtime.audit import AuditError
from effivlm.runtime.host import Host, UnsupportedCall, host_of
from effivlm.runtime.passage import Passage, Sample, gather, passages
from effivlm.runtime.probes import Place, probe_scores
from effivlm.runtime.quant_linear import QuantLinear
from effivlm.runtime.scaling import scale_layer
from effivlm.runtime.swaps import Swaps
from effivlm.runtime.weight_audit import check_weight
from effivlm.setting import Part, Setting

Count = tuple[int, int, int, int]  # weights, non-zeros, bytes, bytes of the original
MARK = "_effivlm_weights"  # on a model: the part its weights are compressed by


@dataclass(frozen=True)
class WeightsAccount:
    """What the matrices of the language model's layers hold, counted in the tensors.

    Attributes:
        weights: entries of the matrices. nonzero: of them that are not 0.
        bytes: held. bytes_before: held by the original ones.
    """

    weights: int
    nonzero: int
    bytes: int
    bytes_before: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class CompressedWeights:
    """The compressed weights of one model: inside the block they are the model's, after it the
    original ones are. The block can be entered again.

    Attributes:
        part: what they were compressed by. account: what they hold.
    """

    def __init__(self, host: Host, part: Part, swaps: Swaps, account: WeightsAccount) -> None:
        self.host, self.part, self.swaps, self.account = host, part, swaps, account

    @classmethod
    def of(cls, host: Host, part: Part, swaps: Swaps, counts: Sequence[Count]) -> Self:
        """With the account of every matrix's counts."""
        total = (sum(column) for column in zip(*counts, strict=True))
        return cls(host, part, swaps, WeightsAccount(*total))

    def __enter__(self) -> Self:
        """Put the compressed weights in."""
        check_free(self.host)
        self.host.base.__dict__[MARK] = self
        self.swaps.redo()
        return self

    def __exit__(self, *exc: object) -> None:
        """Put the originals back."""
        self.swaps.undo()
        self.host.base.__dict__.pop(MARK, None)


def weights_of(host: Host) -> CompressedWeights | None:
    """What a model's weights are compressed by now."""
    return host.base.__dict__.get(MARK)


def check_weights(host: Host, setting: Setting, whole: bool = False) -> None:
    """A setting's weights are those the model has.

    Args:
        host: the model.
        setting: what is asked.
        whole: a setting without a weights method asks for the original weights.

    Raises:
        UnsupportedCall: naming both.
    """
    now, asked = weights_of(host), setting.stage(Weights)
    if whole and not asked and now is not None:
        raise UnsupportedCall(
            f"{setting} asks for the original weights, and the model's are compressed by"
            f" {now.part}: leave that block first"
        )
    if asked and (now is None or now.part != asked[0]):
        raise UnsupportedCall(
            f"{setting} asks for {asked[0]}, and the model's weights are"
            f" {now.part if now else 'the original ones'}: use compress(model, setting,"
            " calibration=...), or open compress_weights(...) around it"
        )


def check_free(host: Host) -> None:
    """Refuse a model whose weights are compressed now, or that is under a session."""
    if weights_of(host) is not None or "_effivlm_session" in host.base.__dict__:
        raise RuntimeError(
            "this model's weights are compressed, or it is under a compress() session: leave that"
            " block before opening another"
        )


@torch.no_grad()
def compress_weights(
    model: nn.Module, part: Part, samples: Sequence[Sample] = (), fast: bool = False
) -> CompressedWeights:
    """Compress the linear layers of a model's decoder; the model itself is left as it was.

    Args:
        model: a transformers vision-language model of a supported family.
        part: a weights method with its budget.
        samples: to calibrate on, for methods that read statistics.
        fast: quantized layers use torch's int4 product, where there is one.

    Raises:
        WeightsError: for layers, patterns, groups or samples that do not fit, or too little memory;
            the message says which. AuditError: for tensors that do not hold what was promised.
    """
    host = host_of(model)
    check_free(host)
    method = cast(Weights, part.method)
    linears = decoder_linears(host)
    swaps = Swaps()
    try:
        needs = reads_samples(part)
        if needs and not samples:
            raise WeightsError(
                f"{method.name} reads activations: give calibration samples (calibration=...)"
            )
        along = passages(host, samples) if needs else []
        shares = _shares(host, part, linears, along)
        counts = [
            count
            for i, layer in enumerate(host.layers)
            for count in _compress_layer(i, layer, linears[i], part, shares, along, swaps, fast)
        ]
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise WeightsError(
            f"too little memory to compress the weights by {part}: fewer or shorter calibration"
            " samples need less"
        ) from error
    finally:
        swaps.undo()
    return CompressedWeights.of(host, part, swaps, counts)


def reads_samples(part: Part) -> bool:
    """Whether a weights method needs calibration."""
    method = cast(Weights, part.method)
    return bool(method.statistics) or bool(method.probes(part.budget))


def decoder_linears(host: Host) -> list[dict[str, nn.Linear]]:
    """The linear layers of every decoder layer, by name in it.

    Raises:
        WeightsError: for a model that is quantized already, has adapters, or shares a matrix.
    """
    if getattr(host.model.config, "quantization_config", None) is not None:
        raise WeightsError(
            "this checkpoint is quantized already: load the original one, or dequantize it"
        )
    out: list[dict[str, nn.Linear]] = []
    seen: dict[int, str] = {}
    for i, layer in enumerate(host.layers):
        out.append({n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)})
        if not out[-1]:
            raise WeightsError(f"layer {i} ({type(layer).__name__}) has no linear layers")
        for name, module in out[-1].items():
            where = f"layer {i} {name}"
            if any(part in name for part in (".base_layer", ".lora_")):
                raise WeightsError(
                    f"{where} has an adapter: merge it into the weights first (merge_and_unload)"
                )
            if not module.weight.is_floating_point() or module.weight.is_meta:
                raise WeightsError(f"{where} holds {module.weight.dtype} on {module.weight.device}")
            key = id(module.weight)
            if key in seen:
                raise WeightsError(f"{where} shares its weight with {seen[key]}: untie them first")
            seen[key] = where
    return out


def _shares(
    host: Host, part: Part, linears: list[dict[str, nn.Linear]], along: list[Passage]
) -> Mapping[Place, float]:
    """The share to be pruned of every matrix."""
    method = cast(Weights, part.method)
    places = [(i, name) for i, found in enumerate(linears) for name in found]
    probes = method.probes(part.budget)
    if not probes:
        return dict.fromkeys(places, pruned_share(part.budget))
    scores = probe_scores(host, linears, along[:probes])
    sizes = {(i, name): linears[i][name].weight.numel() for i, name in places}
    return method.shares(scores, sizes, part.budget)


def _compress_layer(
    i: int,
    layer: nn.Module,
    linears: Mapping[str, nn.Linear],
    part: Part,
    shares: Mapping[Place, float],
    along: Sequence[Passage],
    swaps: Swaps,
    fast: bool,
) -> list[Count]:
    """Compress one decoder layer and stand before the next."""
    method = cast(Weights, part.method)
    ahead = [p.through(layer, i) for p in along] if method.original_inputs else []
    if along:
        scale_layer(method, layer, i, linears, along, swaps)
    statistics = gather(layer, i, linears, along, method.statistics) if along else {}
    counts: list[Count] = []
    for name, module in linears.items():
        where = f"layer {i} {name}"
        found = statistics.pop(name).found(where) if name in statistics else {}
        share = max(0.0, shares[i, name])
        linear = Linear(where, working(module.weight.detach()), share, found)
        if not bool(linear.weight.isfinite().all()):
            raise WeightsError(f"{where} holds NaN or infinity: it cannot be compressed")
        new = method.compress(linear, part.budget)
        promise = method.promise(module.out_features, module.in_features, share)
        counts.append(put_weight(layer, f"layer {i}", name, module, new, swaps, fast, promise))
    for k, passage in enumerate(along):
        passage.advance(ahead[k] if ahead else passage.through(layer, i))
    return counts


def put_weight(
    layer: nn.Module,
    at: str,
    name: str,
    module: nn.Linear,
    new: NewWeight,
    swaps: Swaps,
    fast: bool,
    promise: Promise | None = None,
) -> Count:
    """Swap a linear layer's weight, or the layer itself, and count what is there now.

    Raises:
        AuditError: if it is not what was promised.
    """
    before = swaps.original(module)
    held: nn.Module = module
    if new.codes is not None:
        bias = cast(nn.Parameter | None, module.bias)
        held = QuantLinear(new.codes, bias, module.weight.dtype, fast)
        head, _, last = name.rpartition(".")
        swaps.put(cast(Any, layer.get_submodule(head)._modules), last, held)
    else:
        weight = module.weight.detach() if new.weight is None else new.weight
        if weight.shape != module.weight.shape:
            raise AuditError(f"{at} {name}: a weight of {tuple(weight.shape)} came back")
        swaps.weight(module, weight if new.keep is None else weight.masked_fill(~new.keep, 0))
    if promise is not None:
        check_weight(f"{at} {name}", held, new, promise)
    now = cast(torch.Tensor, held.weight)
    size = held.bytes_held if isinstance(held, QuantLinear) else now.nbytes
    return now.numel(), int(now.count_nonzero()), size, before.nbytes
