"""The vision side: encode images once, read the encoder signals in play, resize images or reduce
tokens on the way.

Whatever happens inside the encoder, what leaves it has one row per placeholder again (a reduced
token stands in for the ones it represents), so that packing, newline tokens and placeholder counts
stay transformers' business; `Encoded.kept` says which rows are real, and the LLM stage drops the
others.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from effivlm.families.base import Piece
from effivlm.methods.base import PreEncoder
from effivlm.methods.signals import ClsLogits, EncoderFeatures, EncoderKeys, Saliency, Signal
from effivlm.ops.precision import working
from effivlm.runtime.attention import AttentionCall, Tap, first_row, received, segments_of
from effivlm.runtime.counts import entering
from effivlm.runtime.encoder_units import first_of_each
from effivlm.runtime.hooks import Wrap, unwrapped
from effivlm.runtime.host import Host
from effivlm.runtime.in_encoder import BlockReduction
from effivlm.runtime.patches import Patches
from effivlm.setting import Part

ENCODER_SIGNALS = (Saliency, EncoderKeys, ClsLogits, EncoderFeatures)


@dataclass
class Encoded:
    """What one call of `get_image_features` gave.

    Attributes:
        output: transformers' output, one feature row per placeholder.
        pieces: layout in placeholder order.
        values: signal -> [groups in encoder order, ...], float32 (features keep their dtype).
        kept: per piece, [n] bool of rows that are real; None where nothing was reduced.
    """

    output: Any
    pieces: list[Piece]
    values: dict[Signal, Tensor] = field(default_factory=dict)
    kept: list[Tensor] | None = None


class VisionStage:
    """Encodes images under a session's reductions, and remembers layout, signals and survivors.

    Args:
        host: the model. tap: sees its attention.
        signals: what methods will read. resizing: the part before the encoder, or None.
        reducing: the part inside it, or None. wrap: what every hook is wrapped in.
    """

    def __init__(
        self,
        host: Host,
        tap: Tap,
        signals: Iterable[Signal],
        resizing: Part | None,
        reducing: Part | None,
        wrap: Wrap = unwrapped,
    ) -> None:
        self.model, self.family, self.blocks = host.model, host.family, host.blocks
        self.host, self.tap, self.resizing = host, tap, resizing
        self.reduction = BlockReduction(host.family, tap, reducing, wrap)
        self.signals = sorted((s for s in signals if isinstance(s, ENCODER_SIGNALS)), key=repr)
        self.features: Tensor | None = None
        self.patches = Patches()

    def open(self) -> None:
        """Install the hooks that encoding needs."""
        sites = {self.block_of(s.at) for s in self.signals if not isinstance(s, EncoderFeatures)}
        self.tap.watch("vision", sites)
        if EncoderFeatures() in self.signals:
            self.patches.after(self.blocks[self.block_of("feature")], self._keep_features)
        self.reduction.open(self.host)

    def close(self) -> None:
        """Remove everything `open` installed."""
        self.patches.close()
        self.reduction.close()

    def _keep_features(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.features = output[0] if isinstance(output, tuple) else output

    # ------------------------------------------------------------------------------------- encoding
    def encode(self, inner: Callable[..., Any], call: dict[str, Any]) -> Encoded:
        """Run ``inner``, the model's `get_image_features`, with the arguments ``call``."""
        pieces = self.family.layout(self.model, call)
        owners = kept = None
        if self.resizing is not None:
            call, owners, kept, pieces = self._resized(call, pieces)
        self.reduction.start(pieces, self.model.config)
        sizes = torch.tensor([0, *(len(p.source) for p in pieces)])
        self.bounds = sizes.cumsum(0) * self.reduction.members
        try:
            output = inner(**call)
            values: dict[Signal, Tensor] = {
                s: self.reduction.expand(self._value(s)) for s in self.signals
            }
            if owners is not None:
                restore_rows(output, owners)
            elif self.reduction.part is not None:
                kept = self.reduction.survivors(pieces)
        finally:
            self.reduction.stop()
            self.features = None
            self.tap.drop("vision")
        return Encoded(output, pieces, values, kept)

    def _resized(
        self, call: dict[str, Any], pieces: list[Piece]
    ) -> tuple[dict[str, Any], list[Tensor], list[Tensor], list[Piece]]:
        """The call with smaller images, the row each placeholder takes, the rows that are real, the
        new layout.
        """
        part = self.resizing
        assert part is not None and isinstance(part.method, PreEncoder)
        if self.family.resize is None:
            raise NotImplementedError(
                f"{part.method.name} resizes images before the encoder, which {self.family.name}"
                " cannot take"
            )
        grids = []
        for piece in pieces:
            rows, columns = (int(x) + 1 for x in piece.place.max(0).values.tolist())
            k = entering(part, PreEncoder, len(self.host.layers), len(piece.source))
            grids.append(part.method.resize(rows, columns, k))
        small = self.family.resize(self.model, call, grids)
        owners, kept, new = [], [], []
        for piece, (rows, columns), little in zip(
            pieces, grids, self.family.layout(self.model, small), strict=True
        ):
            size = piece.place.max(0).values + 1
            cell = (piece.place * torch.tensor([rows, columns]) / size).floor().long()
            lost = rows * columns - len(little.source)  # first patches that never become tokens
            owner = (cell[:, 0] * columns + cell[:, 1] - lost).clamp(min=0)
            owners.append(owner)
            kept.append(first_of_each(owner))
            new.append(replace(piece, source=little.source[owner]))
        return small, owners, kept, new

    # -------------------------------------------------------------------------------------- signals
    def block_of(self, at: str | int) -> int:
        """Block index of ``feature``, ``last`` or a number; moved up to the next block that sees
        whole images.
        """
        config, count = self.model.config, len(self.blocks)
        wanted = {"feature": self.family.feature_block(config, count), "last": count - 1}.get(
            str(at), at
        )
        full = self.family.full_blocks(config, count)
        after = [b for b in full if b >= int(wanted)]
        return after[0] if after else full[-1]

    def _value(self, signal: Any) -> Tensor:
        """One row per patch in play, grouped: [groups, ...]."""
        if isinstance(signal, EncoderFeatures):
            assert self.features is not None
            prefix = self.reduction.prefix
            flat = (
                self.features
                if self.features.ndim == 2
                else self.features[:, prefix:].flatten(0, 1)
            )
            return self.reduction.grouped(flat)
        calls = self.tap.calls.get(("vision", self.block_of(signal.at)), [])
        calls = [replace(c, segments=self.bounds) for c in calls] if self.family.rows else calls
        rows = [self._patches(signal, q, k, c) for c in calls for q, k in segments_of(c)]
        if not rows:
            raise RuntimeError(
                f"{signal!r}: the vision encoder's attention was not seen at block"
                f" {self.block_of(signal.at)}"
            )
        return self.reduction.grouped(torch.cat(rows))

    def _patches(self, signal: Any, query: Tensor, key: Tensor, call: AttentionCall) -> Tensor:
        prefix = self.reduction.prefix
        if isinstance(signal, Saliency):
            row = first_row if prefix else received
            return row(query, key, call.scaling)[:, prefix:].flatten(0, 1)
        if isinstance(signal, EncoderKeys):
            if signal.heads == "concat":
                return working(key.transpose(1, 2).flatten(2)[:, prefix:].flatten(0, 1))
            return working(key).mean(1)[:, prefix:].flatten(0, 1)
        q, k = (working(x.transpose(1, 2).flatten(2)) for x in (query, key))  # [B, P, H * d]
        probe = q[:, :1] if prefix else q.mean(1, keepdim=True)
        logits = (probe @ k.transpose(1, 2))[:, 0] * k.shape[-1] ** -0.5
        return logits[:, prefix:].flatten(0, 1)


def restore_rows(output: Any, owners: list[Tensor]) -> None:
    """Give every placeholder a feature row again, in place: row i of piece p is row
    ``owners[p][i]`` of what came out.
    """
    sizes = [len(f) for f in output.pooler_output]
    output.pooler_output = _spread(output.pooler_output, owners)
    for level, features in enumerate(getattr(output, "deepstack_features", None) or []):
        if isinstance(features, Tensor):  # transformers 5.17: all images in one
            output.deepstack_features[level] = torch.cat(_spread(features.split(sizes), owners))
        else:
            output.deepstack_features[level] = _spread(features, owners)


def _spread(features: Any, owners: list[Tensor]) -> Any:
    rows = [f[o.to(f.device)] for f, o in zip(features, owners, strict=True)]
    return torch.stack(rows) if isinstance(features, Tensor) else type(features)(rows)
