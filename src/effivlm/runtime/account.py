"""What a prompt cost, counted in the tensors, and how it is printed."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Account:
    """What one prompt cost under a setting, counted in the tensors.

    Attributes:
        prompt_tokens: logical prompt length. visual_tokens: visual tokens of the uncompressed
            prompt.
        visual_per_layer: visual tokens entering each decoder layer.
        tokens_per_layer: all tokens entering each decoder layer.
        kv_per_layer: prompt entries held per layer after prefill, mean over KV heads.
        kv_bytes_per_layer: bytes of those entries. kv_held_per_layer: bytes of the tensors they are
            stored in, which pad KV heads that keep unequal counts to the longest; neither has the
            padding that other rows of a batch force.
    """

    prompt_tokens: int
    visual_tokens: int
    visual_per_layer: tuple[int, ...]
    tokens_per_layer: tuple[int, ...]
    kv_per_layer: tuple[float, ...]
    kv_bytes_per_layer: tuple[int, ...]
    kv_held_per_layer: tuple[int, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of all prompt entries held."""
        return sum(self.kv_bytes_per_layer)

    @property
    def kv_bytes_held(self) -> int:
        """Bytes of the tensors that store them."""
        return sum(self.kv_held_per_layer)

    @property
    def realised(self) -> dict[str, float]:
        """Retained shares in every unit: ``visual`` (at the last layer), ``visual_mean``,
        ``prompt_kv``.
        """
        layers, n = len(self.visual_per_layer), max(self.visual_tokens, 1)
        return {
            "visual": self.visual_per_layer[-1] / n if self.visual_tokens else 1.0,
            "visual_mean": sum(self.visual_per_layer) / (layers * n) if self.visual_tokens else 1.0,
            "prompt_kv": (
                sum(self.kv_per_layer) / (len(self.kv_per_layer) * self.prompt_tokens)
                if self.kv_per_layer
                else 1.0
            ),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with total bytes and the realised shares."""
        return asdict(self) | {
            "kv_bytes": self.kv_bytes,
            "kv_bytes_held": self.kv_bytes_held,
            "realised": self.realised,
        }

    def lines(self) -> list[str]:
        """A table: equal neighbouring layers share a line, and a last line has the totals; bytes
        held where heads are padded.
        """
        rows: list[tuple[list[int], tuple[str, ...]]] = []
        columns = 3 if self.kv_bytes_held != self.kv_bytes else 2
        held = list(
            zip(self.kv_per_layer, self.kv_bytes_per_layer, self.kv_held_per_layer, strict=True)
        )
        for i, (tokens, visual) in enumerate(
            zip(self.tokens_per_layer, self.visual_per_layer, strict=True)
        ):
            kv = (f"{held[i][0]:g}", *(f"{n:,}" for n in held[i][1:])) if held else ("-",) * 3
            cells = (str(tokens), str(visual), *kv[:columns])
            if rows and rows[-1][1] == cells:
                rows[-1][0].append(i)
            else:
                rows.append(([i], cells))
        total = (
            "",
            "",
            f"{sum(self.kv_per_layer):g}",
            f"{self.kv_bytes:,}",
            f"{self.kv_bytes_held:,}",
        )
        named = [(f"{at[0]}-{at[-1]}" if len(at) > 1 else str(at[0]), *cells) for at, cells in rows]
        titles = ("layers", "tokens", "visual", "KV entries", "KV bytes", "held")
        table = [titles[: 3 + columns], *named, ("all", *total[: 2 + columns])]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in table
        ]


class Audit(tuple[Account, ...]):
    """The accounts of the last prefill, one per prompt of the batch; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Tokens entering each layer, KV entries and bytes per layer (of every one of the layers on
        a line).
        """
        if not self:
            return "nothing has been generated under this session yet"
        out: list[str] = []
        for number, account in enumerate(self, start=1):
            which = f"prompt {number} of {len(self)}" if len(self) > 1 else "prompt"
            out += [
                f"{which}: {account.prompt_tokens} tokens, {account.visual_tokens} of them visual",
                *account.lines(),
            ]
        return "\n".join(out)
