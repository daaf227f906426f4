"""Compressed weights on disk: found once, used again, on the model they were found for."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effivlm.methods.base import Weights
from effivlm.methods.linears import NewWeight, WeightsError
from effivlm.ops.grid import Codes
from effivlm.runtime.host import Host, host_of
from effivlm.runtime.quant_linear import QuantLinear
from effivlm.runtime.swaps import Swaps
from effivlm.runtime.weights import CompressedWeights, check_free, decoder_linears, put_weight
from effivlm.setting import Part

FORMAT = "effivlm-weights-1"


def save_weights(
    compressed: CompressedWeights, path: Path, made_by: Mapping[str, Any] | None = None
) -> None:
    """Write compressed weights: masks where what stays is as it was, codes, or new weights.

    Args:
        compressed: outside its block.
        path: of the file.
        made_by: plain data on the calibration.
    """
    host, tensors = compressed.host, dict[str, Tensor]()
    with compressed:
        for where, module in _places(host):
            if isinstance(module, QuantLinear):
                codes = module.codes
                tensors |= {f"{where}.codes": codes.codes, f"{where}.zero": codes.zero}
                tensors[f"{where}.scale"] = codes.scale.to(torch.bfloat16)
                if module.bias is not None:
                    tensors[f"{where}.bias"] = module.bias
            elif module.weight is not compressed.swaps.original(module):
                new, old = cast(Tensor, module.weight), compressed.swaps.original(module)
                keep = new != 0
                same = isinstance(module, nn.Linear) and torch.equal(new, old * keep)
                tensors[f"{where}.keep" if same else f"{where}.weight"] = keep if same else new
                if getattr(module, "bias", None) is not None:
                    tensors[f"{where}.bias"] = cast(Tensor, module.bias)
    about = {
        "format": FORMAT,
        "part": str(compressed.part),
        "model": fingerprint(host),
        "made_by": json.dumps(dict(made_by or {})),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.detach().contiguous() for k, t in tensors.items()}, path, about)


def fingerprint(host: Host) -> str:
    """Of the decoder's original matrices: their shapes, and some of their numbers."""
    digest = hashlib.sha256()
    for i, linears in enumerate(decoder_linears(host)):
        for name, module in linears.items():
            some = module.weight.detach().flatten()[:: max(1, module.weight.numel() // 64)]
            digest.update(f"{i}.{name}{tuple(module.weight.shape)}".encode())
            digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def load_weights(model: nn.Module, part: Part, path: Path, fast: bool = False) -> CompressedWeights:
    """Weights that were compressed before, for the same model and part.

    Raises:
        WeightsError: if the file cannot be read, or is of another part or model.
    """
    host, swaps = host_of(model), Swaps()
    check_free(host)
    about, tensors = _read(path)
    for what, found, want in (
        ("compressed by", about.get("part"), str(part)),
        ("of a model with the fingerprint", about.get("model"), fingerprint(host)),
    ):
        if found != want:
            raise WeightsError(f"{path} holds weights {what} {found}, and {want} is asked for")
    method, counts = cast(Weights, part.method), list[tuple[int, int, int, int]]()
    try:
        for i, linears in enumerate(decoder_linears(host)):
            for name, module in linears.items():
                _bias(module, tensors.get(f"{i}.{name}.bias"), swaps)
                new = _new(f"{i}.{name}", tensors, getattr(method, "bits", 0))
                counts.append(
                    put_weight(host.layers[i], f"layer {i}", name, module, new, swaps, fast)
                )
            for name, module in host.layers[i].named_modules():
                if f"{i}.{name}.weight" in tensors and name not in linears:
                    swaps.weight(module, tensors[f"{i}.{name}.weight"])
                    _bias(module, tensors.get(f"{i}.{name}.bias"), swaps)
    finally:
        swaps.undo()
    return CompressedWeights.of(host, part, swaps, counts)


def _bias(module: nn.Module, new: Tensor | None, swaps: Swaps) -> None:
    if new is not None:
        old = cast(nn.Parameter, module.bias)
        made = nn.Parameter(new.to(old), requires_grad=old.requires_grad)
        swaps.put(cast(Any, module._parameters), "bias", made)


def _new(where: str, tensors: Mapping[str, Tensor], bits: int) -> NewWeight:
    if f"{where}.codes" in tensors:
        codes, scale = tensors[f"{where}.codes"], tensors[f"{where}.scale"].float()
        group = codes.shape[1] // scale.shape[1]
        return NewWeight(codes=Codes(codes, scale, tensors[f"{where}.zero"], group, bits))
    return NewWeight(weight=tensors.get(f"{where}.weight"), keep=tensors.get(f"{where}.keep"))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as compressed weights: {error}") from None
    if about.get("format") != FORMAT:
        raise WeightsError(f"{path} is no file of compressed weights: write one with `calibrate`")
    return about, tensors


def _places(host: Host) -> list[tuple[str, nn.Module]]:
    """Modules of the decoder layers that hold a weight."""
    return [
        (f"{i}.{name}", m)
        for i, layer in enumerate(host.layers)
        for name, m in layer.named_modules()
        if isinstance(m, QuantLinear) or "weight" in m._parameters
    ]
