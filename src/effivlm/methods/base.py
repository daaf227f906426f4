"""What a method is: a frozen dataclass that looks at typed tensors and returns decisions.

A method derives from one or more of the stage classes below. It never sees the model, the family,
masks, positions or the cache object, only the contexts of `methods.contexts`; the runtime applies
what it decides. Shapes: N visual tokens of one image (or tile), M tokens in play, KV key/value
heads, E entries of a merge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

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

    Attributes:
        target: [E] long. source: [E] long. weight: [E] float32.
    """

    target: Tensor
    source: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Selection:
    """Tokens to keep: ``keep`` [k] long, ascending, indices into the tokens given; and rows to
    merge.
    """

    keep: Tensor
    merged: Merge | None = None


@dataclass(frozen=True)
class KVMerge:
    """A linear merge of cache entries of one layer, per KV head; keys and values share targets,
    sources and weights.

    Attributes:
        head: [E] long, KV head. target: [E] long, a kept entry. source: [E] long. weight: [E]
            float32.
        keys: whether keys are merged too (False merges values only).
    """

    head: Tensor
    target: Tensor
    source: Tensor
    weight: Tensor
    keys: bool = True


@dataclass(frozen=True)
class Entries:
    """Cache entries to keep: ``keep`` [KV, M] bool (rows may differ and may hold different counts),
    optional merge.
    """

    keep: Tensor
    merged: KVMerge | None = None


@dataclass(frozen=True)
class Cut:
    """One step of a schedule: before layer (or block) ``layer``, reduce to ``keep`` tokens of one
    image.
    """

    layer: int
    keep: int


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

    def encoder_schedule(self, blocks: int, n: int, budget: Budget | None) -> tuple[Cut, ...]:
        """Cuts ``Cut(block, groups kept)`` for a unit of ``n`` groups; a cut happens before
        ``block`` >= 1.
        """
        raise NotImplementedError

    def encoder_budget(self, n: int, budget: Budget | None) -> int:
        """Groups of an image of ``n`` that may leave the encoder; hybrid methods override it to
        leave work for later.
        """
        return n if budget is None else budget.count(n)

    def reduce_block(self, tokens: BlockTokens, k: int) -> Selection:
        """Keep ``k`` of the groups in play; every dropped group should be a merge source (else it
        is discarded).
        """
        raise NotImplementedError

    @property
    def proportional_attention(self) -> bool:
        """Whether later blocks add log(size) of each key to their attention logits (ToMe)."""
        return False


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

    def image_budget(self, layers: int, n: int, budget: Budget | None) -> int:
        """Tokens to keep of an image of ``n``; hybrid methods override it to leave work for later
        stages.
        """
        assert budget is not None
        return budget.count(n)

    def select_image(self, tokens: ImageTokens, k: int) -> Selection:
        """Keep ``k`` of the N tokens (0 < k < N); indices into N."""
        raise NotImplementedError


class IntraLLM(Method):
    """Selects and merges visual tokens before the decoder layers its schedule names, image by
    image.

    Attributes:
        presets: its published schedules, which take no budget, as fields in text form
            (``preset=192``).
    """

    units: ClassVar[tuple[str, ...]] = ("visual", "visual_mean")
    presets: ClassVar[tuple[str, ...]] = ()

    def schedule(self, layers: int, n: int, budget: Budget | None) -> tuple[Cut, ...]:
        """Cuts for an image that enters the LLM with ``n`` tokens, in a model with ``layers``
        decoder layers.

        Raises:
            BudgetError: if the budget is infeasible; names the smallest feasible one.
        """
        raise NotImplementedError

    def select_layer(self, tokens: LayerTokens, k: int) -> Selection:
        """Keep ``k`` of this image's N tokens (0 <= k < N); indices into N, that is into
        ``tokens.visual``.

        A merge's indices address N too.
        """
        raise NotImplementedError


class Allocator(Protocol):
    """How a budget is spread over layers. ``needs_statistics``: it must see every layer before the
    first choice.
    """

    needs_statistics: ClassVar[bool]

    def __call__(
        self, lengths: list[int], share: float | None, statistics: list[float] | None
    ) -> list[int]:
        """Entries per KV head and layer; ``lengths`` [layers] entries held now; sums exactly to the
        asked total.

        ``share`` is None for a method with a rule of its own that was given no budget.
        """
        ...


class KVCache(Method):
    """Compresses the cache after prefill: score at each layer, allocate over layers, choose
    entries.
    """

    units: ClassVar[tuple[str, ...]] = ("prompt_kv",)

    @property
    def allocator(self) -> Allocator | None:
        """None: every layer keeps ``budget.count(length)`` and is compressed as soon as it
        finishes.
        """
        return None

    def statistic(self, cache: LayerCache) -> float:
        """This layer's number for an allocator that needs statistics."""
        raise NotImplementedError

    def layer_budget(self, cache: LayerCache, budget: Budget | None) -> int:
        """Entries per KV head to keep in this layer when there is no allocator."""
        assert budget is not None
        return budget.count(cache.length)

    def score(self, cache: LayerCache, k: int) -> Tensor:
        """[KV, M] float32, higher = keep, or a stack of such for `choose`; computed while the
        layer's queries are at hand. ``k``: see `choose`.

        With an allocator that needs statistics ``k`` is the uniform budget, for the final one is
        not known yet.
        """
        raise NotImplementedError

    def choose(self, cache: LayerCache, scores: Tensor, k: int) -> Entries:
        """Entries to keep, ``k`` per KV head (or ``KV * k`` in all for head-adaptive budgets); no
        signals here.
        """
        raise NotImplementedError
