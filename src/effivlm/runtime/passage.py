"""Calibration samples on their way through the decoder, one layer at a time.

A sample goes through the whole model once, which shows what every layer is called with and what is
added between layers; from then on each layer runs alone, on what the layers before it give now.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effivlm.methods.linears import HESSIAN, SQUARES, TOKENS, WeightsError
from effivlm.ops.precision import working
from effivlm.runtime.host import Host

MOST_TOKENS = 512  # inputs of a layer that are kept as they are, over all samples


@dataclass(frozen=True)
class Sample:
    """One prompt to calibrate on.

    Attributes:
        inputs: a model's inputs, as the processor gives them, batch 1.
        answer: tokens at the end that answer the prompt; 0: not known.
    """

    inputs: Mapping[str, Any]
    answer: int = 0


@dataclass
class Passage:
    """A sample between two layers.

    Attributes:
        hidden: [1, L, D] input of the layer it stands before. sample: what it was made from.
        calls: keyword arguments of every layer. added: layer -> what joins its input on the way.
    """

    hidden: Tensor
    sample: Sample
    calls: list[dict[str, Any]] = field(repr=False)
    added: dict[int, Tensor] = field(repr=False)

    def through(self, layer: nn.Module, i: int, hidden: Tensor | None = None) -> Tensor:
        """[1, L, D] the input of layer ``i + 1`` if layer i is given ``hidden``, or its own
        input.
        """
        out = layer(self.hidden if hidden is None else hidden, **self.calls[i])
        out = out[0] if isinstance(out, tuple) else out
        return out + self.added[i + 1] if i + 1 in self.added else out

    def advance(self, hidden: Tensor) -> None:
        """Stand before the next layer."""
        self.hidden = hidden


def passages(host: Host, samples: Sequence[Sample]) -> list[Passage]:
    """Every sample before the first layer.

    Raises:
        WeightsError: without samples, or where a sample cannot be run.
    """
    if not samples:
        raise WeightsError("calibration needs at least one sample")
    out: list[Passage] = []
    for number, sample in enumerate(samples):
        try:
            out.append(_watch(host, sample))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise WeightsError(
                f"calibration sample {number} cannot be run through the model:"
                f" {type(error).__name__}: {error}"
            ) from error
    return out


def _watch(host: Host, sample: Sample) -> Passage:
    """Run a sample once, and note what every layer is given."""
    calls: list[dict[str, Any]] = []
    added: dict[int, Tensor] = {}
    ends: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not calls:
            ends.append(args[0])
        elif args[0] is not ends[-1]:
            added[len(calls)] = args[0] - ends[-1]
        calls.append(dict(kwargs))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        ends.append(output[0] if isinstance(output, tuple) else output)
        del ends[1:-1]

    with ExitStack() as stack:
        for layer in host.layers:
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave, with_kwargs=True).remove)
        host.base(**{k: v for k, v in sample.inputs.items() if k != "labels"}, use_cache=False)
    return Passage(ends[0], sample, calls, added)


class Statistics:
    """What a weights method declared of a linear layer's inputs, gathered sample by sample.

    Args:
        wanted: names of `methods.linears`. samples: how many will come.
    """

    def __init__(self, wanted: Iterable[str], samples: int) -> None:
        self.wanted, self.samples = frozenset(wanted), samples
        self.sums: dict[str, Tensor] = {}
        self.tokens: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Take in the inputs x [..., I] of one sample."""
        x = working(x).reshape(-1, x.shape[-1])
        if SQUARES in self.wanted:
            self._sum(SQUARES, x.pow(2).sum(0) / self.samples)
        if HESSIAN in self.wanted:
            self._sum(HESSIAN, x.T @ x * (2 / self.samples))
        if TOKENS in self.wanted:
            most = -(-MOST_TOKENS // self.samples)
            self.tokens.append(x[:: -(-len(x) // most)].clone())

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def found(self, where: str) -> dict[str, Tensor]:
        """By name.

        Raises:
            WeightsError: if the layer was not run, or its inputs are not finite.
        """
        out = dict(self.sums)
        if self.tokens:
            out[TOKENS] = torch.cat(self.tokens)
        if missing := self.wanted - set(out):
            raise WeightsError(f"{where} ran on no calibration sample: no {', '.join(missing)}")
        for name, value in out.items():
            if not bool(value.isfinite().all()):
                raise WeightsError(
                    f"{where}: {name} of its calibration inputs holds NaN or infinity: look for the"
                    " sample, or the dtype, that overflows"
                )
        return out


def gather(
    layer: nn.Module,
    i: int,
    linears: Mapping[str, nn.Module],
    along: Sequence[Passage],
    wanted: Iterable[str],
) -> dict[str, Statistics]:
    """Statistics of every linear layer of decoder layer i over all samples."""
    out = {name: Statistics(wanted, len(along)) for name in linears}
    if not frozenset(wanted):
        return out
    with ExitStack() as stack:
        for name, module in linears.items():

            def see(module: nn.Module, args: Any, s: Statistics = out[name]) -> None:
                s.add(args[0])

            stack.callback(module.register_forward_pre_hook(see).remove)
        for passage in along:
            passage.through(layer, i)
    return out
