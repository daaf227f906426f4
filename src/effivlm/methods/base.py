"""What a method is: a frozen dataclass that looks at typed tensors and returns decisions.

A method derives from one or more of the stage classes below. It never sees the model, the family,
masks, positions or the cache object, only the contexts of `methods.contexts`; the runtime applies
what it decides. Shapes: N visual tokens of one image (or tile), M tokens in play, KV key/value
heads, E entries of a merge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from effivlm.budget import Budget
from effivlm.methods.contexts import BlockTokens, ImageTokens, LayerCache, LayerTokens
from effivlm.methods.linears import Linear, NewWeight, Promise, Readers
from effivlm.methods.signals import Signal


@dataclass(frozen=True)
class Paper:
    """Where a method comes from and where this implementation departs from it."""

    title: str
    arxiv: str  # "2403.06764", or "" for a baseline without a paper
    code: str  # official repository @ commit, or "" where none exists
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Merge:
    """A linear merge: the row at ``target[e]`` becomes the sum of ``weight[e] * x[source[e]]`` over
    its entries e.

    Indices address what the method was given; every target must be kept; a target's own
    contribution is an entry like any other. Kept rows that are no target stay as they are.
    """

    target: Int[Tensor, "E"]
    source: Int[Tensor, "E"]
    weight: Float[Tensor, "E"]


@dataclass(frozen=True)
class Selection:
    """Tokens to keep: ``keep``, ascending, indices into the tokens given; and rows to merge."""

    keep: Int[Tensor, "k"]
    merged: Merge | None = None


@dataclass(frozen=True)
class KVMerge:
    """A linear merge of cache entries of one layer, per KV head; keys and values share targets,
    sources and weights.

    Attributes:
        head: KV head. target: a kept entry.
        keys: whether keys are merged too (False merges values only).
    """

    head: Int[Tensor, "E"]
    target: Int[Tensor, "E"]
    source: Int[Tensor, "E"]
    weight: Float[Tensor, "E"]
    keys: bool = True


@dataclass(frozen=True)
class Entries:
    """Cache entries to keep (rows may differ and may hold different counts), optional merge."""

    keep: Bool[Tensor, "KV M"]
    merged: KVMerge | None = None


@dataclass(frozen=True)
class Room:
    """Where a stage spends a budget: what each of its steps would hold if it dropped nothing.

    Attributes:
        stage: the stage class that asks; a method of several stages answers each by itself.
        lengths: [steps]. Before the encoder, and before the LLM, one step: an image's tokens. In
            the encoder its blocks: the groups of one unit. In the LLM its layers: an image's
            tokens. In the cache its layers: the entries of one prompt.
        layers: decoder layers of the model.
        statistics: [steps] `KVCache.statistic` of every layer, once all are known; else None.
    """

    stage: type["Method"]
    lengths: tuple[int, ...]
    layers: int
    statistics: tuple[float, ...] | None = None

    @property
    def n(self) -> int:
        """What the first step would hold."""
        return self.lengths[0]


@dataclass(frozen=True)
class Method:
    """Base of all methods. Class attributes say what it is; dataclass fields are its
    hyper-parameters.

    Attributes:
        name: as in text form, YAML and tables.
        paper: source and deviations.
        signals: what it reads; reading anything else is an error.
        exact: whether it keeps exactly the count it is asked for; if False it may keep fewer and
            the audit says so.
        budget: ``required``, ``optional`` (it has a rule of its own) or ``none``.
        units: budget units it honours, the first is its default.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[Paper]
    exact: ClassVar[bool] = True
    budget: ClassVar[str] = "required"
    units: ClassVar[tuple[str, ...]] = ("visual",)

    @property
    def signals(self) -> frozenset[Signal]:
        """Signals this method reads, with its parameters filled in."""
        return frozenset()

    @property
    def unsupported(self) -> Mapping[str, str]:
        """Traits of a family this method cannot work with, each with the reason (``{"no_grid":
        "..."}``).

        Known traits: ``no_grid`` (tokens have no place), ``no_encoder_signals`` (tokens are not
        patches, so encoder signals cannot be mapped to them), ``window_encoder``, ``few_layers``.
        """
        return {}

    def counts(self, room: Room, budget: Budget | None) -> Sequence[int]:
        """[steps] what each step of a stage holds under a budget: the one place where a method
        turns a budget into counts. A step whose count is less than the one before cuts.

        Token stages never grow from step to step, and nothing is cut before the encoder's first
        block. The default keeps the budget of every length.

        Raises:
            BudgetError: if the budget is infeasible; names the smallest feasible one.
        """
        assert budget is not None
        return [budget.count(n) for n in room.lengths]


class Weights(Method):
    """Compresses the matrices of the language model, once, layer by layer.

    Attributes:
        statistics: of a linear layer's inputs that it reads (`methods.linears`).
        original_inputs: every layer is shown what the original layers before it give, not what the
            compressed ones do.
    """

    units: ClassVar[tuple[str, ...]] = ("weights",)
    statistics: ClassVar[frozenset[str]] = frozenset()
    original_inputs: ClassVar[bool] = False

    def check_budget(self, budget: Budget | None) -> None:
        """Refuse a budget, or its absence, that does not fit the other fields.

        Raises:
            BudgetError: saying what was expected.
        """

    def probes(self, budget: Budget | None) -> int:
        """Calibration samples that every matrix is probed with before anything is compressed; 0:
        the method does not ask for `shares`.
        """
        return 0

    def shares(
        self,
        scores: Mapping[tuple[int, str], float],
        sizes: Mapping[tuple[int, str], int],
        budget: Budget | None,
    ) -> dict[tuple[int, str], float]:
        """The share pruned of every matrix (layer, name), from the loss each probe cost."""
        raise NotImplementedError

    def scale(self, readers: Readers) -> Tensor | None:
        """[I] a scale for the inputs of matrices that read the same tensor, or None: the matrices
        are multiplied by it, what makes the tensor is divided.
        """
        return None

    def compress(self, linear: Linear, budget: Budget | None) -> NewWeight:
        """The new weight of one linear layer."""
        raise NotImplementedError

    def promise(self, rows: int, columns: int, share: float) -> Promise:
        """What a matrix [rows, columns] will hold, ``share`` of it pruned."""
        raise NotImplementedError


class EncoderReducer(Method):
    """Reduces merge groups between vision-encoder blocks."""

    units: ClassVar[tuple[str, ...]] = ("visual", "visual_mean")

    def reduce_block(self, tokens: BlockTokens, k: int) -> Selection:
        """Keep ``k`` of the groups in play; every dropped group should be a merge source (else it
        is discarded).
        """
        raise NotImplementedError

    @property
    def proportional_attention(self) -> bool:
        """Whether later blocks add log(size) of each key to their attention logits (ToMe)."""
        return False


class Processing(Method):
    """Has the processor make fewer visual tokens of a prompt's images (`Family.native`)."""


class PreEncoder(Method):
    """Resizes the image before the encoder."""

    units: ClassVar[tuple[str, ...]] = ("visual", "visual_mean")

    def resize(self, rows: int, columns: int, k: int) -> tuple[int, int]:
        """New grid (rows, columns) in LLM tokens with ``rows * columns <= k``."""
        raise NotImplementedError


class PreLLM(Method):
    """Selects and merges visual tokens between encoder and LLM, image by image (tile by tile)."""

    units: ClassVar[tuple[str, ...]] = ("visual", "visual_mean")
    observes: ClassVar[bool] = False

    def observe_image(self, tokens: ImageTokens) -> None:
        """Called for every image or tile, also where nothing is dropped, if ``observes``; it may
        fill ``notes``.
        """

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Keep ``k`` of the N tokens (0 < k < N); indices into N."""
        raise NotImplementedError


class IntraLLM(Method):
    """Selects and merges visual tokens before the decoder layers where its counts fall, image by
    image.

    Attributes:
        presets: its published schedules, which take no budget, as fields in text form
            (``preset=192``).
    """

    units: ClassVar[tuple[str, ...]] = ("visual", "visual_mean")
    presets: ClassVar[tuple[str, ...]] = ()

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Keep ``k`` of this image's N tokens (0 <= k < N); indices into N, that is into
        ``tokens.visual``.

        A merge's indices address N too.
        """
        raise NotImplementedError


class KVCache(Method):
    """Compresses the cache after prefill: score at each layer, count over layers, choose entries.

    Its counts are entries per KV head and layer, and their sum is what keeping the budget of every
    layer would spend.
    """

    units: ClassVar[tuple[str, ...]] = ("prompt_kv",)

    @property
    def spreads(self) -> bool:
        """Whether layers get unequal shares of the budget, as they do wherever counts wait."""
        return self.waits

    @property
    def waits(self) -> bool:
        """Whether its counts need `statistic` of every layer, so that no layer can be compressed
        before the last has run; until then it is asked without (``room.statistics`` is None), for
        the counts that scores may assume.
        """
        return False

    @property
    def uneven(self) -> bool:
        """Whether heads of a layer may keep unequal counts, or fewer than asked (``exact`` False);
        how many each keeps is then read off `choose`, once the last layer has run.
        """
        return not self.exact

    def statistic(self, cache: LayerCache) -> Tensor | float:
        """This layer's number for counts that wait; a tensor [] is read with all layers' at the
        end.
        """
        raise NotImplementedError

    def score(self, cache: LayerCache, k: int) -> Float[Tensor, "... KV M"]:
        """Float32, higher = keep, or a stack of such for `choose`; computed while the
        layer's queries are at hand. ``k``: this layer's count (see `waits`).
        """
        raise NotImplementedError

    def choose(self, cache: LayerCache, scores: Float[Tensor, "... KV M"], k: int) -> Entries:
        """Entries to keep, ``k`` per KV head (or ``KV * k`` in all for head-adaptive budgets); no
        signals here.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Format:
    """How the entries of a cache layer are stored.

    Attributes:
        bits: of a stored number.
        group: entries (of keys, channel by channel) or channels (of values, entry by entry) that
            share a scale and an offset.
        residual: newest entries that stay as they are.
        floats: 8-bit floats instead of levels between a group's extremes; no scales, no residual.
    """

    bits: int
    group: int = 1
    residual: int = 0
    floats: bool = False


class KVFormat(Method):
    """Says how what is left in the cache is stored, at the end of prefill and as tokens come."""

    budget: ClassVar[str] = "none"
    exact: ClassVar[bool] = True

    @property
    def format(self) -> Format:
        """How a layer's entries are stored."""
        raise NotImplementedError
