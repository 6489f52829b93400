"""One prefill on its way through the decoder: shortened before the first layer, or wherever the method has a stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.models.aside import Stopwatch
from vprune.models.cache import (
    LogicalLayer,
    LogicalStaticLayer,
    StoredRows,
    fitting,
    fixed_size,
    is_static,
    logical,
    record_dropped,
    stored_length,
)
from vprune.models.masks import Sight, layer_mask, seen_among
from vprune.pruner import Pruner
from vprune.records import Grid, ImageReport, Prefill, PruneReport, Selection, StageReport
from vprune.shortening import Shortening, gather_columns, restore_columns, shorten_batch


@dataclass(frozen=True)
class Stretch:
    """The layers from `first` to the next stage, in which the batch is as long as it is: [B, K].

    `index` LongTensor [B, K]: the caller's columns that stand there (-1 = padding), None = all of them; `since` the
    same among the columns that the decoder was given. `valid` bool [B, K], None when all are; `bias` as in
    `Shortening`, None when sizes do not count. The last `tail` columns are the caller's last ones in every row.
    """

    first: int
    width: int
    index: Tensor | None
    since: Tensor | None
    valid: Tensor | None
    bias: Tensor | None
    tail: int


class Passage:
    """A prefill under way, and what the method decided about it.

    Raises:
        VPruneError: a stage that this model cannot have, or whatever the method refuses.
    """

    def __init__(
        self, pruner: Pruner, prefill: Prefill, own_masks: dict[str, Any] | None, clock: Stopwatch | None = None
    ) -> None:
        self.pruner, self.prefill, self.own_masks = pruner, prefill, own_masks
        self.anatomy, self.backend = prefill.anatomy, prefill.anatomy.backend
        self.length, self._given = prefill.hidden.shape[1], prefill.images
        self.seen = prefill.seen
        valid = prefill.valid if min(prefill.counts) < self.length else None
        self.stretches = [Stretch(0, self.length, None, None, valid, None, self.length)]
        self._masks: dict[Any, Any] = {}
        self._maps: dict[int, list[Tensor | None]] = {}
        self._decided: list[Callable[[], Decided]] = []
        self.clock = Stopwatch() if clock is None else clock
        self.deciding = False
        self._stops = {0}
        for layer, _ in pruner.schedule:
            self._check_stage(layer)
            self._stops |= {layer, pruner.scoring_layer(layer)}

    @property
    def here(self) -> Stretch:
        """The stretch that has been reached."""
        return self.stretches[-1]

    @property
    def shortened(self) -> bool:
        """True once something was pruned."""
        return self.here.index is not None

    @property
    def ends_at_once(self) -> bool:
        """True when nothing is left to do after the first layer was reached."""
        return max(self._stops) == 0

    def _check_stage(self, layer: int) -> None:
        decoder, layers = self.prefill.anatomy.decoder, self.prefill.anatomy.layers
        if layer and layer < self.prefill.deepstack:
            raise VPruneError(
                f"stages: layer {layer} lies among the first {self.prefill.deepstack} layers, after each of which "
                f"visual features are added (DeepStack); choose 0, or {self.prefill.deepstack} and above"
            )
        if layer and decoder.training and getattr(layers[layer], "gradient_checkpointing", False):
            raise VPruneError(
                f"stages: a stage before layer {layer} under gradient checkpointing, which runs layers twice; "
                "prune before layer 0 only, or call model.gradient_checkpointing_disable()"
            )

    def enter(self, layer: int, hidden: Tensor) -> tuple[Tensor, Shortening | None]:
        """What layer `layer` reads in place of `hidden` [B, K, D], and the shortening that was done, None if none."""
        if layer not in self._stops:
            return hidden, None
        with self.clock.running(hidden):
            short = self.decide(layer, hidden)
            if short is None:
                return hidden, None
            prefill = self.prefill
            shorter, positions, visual = short.shorten_all(prefill.hidden, prefill.positions, prefill.visual)
            self.move_on(layer, short, shorter, positions, visual)
        return shorter, short

    def decide(self, layer: int, hidden: Tensor) -> Shortening | None:
        """What the method has in mind for the rows `hidden` [B, K, D] before layer `layer`; None: they stay."""
        here, short, device = self.prefill, None, hidden.device
        now = copy(here)  # (its layers may lie on several devices, and what is known of it goes with it)
        now.hidden, now.layer, now.start = hidden, layer, here.start or here
        now.positions, now.valid, now.visual = (part.to(device) for part in (here.positions, here.valid, here.visual))
        now.stored, now.past = self._stored_before(layer), self._past(layer)
        self.prefill = now
        self.deciding = True
        with torch.no_grad():
            for stage, keep in self.pruner.schedule:
                if self.pruner.scoring_layer(stage) == layer and stage not in self._maps:
                    self._maps[stage] = self._scored(layer)
                if stage == layer:
                    short = self._decide(layer, keep)
        self.deciding = False
        return short

    def _scored(self, layer: int) -> list[Tensor | None]:
        earlier = next((maps for stage, maps in self._maps.items() if self.pruner.scoring_layer(stage) == layer), None)
        return self.pruner.score(self.prefill) if earlier is None else earlier

    def _decide(self, layer: int, keep: float | int) -> Shortening | None:
        maps, images = self._maps[layer], self.prefill.images
        selections = self.pruner.plan(self.prefill, maps, keep)
        identity = all(selection.is_identity for selection in selections)
        short = None if identity else shorten_batch(self.prefill, selections, self.pruner.size_aware)
        followed = images if short is None else short.images
        decided = Decided(layer, maps, [image.standing or untouched(len(image)) for image in followed])
        self._decided.append(lambda: decided)
        if short is None:
            self.prefill = replace(self.prefill, images=followed)
        return short

    def move_on(self, layer: int, short: Shortening, shorter: Tensor, positions: Tensor, visual: Tensor) -> None:
        """Go on with the rows that are left, [B, K, D], and what belongs to their columns."""
        prefill, before, instruction = self.prefill, self.here, None
        if not self.ends_at_once:  # a later stage will look at it
            assert prefill.instruction is not None
            rows, row_valid = prefill.instruction
            first = short.index.shape[1] - row_valid.sum(-1, keepdim=True)  # text is the end of every row
            rows = (first + torch.arange(rows.shape[1], device=rows.device)).clamp(max=short.index.shape[1] - 1)
            instruction = rows, row_valid
        now = copy(prefill)
        now.hidden, now.positions, now.visual, now.valid = shorter, positions, visual, short.valid
        now.images, now.counts, now.instruction, now.instruction_sent = short.images, short.counts, instruction, None
        self.prefill = now
        since = chained(before.since, short.index) if layer else None
        self.stretches.append(
            Stretch(
                layer,
                short.index.shape[1],
                chained(before.index, short.index),
                since,
                short.valid if short.padded else None,
                short.bias,
                min(before.tail, short.tail),
            )
        )

    def told_of(self, decided: Callable[[], Decided]) -> None:
        """Take over what a stage has decided, told when the report is read."""
        self._decided.append(decided)

    @property
    def decided(self) -> Sequence[Decided]:
        """What all stages so far have decided."""
        return [one() for one in self._decided]

    def _stored_before(self, layer: int) -> int:
        # (A cache of fixed size counts on the device: its host is not to wait for what is known.)
        return stored_length(self.prefill.cache, layer) if self.seen else 0

    def _past(self, layer: int) -> StoredRows:
        known = logical(self.prefill.cache, layer)
        return self.prefill.past if known is None else known.rows

    def report(self) -> PruneReport:
        """The report of all stages so far; it holds on to what they decided, not to the prefill."""
        images = [(image.sample, image.image, image.grid) for image in self._given]
        decided, layers = tuple(self._decided), len(self.anatomy.layers)
        return PruneReport(len(images), partial(told, images, decided, self.clock, self.pruner.name, layers))

    def layer_arguments(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer that reads `hidden` [B, K, D] in place of what the decoder was given."""
        since = self.here.since
        changed = dict(kwargs)
        if since is not None:
            rope, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
            if rope is not None:
                changed["position_embeddings"] = tuple(gather_rotations(part, since) for part in rope)
            if isinstance(positions, Tensor):
                changed["position_ids"] = gather_columns(positions, since.to(positions.device))
        changed["attention_mask"] = self._mask(layer, hidden, kwargs.get("attention_mask"))
        return changed

    @property
    def masks_every_layer(self) -> bool:
        """True when no single mask serves all layers, or the model has laid its own down."""
        return self.own_masks is not None or self.anatomy.has_windows

    def _mask(self, layer: int, hidden: Tensor, given: Any) -> Any:
        known = logical(self.prefill.cache, layer)
        history = () if known is None else known.history
        first = logical(self.prefill.cache)
        as_first = self.here.since is None and history == (() if first is None else first.history)
        if as_first and not (self.masks_every_layer and self.shortened):
            return given  # it was made for this stretch and this past
        kind = self.anatomy.kind_of(layer)
        key = (history, len(self.stretches), kind, hidden.device)
        if key not in self._masks:
            stored, here, past = self._stored_before(layer), self.here, self._past(layer)
            rows = past.continued(stored, here.valid, here.bias, hidden.shape[:2], 0)
            fits = fixed_size(self.prefill.cache, layer)
            self._masks[key] = layer_mask(rows, stored, hidden, self.backend, fits, self._sight(layer, stored, hidden))
        return self._masks[key]

    def _sight(self, layer: int, stored: int, hidden: Tensor) -> Sight:
        own, window, kind = self.own_masks, self.anatomy.window_of(layer), self.anatomy.kind_of(layer)
        columns = None if window is None else self._columns(layer, stored, self.here).to(hidden.device)
        given = None if own is None else own.get(kind, own.get("all"))
        if given is None:  # plainly causal
            return Sight(window, columns)
        start = self.seen if is_static(self.prefill.cache) else None
        among = seen_among(given, self.here.index, self.length, start)
        return Sight(window, columns, among.to(hidden.device))

    def _columns(self, layer: int, stored: int, stretch: Stretch) -> Tensor:
        """Where the rows stored before this prefill and those of it stood among all tokens seen, [B, S + K]."""
        batch, device, index = *self.prefill.hidden.shape[:1], self.prefill.hidden.device, stretch.index
        known = logical(self.prefill.cache, layer)
        dropped = 0 if known is None else known.dropped
        past = self._past(layer).columns_of(batch, stored, dropped, device)
        new = torch.arange(self.length, device=device).expand(batch, -1) if index is None else index.clamp(min=0)
        return torch.cat([past, new.to(device) + self.seen], 1)

    def finish(self) -> None:
        """Tell the cache what was stored in it."""
        cache = self.prefill.cache
        if cache is None or not self.shortened:
            return
        known: dict[Any, StoredRows] = {}
        for layer, own in enumerate(cache.layers):
            stretch = self._stretch_of(layer)
            past = own.rows if isinstance(own, LogicalLayer) else self.prefill.past
            key = (id(past), stretch.first, getattr(own, "device", None))
            if key not in known:
                stored = stored_length(cache, layer) - stretch.width if self.seen else 0
                floor = stored + stretch.width - stretch.tail
                if stretch.index is None:
                    floor = past.floor
                shape = (self.prefill.hidden.shape[0], stretch.width)
                rows = past.continued(stored, stretch.valid, stretch.bias, shape, floor)
                if self.anatomy.has_windows:
                    rows = replace(rows, columns=self._columns(layer, stored, stretch))
                known[key] = fitting(cache, layer, rows)
            record_dropped(cache, layer, self.length - stretch.width, known[key], stretch.first)

    def _stretch_of(self, layer: int) -> Stretch:
        return next(stretch for stretch in reversed(self.stretches) if stretch.first <= layer)

    def lengthen(self, hidden: Tensor, layers: int) -> Tensor:
        """A hidden state [B, K, D] that `layers` layers made (-1: all of them), at the caller's length [B, L, D]."""
        made = self.here if layers < 0 else self._stretch_of(max(layers - 1, 0))
        if made.width != hidden.shape[1]:  # recorded where the next layer reads it, a stage later
            made = self._stretch_of(layers)
        if made.index is None:
            return hidden
        return restore_columns(hidden, made.index, self.length, padded=made.valid is not None)


def chained(first: Tensor | None, then: Tensor) -> Tensor:
    """The columns [B, K2] among the columns [B, K1] of `first`, -1 = padding; None = all."""
    if first is None:
        return then
    return torch.where(then >= 0, first.to(then.device).gather(1, then.clamp(min=0)), -1)


def gather_rotations(part: Tensor, index: Tensor) -> Tensor:
    """Cosines or sines [..., B or 1, L, D] for the columns `index` [B, K]."""
    index = index.to(part.device).clamp(min=0)
    lead = part.shape[:-3]
    places = index[..., None].expand(*lead, *index.shape, part.shape[-1])
    return part.expand(*lead, index.shape[0], *part.shape[-2:]).gather(-2, places)


@dataclass(frozen=True)
class Decided:
    """What a stage before decoder layer `layer` was told of all images (`maps`), and what it has left of them."""

    layer: int
    maps: Sequence[Tensor | None]
    standing: Sequence[Selection]


def told(
    images: Sequence[tuple[int, int, Grid]],
    decided: Sequence[Callable[[], Decided]],
    clock: Stopwatch,
    method: str,
    layers: int,
) -> tuple[list[ImageReport], float]:
    """What has become of the images (sample, number in it, grid), fetched from the device, and the seconds it took."""
    seconds, reports = clock.seconds(), []  # (which waits until all is decided, whatever queue it was decided in)
    stages = [one() for one in decided]
    for number, (sample, image, grid) in enumerate(images):
        parts = []
        for stage in stages:
            one, standing = stage.maps[number], stage.standing[number]
            parts.append(
                StageReport(
                    layer=stage.layer,
                    importance=None if one is None else one.float().cpu().reshape(grid),
                    kept=standing.kept.cpu(),
                    source=standing.source.cpu(),
                    sizes=standing.sizes.cpu(),
                    tokens_after=standing.kept.numel(),
                )
            )
        now = stages[-1].standing[number] if stages else untouched(math.prod(grid))
        reports.append(
            ImageReport(
                sample=sample,
                image=image,
                grid=grid,
                importance=next((one.importance for one in parts if one.importance is not None), None),
                kept=now.kept.cpu(),
                source=now.source.cpu(),
                sizes=now.sizes.cpu(),
                tokens_before=math.prod(grid),
                tokens_after=now.kept.numel(),
                seconds=seconds,
                method=method,
                stages=tuple(parts),
                layers=layers,
            )
        )
    return reports, seconds


def untouched(tokens: int) -> Selection:
    """The selection that keeps everything."""
    return Selection.pure(torch.arange(tokens), tokens)


def cache_layer_masks(cache: Any, layer: int, hidden: Tensor, backend: str, window: int | None) -> Any:
    """The mask of one layer for `hidden` [B, Q, D] that follow what a pruned cache stores there."""
    known = logical(cache, layer)
    assert known is not None
    if isinstance(known, LogicalStaticLayer):
        return known.static_mask(hidden.shape[1], backend, hidden.dtype)
    stored, (batch, queries) = stored_length(cache, layer), hidden.shape[:2]
    columns = None
    if window is not None:
        columns = known.rows.columns_of(batch, stored + queries, known.dropped, hidden.device)
    return layer_mask(known.rows, stored, hidden, backend, sight=Sight(window, columns))
