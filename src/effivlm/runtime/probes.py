"""What noise in a matrix costs: the change of a caption's loss, for methods that share their budget
by it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effivlm.methods.linears import WeightsError
from effivlm.runtime.host import Host
from effivlm.runtime.passage import Passage
from effivlm.runtime.swaps import weights_for_now

NOISE = 1e-3
Place = tuple[int, str]


def probe_scores(
    host: Host, linears: Sequence[Mapping[str, nn.Linear]], along: Sequence[Passage], seed: int = 0
) -> dict[Place, float]:
    """For every matrix W, ``|L(W + e z) - L(W - e z)| / 2e`` summed over samples; z is standard
    normal, e is 0.001, and L the mean loss of the sample's answer.

    Layers before the probed one run once; the passages stand before the first layer and stay there.

    Raises:
        WeightsError: for a sample whose answer is not known.
    """
    if unknown := [k for k, p in enumerate(along) if not p.sample.answer]:
        raise WeightsError(
            f"calibration sample {unknown[0]} has no answer whose loss could be probed: give"
            " Sample(inputs, answer=tokens of the caption at the end)"
        )
    generator = torch.Generator().manual_seed(seed)
    hidden = [p.hidden for p in along]
    scores: dict[Place, float] = {}
    for i, layer in enumerate(host.layers):
        for name, module in linears[i].items():
            scores[i, name] = sum(
                _change(host, i, module, p, x, generator)
                for p, x in zip(along, hidden, strict=True)
            )
        hidden = [p.through(layer, i, x) for p, x in zip(along, hidden, strict=True)]
    return scores


def _change(
    host: Host, i: int, module: nn.Linear, passage: Passage, x: Tensor, generator: torch.Generator
) -> float:
    weight = module.weight.detach()
    noise = torch.randn(weight.shape, generator=generator).to(weight) * NOISE
    losses: list[float] = []
    for new in (weight + noise, weight - noise):
        with weights_for_now([module], [new]):
            losses.append(_loss(host, i, passage, x))
    return abs(losses[0] - losses[1]) / (2 * NOISE)


def _loss(host: Host, i: int, passage: Passage, x: Tensor) -> float:
    """Mean loss of the answer if layer i is given x."""
    for k in range(i, len(host.layers)):
        x = passage.through(host.layers[k], k, x)
    count = passage.sample.answer
    logits = host.model.get_output_embeddings()(host.text.norm(x[:, -count - 1 : -1]))
    logits = logits * getattr(host.text.config, "logit_scale", 1.0)
    return float(F.cross_entropy(logits[0].float(), passage.sample.inputs["input_ids"][0, -count:]))
