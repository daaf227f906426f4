"""The signals a method can ask for; the runtime computes exactly those that are declared, and none
as an L x L matrix.

Encoder signals are reduced to LLM tokens (mean over a merge group) and given in the order of the
unit's tokens. Attention signals are probabilities, float32, with every key in the denominator, of
post-RoPE queries and keys.
Shapes: see `methods.base`.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Signal:
    """A named tensor. ``late``: parameters may be chosen when it is read, so only the type must be
    declared.
    """

    late: ClassVar[bool] = False


# -------------------------------------------------------------------------- vision encoder (PreLLM)
@dataclass(frozen=True)
class Saliency(Signal):
    """[N] attention each token gets from [CLS], mean over heads; received from all patches where
    there is no [CLS].

    ``at``: ``feature`` (the block whose output the projector takes), ``last``, or a block index,
    0-based; an index that hits a windowed block moves up to the next block that sees the whole
    image.
    """

    at: str | int = "feature"


@dataclass(frozen=True)
class EncoderKeys(Signal):
    """[N, d] keys at block ``at``, mean over heads; [N, H * d] with ``heads="concat"``."""

    at: str | int = "feature"
    heads: str = "mean"


@dataclass(frozen=True)
class ClsLogits(Signal):
    """[N] q_CLS . k / sqrt(H * d) over concatenated heads at block ``at``; the mean query where
    there is no [CLS].
    """

    at: str | int = "last"


@dataclass(frozen=True)
class EncoderFeatures(Signal):
    """[N, C] what the projector is given (mean over the merge group where it takes groups)."""


@dataclass(frozen=True)
class TextEmbeds(Signal):
    """[T, D] input embeddings of the prompt's text tokens (PreLLM), without placeholders, padding
    and the markers around images.
    """


# ----------------------------------------------------------------------------------- decoder layers
@dataclass(frozen=True)
class InputEmbeds(Signal):
    """[M, D] what entered the LLM for the tokens in play (IntraLLM)."""


@dataclass(frozen=True)
class NormedHidden(Signal):
    """[M, D] the layer's input after the LLM's final norm (IntraLLM)."""


@dataclass(frozen=True)
class Keys(Signal):
    """[KV, M, d] post-RoPE keys of the layer before (IntraLLM; KVCache methods have
    ``cache.keys``).
    """


@dataclass(frozen=True)
class LastRow(Signal):
    """[H, M] attention of the last prompt token. ``of``: ``previous`` layer, or ``next`` (IntraLLM:
    the layer about to run).
    """

    late: ClassVar[bool] = True
    of: str = "previous"


@dataclass(frozen=True)
class TextSums(Signal):
    """[H, M] attention summed over the rows ``tokens.text`` (text after the image; the last row if
    there is none), or over ``rows`` of them, indices into ``tokens.text``; IntraLLM, as the next.
    """

    late: ClassVar[bool] = True
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FreedTextSums(Signal):
    """[H, M] as `TextSums`, every entry divided by `ops.statistics.gravity` at its distance
    (SparseVLM, version 2).

    ``theta``: base of the rotary frequencies.
    """

    late: ClassVar[bool] = True
    rows: tuple[int, ...] | None = None
    theta: float = 10000.0


@dataclass(frozen=True)
class MutualTextSums(Signal):
    """[H, M] as `TextSums`, each row weighed, per head, by what it gives to and gets from text
    rows, itself counted once (AdaptInfer).
    """


@dataclass(frozen=True)
class TextPeaks(Signal):
    """[M] the largest attention that any of the rows ``tokens.text`` gives, of the mean over heads
    (MustDrop).
    """


@dataclass(frozen=True)
class TextRank(Signal):
    """[] long: rank of the attention, mean over heads, that ``rows`` of ``tokens.text`` give to
    ``tokens.visual`` (SparseVLM, first release).
    """

    late: ClassVar[bool] = True
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ColumnSums(Signal):
    """[H, M] attention each token receives, summed over all rows; exact, O(M) memory."""


@dataclass(frozen=True)
class HeadMaxSums(Signal):
    """[M] sum over rows of max over heads; ``rows``: ``text`` or ``visual`` (FitPrune).

    IntraLLM: ``tokens.text`` and this image; KVCache: text after the last image, and all images.
    """

    late: ClassVar[bool] = True
    rows: str = "text"


@dataclass(frozen=True)
class WindowRows(Signal):
    """[H, M] attention summed over the last ``size`` rows (KVCache)."""

    late: ClassVar[bool] = True
    size: int = 0


@dataclass(frozen=True)
class PostVisionRows(Signal):
    """[H, M] attention summed over the rows after the last visual token; the last 32 rows if there
    are none (KVCache).
    """


@dataclass(frozen=True)
class ThresholdCounts(Signal):
    """[H] share of causal entries, in the post-vision rows, with probability below ``p`` times
    their row's maximum.
    """

    late: ClassVar[bool] = True
    p: float = 0.01


@dataclass(frozen=True)
class ValueOutputNorms(Signal):
    """[KV, M] mean over a KV head's query heads of the L1 norm of v W_o (KVCache, CriticalKV)."""


@dataclass(frozen=True)
class FutureQueries(Signal):
    """[H, d, d + 1] mean (last column) and covariance (first d columns) of queries rotated to
    coming positions.

    Statistics of pre-RoPE queries over all rows but the first ``sinks``, rotated by the mean
    rotation of the next ``future`` positions (KVCache, ExpectedAttention).
    """

    late: ClassVar[bool] = True
    sinks: int = 4
    future: int = 512
