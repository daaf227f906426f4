"""Scales that move from a layer's activations into its weights: which linear layers read one
tensor, who makes it, and the exchange.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effivlm.methods.base import Weights
from effivlm.methods.linears import Readers
from effivlm.ops.precision import working
from effivlm.runtime.passage import Passage
from effivlm.runtime.swaps import Swaps, weights_for_now

AFTER = {"up_proj": "down_proj", "v_proj": "o_proj"}  # a factor of one's output is one of the next


@dataclass(frozen=True)
class Group:
    """Linear layers that read what ``maker`` makes.

    Attributes:
        names: of the linear layers. maker: a norm or a linear layer. around: the smallest module
            that holds them all, by its name in the decoder layer ("" is the layer itself).
    """

    names: tuple[str, ...]
    maker: nn.Module
    around: str


def scale_layer(
    method: Weights,
    layer: nn.Module,
    i: int,
    linears: Mapping[str, nn.Linear],
    along: Sequence[Passage],
    swaps: Swaps,
) -> None:
    """Let a method scale what the linear layers of decoder layer i read, group by group."""
    if type(method).scale is Weights.scale:
        return
    for group in _groups(layer, i, linears, along[0]):
        readers = [linears[n] for n in group.names]
        calls, mean = _calls(layer, i, group, readers[0], along)
        inner = layer.get_submodule(group.around)

        @torch.no_grad()
        def loss(
            new: list[Tensor],
            inner: nn.Module = inner,
            calls: list[tuple[Any, Any, Tensor]] = calls,
            readers: Sequence[nn.Module] = readers,
        ) -> float:
            with weights_for_now(list(readers), new):
                errors = [(_first(inner(*a, **k)) - y).pow(2).sum() for a, k, y in calls]
            return float(sum(float(e) for e in errors)) / sum(y.numel() for *_, y in calls)

        weights = [working(m.weight.detach()) for m in readers]
        scale = method.scale(Readers(weights, mean, loss))
        if scale is not None and _divide(group.maker, scale, swaps):
            for module, weight in zip(readers, weights, strict=True):
                swaps.weight(module, weight * scale)


def _groups(
    layer: nn.Module, i: int, linears: Mapping[str, nn.Linear], passage: Passage
) -> Iterator[Group]:
    """Groups in the order they run, seen on one sample: a tensor is known by being the same
    object.
    """
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    read: dict[int, tuple[Tensor, list[str]]] = {}  # tensors are held: an id is not used again
    norms = [m for m in layer.modules() if _is_norm(m)]
    with ExitStack() as stack:
        for norm in norms:

            def make(module: nn.Module, args: Any, output: Tensor) -> None:
                made[id(output)] = module, output

            stack.callback(norm.register_forward_hook(make).remove)
        for name, module in linears.items():

            def see(module: nn.Module, args: Any, name: str = name) -> None:
                read.setdefault(id(args[0]), (args[0], []))[1].append(name)

            stack.callback(module.register_forward_pre_hook(see).remove)
        passage.through(layer, i)
    for key, (_, names) in read.items():
        if key in made:
            yield Group(tuple(names), made[key][0], _around(names))
        else:
            yield from _chained(names[0], linears)


def _chained(name: str, linears: Mapping[str, nn.Linear]) -> Iterator[Group]:
    """A linear layer that reads another's output, channel by channel, times something."""
    head, _, last = name.rpartition(".")
    for before, after in AFTER.items():
        maker = linears.get(f"{head}.{before}" if head else before)
        if last == after and maker is not None and maker.out_features == linears[name].in_features:
            yield Group((name,), maker, name)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


def _around(names: Sequence[str]) -> str:
    """The longest common path."""
    if len(names) == 1:
        return names[0]
    paths = [n.split(".")[:-1] for n in names]
    common = paths[0]
    for path in paths:
        common = [a for a, b in zip(common, path) if a == b]
    return ".".join(common)


def _calls(
    layer: nn.Module, i: int, group: Group, reader: nn.Module, along: Sequence[Passage]
) -> tuple[list[tuple[Any, Any, Tensor]], Tensor]:
    """What the module around a group is called with and gives, for every sample; and the mean |x|
    of the group's input.
    """
    calls: list[tuple[Any, Any, Tensor]] = []
    sums: list[tuple[Tensor, int]] = []

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, _first(output)))

    def read(module: nn.Module, args: Any) -> None:
        x = working(args[0]).flatten(0, -2)
        sums.append((x.abs().sum(0), len(x)))

    inner = layer.get_submodule(group.around)
    with ExitStack() as stack:
        stack.callback(inner.register_forward_hook(see, with_kwargs=True).remove)
        stack.callback(reader.register_forward_pre_hook(read).remove)
        for passage in along:
            passage.through(layer, i)
    total = sum(n for _, n in sums)
    return calls, torch.stack([s for s, _ in sums]).sum(0) / total


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _divide(maker: nn.Module, scale: Tensor, swaps: Swaps) -> bool:
    """Divide what a module makes by ``scale``; False where its weight does not do that."""
    weight = working(maker.weight.detach())  # type: ignore[operator, union-attr]
    if isinstance(maker, nn.Linear):
        swaps.weight(maker, weight / scale[:, None])
        if maker.bias is not None:
            old = maker.bias
            new = nn.Parameter((working(old.detach()) / scale).to(old.dtype), old.requires_grad)
            swaps.put(maker._parameters, "bias", new)  # type: ignore[arg-type]
        return True
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=g).to(weight)
    before = maker(x.to(maker.weight.dtype)) / scale  # type: ignore[operator, union-attr]
    for one in (0.0, 1.0):  # some norms multiply by 1 + weight
        new = (weight + one) / scale - one
        with weights_for_now([maker], [new]):
            after = maker(x.to(maker.weight.dtype))  # type: ignore[operator, union-attr]
        if bool((after - before).abs().max() <= 0.02 * before.abs().max()):
            swaps.weight(maker, new)
            return True
    return False
