"""Token reduction between vision-encoder blocks, in whole merge groups.

A *unit* is what attends to itself: a tile of a tower encoder, an image of a packed sequence. After
the first cut a unit's patches lie group by group; positions (rotary tables), segment boundaries and
masks follow. Before anything that needs the full grid, every group gets the states of the group
that represents it.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effivlm.families.base import Family, Piece, squares
from effivlm.methods.base import BlockTokens, EncoderReducer
from effivlm.ops.precision import working
from effivlm.runtime.attention import Tap, received, segments_of
from effivlm.runtime.audit import check_selection
from effivlm.runtime.counts import in_blocks
from effivlm.runtime.encoder_units import (
    Unit,
    full_sequence,
    full_tiles,
    merged_groups,
    places,
    planned_cuts,
    refuse,
    size_bias,
    survivors,
)
from effivlm.runtime.hooks import Wrap, unwrapped
from effivlm.runtime.host import Host
from effivlm.runtime.patches import Patches
from effivlm.setting import Part


class BlockReduction:
    """Runs one setting's encoder reducer; without one it only knows how patches are grouped."""

    def __init__(self, family: Family, tap: Tap, part: Part | None, wrap: Wrap = unwrapped) -> None:
        self.family, self.tap, self.part = family, tap, part
        self.hook = functools.partial(wrap, "method")
        self.patches = Patches()
        self.units: list[Unit] = []
        self.history: dict[
            int, list[Tensor]
        ] = {}  # patches per encoder sequence -> owner of every group, per unit
        self.active = False

    # ----------------------------------------------------------------------------------- attachment
    def open(self, host: Host) -> None:
        """Hook the blocks and the places where full grids are needed."""
        if self.part is None:
            return
        self.n_blocks = (
            self.family.feature_block(host.model.config, len(host.blocks)) + 1
        )  # what comes after is never used
        self.n_layers = len(host.layers)
        self.spare = frozenset(self.tap.watched)  # sites that signals read later
        for i, block in enumerate(host.blocks):
            self.patches.before(block, self.hook(self._enter(i)))
        mergers = [
            m for n, m in host.encoder.named_modules() if re.fullmatch(self.family.mergers, n)
        ]
        if self.family.packed:
            for merger in mergers:
                self.patches.before(merger, self.hook(self._refill))
        else:
            self.patches.after(host.encoder, self.hook(self._restore))

    def close(self) -> None:
        """Remove the hooks."""
        self.patches.close()

    def start(self, pieces: list[Piece], config: Any) -> None:
        """A new encoder call begins."""
        self.prefix = self.family.prefix(config)
        group = self.family.group(config)
        if self.family.rows:
            assert isinstance(group, int)
            group = squares(pieces, group)
        self.order = (
            None if isinstance(group, int) else torch.argsort(group, stable=True)
        )  # patches, group by group
        self.members = group if isinstance(group, int) else len(group) // int(group.max() + 1)
        self.pieces, self.units, self.history, self.active = pieces, [], {}, self.part is not None

    def stop(self) -> None:
        """The call is over."""
        if self.active and self.units:
            self.tap.watch("vision", {i for _, i in self.spare})
        self.active = False
        self.tap.weigh_nothing()

    # --------------------------------------------------------------------------------------- groups
    def grouped(self, values: Tensor) -> Tensor:
        """Mean over merge groups of values [patches in play, ...] in encoder order -> [groups in
        play, ...].
        """
        if self.order is not None and not self.units:
            tiles = values.view(-1, len(self.order), *values.shape[1:])
            values = tiles[:, self.order.to(values.device)].flatten(0, 1)
        if self.members == 1:
            return values
        return working(values.view(-1, self.members, *values.shape[1:])).mean(1).to(values.dtype)

    def expand(self, values: Tensor) -> Tensor:
        """[groups in play, ...] -> [all groups, ...] in encoder order."""
        owners = self.history.get(len(values) * self.members)
        if not self.units or owners is None:
            return values
        out, start = [], 0
        for owner in owners:
            out.append(values[start + owner])
            start += int(owner.max()) + 1
        return torch.cat(out)

    def survivors(self, pieces: list[Piece]) -> list[Tensor]:
        """Per piece, [n] bool: see `encoder_units.survivors`."""
        part, blocks, layers = self.part, self.n_blocks, self.n_layers
        assert part is not None
        return survivors(self.units, pieces, lambda n: in_blocks(part, blocks, layers, n)[-1])

    # --------------------------------------------------------------------------------------- blocks
    def _enter(self, i: int) -> Any:
        def hook(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if not self.active:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if not self.units:
                self._begin(hidden)
            if i in self.cuts:
                hidden = self._reduce(i, hidden)
            if ("vision", i - 1) not in self.spare:
                self.tap.drop("vision", i - 1)
            if self.history:
                kwargs = self._follow(i, kwargs, hidden.device)
            return (
                ((hidden, *args[1:]), kwargs)
                if args
                else (args, {**kwargs, "hidden_states": hidden})
            )

        return hook

    def _begin(self, hidden: Tensor) -> None:
        """First block of a call: units and their cuts."""
        part = self.part
        assert part is not None
        if self.family.packed:
            counts = [len(p.source) for p in self.pieces]
        else:
            counts = [(hidden.shape[1] - self.prefix) // self.members] * hidden.shape[0]
        self.units = [Unit(n, hidden.device) for n in counts]
        self.notes: list[dict[str, Any]] = [{} for _ in counts]
        self.cuts = planned_cuts(part, self.n_blocks, self.n_layers, counts, len(self.pieces))
        self.tap.watch("vision", {i for _, i in self.spare} | {i - 1 for i in self.cuts})
        self.boundaries = (
            torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], device=hidden.device)
            * self.members
        )

    def _split(self, hidden: Tensor) -> Iterator[Tensor]:
        """[g, members * C] of every unit."""
        if self.family.packed:
            lengths = [len(u.groups) * self.members for u in self.units]
            for x in hidden.split(lengths):
                yield x.reshape(-1, self.members * x.shape[-1])
            return
        for x in hidden[:, self.prefix :]:
            if self.order is not None and not self.history:
                x = x[self.order.to(x.device)]
            yield x.reshape(-1, self.members * x.shape[-1])

    def _reduce(self, i: int, hidden: Tensor) -> Tensor:
        part = self.part
        assert part is not None and isinstance(part.method, EncoderReducer)
        keys, got = self._attention(i - 1)
        out, start = [], 0
        for number, (unit, rows) in enumerate(zip(self.units, self._split(hidden), strict=True)):
            g, k = len(unit.groups), self.cuts[i][number]
            mean = working(rows.view(g, self.members, -1)).mean(1)
            span = slice(start, start + g)
            start += g
            place = places(self.units, number, self.pieces if self.family.packed else None)
            place = place[unit.groups]
            if k < g:
                tokens = BlockTokens(
                    refuse,
                    frozenset(),
                    number,
                    self.notes[number],
                    mean,
                    keys[span],
                    got[span],
                    unit.sizes,
                    place,
                    i,
                    self.prefix,
                )
                chosen = part.method.reduce_block(tokens, k)
                check_selection(part.method, chosen.keep, chosen.merged, k, g)
                merged = rows if chosen.merged is None else merged_groups(rows, chosen.merged)
                rows = merged[chosen.keep]
                unit.cut(chosen.keep, chosen.merged, place)
            out.append(rows.reshape(len(rows) * self.members, -1))
        joined = (
            torch.cat(out)
            if self.family.packed
            else torch.cat([hidden[:, : self.prefix], torch.stack(out)], 1)
        )
        self.history[sum(len(u.groups) for u in self.units) * self.members] = [
            u.owner for u in self.units
        ]
        return joined

    def _attention(self, block: int) -> tuple[Tensor, Tensor]:
        """Keys [g in all, d] and attention received [g in all] at a block, per group in play."""
        keys, got = [], []
        for call in self.tap.calls[("vision", block)]:
            for query, key in segments_of(call):
                keys.append(working(key).mean(1)[:, self.prefix :].flatten(0, 1))
                got.append(received(query, key, call.scaling)[:, self.prefix :].flatten(0, 1))
        fresh = not self.history
        return self._grouped_at(torch.cat(keys), fresh), self._grouped_at(torch.cat(got), fresh)

    def _grouped_at(self, values: Tensor, fresh: bool) -> Tensor:
        if self.order is not None and fresh:
            values = values.view(-1, len(self.order), *values.shape[1:])[
                :, self.order.to(values.device)
            ].flatten(0, 1)
        return values.view(-1, self.members, *values.shape[1:]).mean(1)

    def _follow(self, i: int, kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Rotary tables, segment boundaries and masks of the patches still in play; the size bias
        of this block.
        """
        within = torch.arange(self.members, device=device)
        kept = [(u.groups[:, None] * self.members + within).flatten() for u in self.units]
        kwargs = dict(kwargs)
        bounds = None
        if self.family.packed:
            index = torch.cat(
                [k + b for k, b in zip(kept, self.boundaries[:-1].tolist(), strict=True)]
            )
            kwargs["position_embeddings"] = tuple(x[index] for x in kwargs["position_embeddings"])
            old = kwargs["cu_seqlens"]
            bounds = torch.searchsorted(index, old.to(device)).to(old.dtype).unique_consecutive()
            kwargs["cu_seqlens"] = bounds
            if kwargs.get("max_seqlen") is not None:
                kwargs["max_seqlen"] = int(bounds.diff().max())
        elif isinstance(mask := kwargs.get("attention_mask"), Tensor):
            raise NotImplementedError(
                f"{self.family.name}: encoder reduction with padded tiles (mask"
                f" {tuple(mask.shape)})"
            )
        if self.part is not None and getattr(self.part.method, "proportional_attention", False):
            self.tap.weigh(("vision", i), size_bias(self.units, self.members, self.prefix, bounds))
        return kwargs

    # ----------------------------------------------------------------------------------- full grids
    def _refill(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not (self.active and self.history):
            return None
        owners = self.history.get(len(args[0]))  # a sequence that was never reduced stays
        if owners is None:
            return None
        return (full_sequence(args[0], owners, self.members), *args[1:]), kwargs

    def _restore(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not (self.active and self.history):
            return None
        output.last_hidden_state = self._tiles(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                None if h is None else self._tiles(h) for h in output.hidden_states
            )
        return output

    def _tiles(self, hidden: Tensor) -> Tensor:
        owners = self.history.get((hidden.shape[1] - self.prefix) * hidden.shape[0])
        if owners is None:
            return hidden
        return full_tiles(hidden, owners, self.prefix, self.members, self.order)
