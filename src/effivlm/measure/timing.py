"""One timed run of one prompt under one setting: every stage apart, and what it held."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effivlm.measure.clock import METHOD, Clock
from effivlm.measure.memory import kv_bytes, kv_bytes_per_layer, peaks, reset_peaks, weight_bytes
from effivlm.runtime import generate
from effivlm.runtime.audit import Account
from effivlm.runtime.session import Session
from effivlm.runtime.weights import CompressedWeights
from effivlm.setting import Setting

Inputs = Mapping[str, Any]
STAGES = ("media", "vision", METHOD, "prefill", "decode")  # they sum to the total
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
}  # of the logits' spread; half precision: 0.25


@dataclass(frozen=True)
class Sample:
    """What one run took and held.

    Attributes:
        seconds: by stage (`STAGES`), ``ttft`` (vision, method and prefill up to the first token),
            ``decode_per_token`` (from two new tokens on) and ``total``. A setting that does nothing
            has method time too: the bookkeeping.
        memory: bytes: ``weights``, ``kv`` after prefill, and the peaks of `memory.peaks`.
        kv_per_layer: bytes. tokens: generated, per row. account: tokens and entries per layer of
            the first row.
        logits: [B, V] of the first new token.
    """

    seconds: dict[str, float]
    memory: dict[str, int]
    kv_per_layer: list[int]
    tokens: list[list[int]]
    account: Account
    logits: Tensor = field(repr=False)


class Timer:
    """Times runs of one model under one setting.

    Args:
        model: a transformers vision-language model of a supported family.
        setting: what is measured; ``Setting(())`` or ``none`` is the original.
        weights: the setting's compressed weights, where it has any.

    Raises:
        Unsupported: if the setting cannot apply to the model's family.
    """

    def __init__(
        self, model: nn.Module, setting: Setting, weights: CompressedWeights | None = None
    ) -> None:
        self.model: Any = model
        self.device = self.model.device
        self.clock = Clock(self.device)
        self.session = Session(model, setting, wrap=self.clock.wrap, weights=weights)
        with self.session:
            self.weights = weight_bytes(model)

    @property
    def saved(self) -> int:
        """Bytes that the setting's weights do not take."""
        account = self.session.weights.account if self.session.weights else None
        return account.bytes_before - account.bytes if account else 0

    @torch.inference_mode()
    def once(self, make: Callable[[], Inputs], new_tokens: int) -> Sample:
        """Run a prompt (or a batch) to exactly ``new_tokens`` tokens.

        Args:
            make: prepares the model's inputs; its time is the media stage.
            new_tokens: generated per row; no stop token ends an answer.
        """
        reset_peaks(self.device)
        with self.session as session:
            self.clock.start()
            with self.clock.during("media"):
                inputs = make()
            with self.clock.during("vision"):
                encoded = generate.encode(session, inputs)
            with self.clock.during("prefill"):
                done = generate.prefill(session, inputs, encoded)
                done.logits.argmax(-1).tolist()  # the first token, where a user would see it
            held = kv_bytes(done.cache), kv_bytes_per_layer(done.cache)
            with self.clock.during("decode"):
                answers = generate.decode(session, [done], new_tokens, ())
            seconds = self.clock.stop()
        seconds = {s: seconds.get(s, 0.0) for s in STAGES} | {"total": seconds["total"]}
        seconds["ttft"] = seconds["vision"] + seconds[METHOD] + seconds["prefill"]
        if new_tokens > 1:
            seconds["decode_per_token"] = seconds["decode"] / (new_tokens - 1)
        memory = peaks(self.device) | {"kv": held[0], "weights": self.weights}
        return Sample(
            seconds, memory, held[1], [a.tokens for a in answers], done.accounts[0], done.logits
        )

    @torch.inference_mode()
    def correct(self, make: Callable[[], Inputs], sample: Sample) -> bool:
        """Whether a timed run computed what unchanged `model.generate` computes under the same
        setting.

        The first token's logits are compared, and that they are finite; the audit has already
        compared the counts.
        """
        with self.session:
            out = self.model.generate(
                **make(),
                max_new_tokens=1,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        expected, got = out.logits[0].float(), sample.logits.float()
        if not (bool(got.isfinite().all()) and bool(expected.isfinite().all())):
            return False
        limit = TOLERANCE.get(sample.logits.dtype, 0.25) * float(expected.std())
        return float((expected - got).abs().max()) <= limit
