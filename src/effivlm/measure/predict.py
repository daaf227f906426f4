"""What a setting will take and hold on a device, from shapes and budgets, without running the
model.

The times are floors: what the stage must compute and move, at the device's peaks. `effivlm measure`
reports how far the measured times are from them (a stage's share of the floor), and how far
predicted speed-ups are from measured ones.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effivlm.budget import BudgetError
from effivlm.families.base import Family
from effivlm.families.fitness import check_device
from effivlm.families.loading import load
from effivlm.measure import peaks, workloads
from effivlm.measure.expected import Expected, encoded_share, expected, form_of
from effivlm.measure.memory import weight_bytes
from effivlm.measure.roofline import Peaks, TextShape, VisionShape, Work, segments_of
from effivlm.methods.base import (
    Processing,
    Weights,
)
from effivlm.runtime.audit import Account
from effivlm.runtime.packed import bytes_stored
from effivlm.setting import Setting, parse_setting


@dataclass(frozen=True)
class Prediction:
    """Floors in seconds, and bytes. ``total``: for the answer of ``new_tokens``; ``memory``:
    weights, cache, activations.
    """

    vision: float
    prefill: float
    decode_per_token: float
    new_tokens: int
    kv: int
    memory: int

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.vision + self.prefill

    @property
    def total(self) -> float:
        """Seconds to the last token."""
        return self.ttft + (self.new_tokens - 1) * self.decode_per_token


class Predictor:
    """Predicts settings for one model shape, prompt and device.

    Args:
        model: may be on the meta device.
        family: of the model.
        inputs: of the prompt (or batch of equal prompts).
        new_tokens: generated per prompt.
        size: bytes an element.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        inputs: Mapping[str, Any],
        new_tokens: int,
        size: int,
    ) -> None:
        some: Any = model
        self.text, self.vision = (
            TextShape.of(some.get_decoder().config),
            VisionShape.of(model, family),
        )
        self.weights, self.new_tokens, self.size = weight_bytes(model), new_tokens, size
        self.batch, length = inputs["input_ids"].shape
        visual = int((inputs["input_ids"] == some.config.image_token_id).sum()) // self.batch
        self.plain, self.images = length - visual, _images(some, family, inputs, visual, self.batch)
        self.segments = segments_of(model, family, inputs) if visual else []

    def batched(self, batch: int) -> "Predictor":
        """The same prompt ``batch`` times side by side."""
        out = copy.copy(self)
        out.batch, out.segments = self.batch * batch, self.segments * batch
        return out

    def counts(self, setting: Setting) -> Expected:
        """What a setting leads to. Raises BudgetError, see `expected`."""
        for part in setting.stage(Weights):
            raise BudgetError(
                f"{part}: what compressed weights save is counted in their tensors, not told from"
                " shapes: measure it"
            )
        for part in setting.stage(Processing):
            raise BudgetError(
                f"{part}: what a processor makes of an image depends on the image: run it and see"
                " the account"
            )
        return expected(setting, self.text.layers, self.plain, self.images)

    def works(self, counts: Expected, saved: int = 0) -> dict[str, Work]:
        """What every stage must do: ``vision``, ``prefill``, ``decode_per_token``; ``saved``: bytes
        that compressed weights do not take.
        """
        visual = sum(self.images) * self.batch
        whole = self.vision.work(self.segments, visual, self.size) if visual else Work(0, 0)
        prefill = self.text.prefill_work(counts.tokens, self.size, self.batch)
        stored = None if counts.form is None else self._stored(counts)
        decode = self.text.decode_work(counts.kv, self.new_tokens, self.size, self.batch, stored)
        return {
            "vision": Work(whole.flops * counts.encoded, whole.bytes),
            "prefill": Work(prefill.flops, prefill.bytes - saved),
            "decode_per_token": Work(decode.flops, decode.bytes - saved),
        }

    def _stored(self, counts: Expected) -> float:
        """Bytes of one prompt's entries."""
        text = self.text
        if counts.form is None:
            return sum(counts.kv) * text.kv_entry(self.size)
        return text.kv_heads * sum(
            bytes_stored(counts.form, round(n), text.head_dim, self.size) for n in counts.kv
        )

    def floors(
        self, account: Account, setting: Setting, limits: Peaks, saved: int = 0
    ) -> dict[str, float]:
        """Least seconds of the stages of a run, by the counts its audit found in the tensors;
        ``saved``: bytes that compressed weights do not take.
        """
        share = encoded_share(setting, self.images)
        form = form_of(setting)
        counts = Expected(account.tokens_per_layer, account.kv_per_layer, share, form)
        floors = {k: w.floor(limits) for k, w in self.works(counts, saved).items()}
        ttft = floors["vision"] + floors["prefill"]
        return floors | {
            "ttft": ttft,
            "total": ttft + (self.new_tokens - 1) * floors["decode_per_token"],
        }

    def predict(self, setting: Setting, limits: Peaks) -> Prediction:
        """Floors on a device. Raises BudgetError, see `expected`."""
        counts = self.counts(setting)
        floors = {k: w.floor(limits) for k, w in self.works(counts).items()}
        kv = round(self.batch * self._stored(counts))
        grown = self.batch * self.new_tokens * self.text.layers * self.text.kv_entry(self.size)
        # one layer's hidden states, queries, keys, values and the MLP's two products are alive at
        # the widest place
        row = (
            3 * self.text.hidden
            + 2 * self.text.inter
            + self.text.head_dim * (self.text.heads + 2 * self.text.kv_heads)
        )
        alive = self.batch * max(counts.tokens) * row * self.size
        return Prediction(
            **floors,
            new_tokens=self.new_tokens,
            kv=kv,
            memory=self.weights + kv + max(grown, alive),
        )


def _images(
    model: Any, family: Family, inputs: Mapping[str, Any], visual: int, batch: int
) -> list[int]:
    """Visual tokens of every image of one prompt; images are those a method is asked about one by
    one.
    """
    if not visual:
        return []
    pieces = family.layout(model, inputs)
    counts = [len(p.source) for p in pieces[: len(pieces) // batch]]
    if not family.run_is_image:
        return counts
    ids = inputs["input_ids"][0] == model.config.image_token_id
    starts = (ids & ~ids.roll(1)).nonzero()[:, 0].tolist()
    return [int((ids[a:b]).sum()) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def table(shape: str, settings: Sequence[str], device: str, workload: str) -> list[str]:
    """Predictions for a published shape in bfloat16, the original first, one line per batch size
    and setting.

    Args:
        shape: see `families.loading.shapes`.
        settings: in text form.
        device: a stated device (`peaks.STATED`), or a torch device whose peaks are measured now.
        workload: see `workloads.WORKLOADS`.

    Raises:
        UnknownName, SettingError, BudgetError: for what is not known or cannot be predicted.
    """
    work, parsed = (
        workloads.workload(workload),
        [parse_setting(s) for s in dict.fromkeys(("none", *settings))],
    )
    local = device.split(":")[0] in ("cpu", "cuda")
    if local:
        check_device(device)
    loaded = load(shape, "bfloat16", device="meta", random_weights=True)
    limits = peaks.measured(torch.device(device), torch.bfloat16) if local else peaks.stated(device)
    lines = [
        f"{shape}, {workload}, {limits.name}: least times; measured times are longer (see the"
        " shares of the floor)"
    ]
    inputs = workloads.prompts(
        work, loaded.family, loaded.model.config, 1, workloads.image_sizes(shape)
    )
    single = Predictor(loaded.model, loaded.family, inputs, work.new_tokens, 2)
    for batch in work.batches:
        predictor = single.batched(batch)
        told = [predictor.predict(s, limits) for s in parsed]
        lines += [
            _line(str(s), batch, p, told[0], limits) for s, p in zip(parsed, told, strict=True)
        ]
        if batch == 1 and len(work.batches) > 1 and limits.memory:
            most = {
                str(s): int((limits.memory - predictor.weights) // (p.memory - predictor.weights))
                for s, p in zip(parsed, told, strict=True)
            }
            lines.append(
                "  largest batch that fits: " + ", ".join(f"{s} {n}" for s, n in most.items())
            )
    return lines


def _line(setting: str, batch: int, p: Prediction, base: Prediction, limits: Peaks) -> str:
    fits = "" if not limits.memory or p.memory <= limits.memory else ", does not fit"
    return (
        f"  {setting}, batch {batch}: TTFT {1000 * p.ttft:.1f} ms ({base.ttft / p.ttft:.2f}x),"
        f" decode {1000 * p.decode_per_token:.2f} ms a token"
        f" ({base.decode_per_token / p.decode_per_token:.2f}x), total {p.total:.2f} s"
        f" ({base.total / p.total:.2f}x), KV {p.kv / 2**20:.0f} MiB, memory {p.memory / 2**30:.1f}"
        f" GiB{fits}"
    )
