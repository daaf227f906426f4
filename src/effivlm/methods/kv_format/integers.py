"""KIVI: keys rounded per channel, values per token, the newest entries left as they are."""

from dataclasses import dataclass
from typing import ClassVar

from effivlm.methods.base import Format, KVFormat, Paper

PAPER = Paper(
    "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    "2402.02750",
    "https://github.com/jy-yuan/KIVI (not run; written after the paper)",
    (
        (
            "residual is 32, as in the authors' example; their paper's tables use 128, and"
            " transformers' own quantized cache too"
        ),
        (
            "groups of entries are counted from the end of the prompt, so that a row of a batch is"
            " stored as it is alone; the oldest group may be short. The authors' keys leave a"
            " remainder of the prompt unrounded instead"
        ),
        "scales and offsets have the precision of the model; numbers are read exactly as stored",
        "the prompt's own attention is computed before anything is rounded, as in the paper",
        "behind a cache method, groups are of entries kept, which need not be neighbours",
    ),
)


@dataclass(frozen=True)
class Integers(KVFormat):
    """Keys share a scale per channel over ``group`` entries, values per entry over ``group``
    channels.

    Attributes:
        group: members that share a scale. residual: newest entries that stay as they are, at least;
            a group is rounded when as many have come.
    """

    bits: ClassVar[int]
    group: int = 32
    residual: int = 32

    def __post_init__(self) -> None:
        """Validate."""
        whole = 8 // self.bits
        if self.group < whole or self.group % whole:
            raise ValueError(
                f"{self.name}: group={self.group} must be a positive multiple of {whole}, the codes"
                " in a byte"
            )
        if self.residual < 0:
            raise ValueError(f"{self.name}: residual={self.residual} must not be negative")

    @property
    def format(self) -> Format:
        """Levels between a group's extremes."""
        return Format(self.bits, self.group, self.residual)


@dataclass(frozen=True)
class KVInt8(Integers):
    """The cache in 8 bits a number, with scales per group."""

    name: ClassVar[str] = "kv_int8"
    paper: ClassVar[Paper] = PAPER
    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class KVInt4(Integers):
    """The cache in 4 bits a number, with scales per group."""

    name: ClassVar[str] = "kv_int4"
    paper: ClassVar[Paper] = PAPER
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class KVInt2(Integers):
    """The cache in 2 bits a number, with scales per group, as published."""

    name: ClassVar[str] = "kv_int2"
    paper: ClassVar[Paper] = PAPER
    bits: ClassVar[int] = 2
