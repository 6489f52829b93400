"""Planning without the host: what was launched for one prompt is launched for all laid out alike, as a graph."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy
from vprune.models.aside import Stopwatch
from vprune.models.cache import StoredRows, cache_in
from vprune.models.prefill import Glance
from vprune.passage import Decided, Passage
from vprune.pruner import Pruner
from vprune.records import Prefill, TowerImage
from vprune.shortening import Shortening

MOST = 16  # layouts remembered at a time
_T = TypeVar("_T")


def recorded(work: Callable[[], _T], pool: Any) -> tuple[_T, Callable[[], None]]:
    """Do `work` as a CUDA graph is captured: what it returns, filled by each call of what comes with it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on with what a capture must not do.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()
    return result, graph.replay


class Replays:
    """The plans of one `Pruning` as CUDA graphs, one for each of the `MOST` layouts met last.

    The host launches some 200 small operations to score, select and recycle, which takes several times as long as the
    GPU works on them, and a short prefill waits for it. A layout is planned as ever when it is met first, recorded when
    it is met again, and replayed from then on: same kernels, same numbers.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Recording | str | None] = OrderedDict()
        self._pool: Any = None
        self._rows: Tensor | None = None  # the place that recordings read hidden rows from
        self._foreseen: tuple[Glance, tuple[int, ...]] | None = None

    def foresee(self, anatomy: Anatomy, pruner: Pruner, glance: Glance) -> None:
        """Find out what tells the prompt's layout from others while the device is at work on the vision tower."""
        hash(glance.layout)  # which its bytes remember
        self._foreseen = glance, _weights(anatomy, pruner)

    def begun(self, passage: Callable[[], Passage], reads: Reads) -> Begun:
        """A prefill planned up to the first layer; `passage` describes one that is not replayed."""
        glance, weights = self._foreseen or (None, ())
        layout = layout_of(reads, weights if glance is reads.glance else _weights(reads.anatomy, reads.pruner))
        self._foreseen = None
        known = self._known.get(layout)
        if isinstance(known, Recording):
            self._known.move_to_end(layout)
            return known.replayed(reads)
        new = passage()
        if layout is None or isinstance(known, str):
            return Begun.planned(new)
        if layout in self._known:
            self._known[layout] = made = self._recording(new, reads)
            if isinstance(made, Recording):
                return made.replayed(reads)
        else:
            if len(self._known) >= MOST:
                self._known.popitem(last=False)
            self._known[layout] = None
        return Begun.planned(new)

    def _recording(self, passage: Passage, reads: Reads) -> Recording | str:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else 0
        hidden = reads.hidden
        with torch.inference_mode(False):
            if self._rows is None or self._rows.dtype != hidden.dtype or self._rows.numel() < hidden.numel():
                self._rows = torch.empty(hidden.numel(), dtype=hidden.dtype, device=hidden.device)
            rows = self._rows[: hidden.numel()].view_as(hidden)
            try:
                return Recording(passage, reads, rows, self._pool)
            except VPruneError:
                raise
            except RuntimeError as error:
                first = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"graphs=True: planning for {tuple(hidden.shape)} rows could not be recorded as a CUDA graph "
                    f"({first}); it goes on without one",
                    stacklevel=2,
                )
                return first

    def forget(self) -> None:
        """Let go of all recordings and their memory."""
        self._known.clear()
        self._pool = self._rows = self._foreseen = None


@dataclass(frozen=True)
class Begun:
    """A prefill planned up to the first layer.

    `embeds` [B, K, D] and `positions`: what that layer reads; `short`: how they came to be, None if nothing was pruned;
    `past` and `stored` as in `Prefill`; `passage` tells the rest, which is known by now, or, `late`, can wait.
    """

    embeds: Tensor
    positions: Tensor
    short: Shortening | None
    past: StoredRows
    stored: int
    passage: Callable[[], Passage]
    late: bool = False

    @classmethod
    def planned(cls, passage: Passage) -> Begun:
        """Plan it now."""
        embeds, short = passage.enter(0, passage.prefill.hidden)
        now = passage.prefill
        return cls(embeds, now.positions, short, now.past, now.stored, lambda: passage)


class Recording:
    """The plan for one layout: hidden rows and positions in, what was decided out.

    Raises:
        RuntimeError: the work cannot be captured.
    """

    def __init__(self, passage: Passage, reads: Reads, rows: Tensor, pool: Any) -> None:
        given, self.pruner = passage.prefill, passage.pruner
        # What it reads beside rows and positions is the same for each prompt; `valid` may be the caller's own mask.
        self.prefill = replace(
            given, hidden=rows, positions=given.positions.clone(), valid=given.valid.clone(), cache=None, evidence=None
        )
        self._write(reads)
        self.plan, self._replay = recorded(partial(planned, self.pruner, self.prefill), pool)
        plan, taken = self.plan, self.plan.packed.taken
        # Of the replay that was last, for what is over before the next one.
        self._short = None if plan.short is None else _filled(plan.short, taken)
        self._positions = None if plan.short is None else taken(plan.positions)

    def _write(self, reads: Reads) -> None:
        self.prefill.hidden.copy_(reads.hidden)
        if reads.positions is not None:
            self.prefill.positions.copy_(reads.positions)

    def replayed(self, reads: Reads) -> Begun:
        """Plan a prefill of the layout."""
        clock, embeds = Stopwatch(), reads.hidden
        with clock.running(embeds):
            self._write(reads)
            self._replay()
        positions = self.prefill.positions if reads.positions is None else reads.positions
        if self.plan.shorter is not None and self._positions is not None:
            embeds, positions = self.plan.shorter.clone(), self._positions.clone()
        past, stored = self.prefill.past, self.prefill.stored
        passage = partial(self._passage, reads, clock, embeds, positions)
        return Begun(embeds, positions, self._short, past, stored, passage, late=True)

    def _passage(self, reads: Reads, clock: Stopwatch, embeds: Tensor, positions: Tensor) -> Passage:
        """What the last replay has decided, in numbers of its own."""
        given = self.prefill.positions if reads.positions is None else reads.positions
        now = replace(self.prefill, hidden=reads.hidden, positions=given, tower=reads.tower, cache=reads.cache)
        passage = Passage(self.pruner, now, None, clock)
        plan, packed = self.plan, self.plan.packed.copy()
        passage.told_of(lambda: mapped(plan.decided, packed.taken))
        if plan.short is not None:
            passage.move_on(0, _filled(plan.short, packed.taken), embeds, positions, packed.taken(plan.visual))
        return passage


def _filled(short: Shortening, taken: Callable[[Any], Tensor]) -> Shortening:
    """The same with tensors in place of the slots that the first layer asks for."""
    return replace(short, index=taken(short.index), bias=None if short.bias is None else taken(short.bias))


@dataclass(frozen=True)
class Plan:
    """What was decided about a prefill, and what is left of it; in place of all tensors but `shorter` their `Slot`."""

    decided: Decided
    packed: Packed
    short: Shortening | None = None
    shorter: Tensor | None = None
    positions: Any = None
    visual: Any = None


def planned(pruner: Pruner, prefill: Prefill) -> Plan:
    """The work that is recorded."""
    passage, packed = Passage(pruner, prefill, None), Packed()
    short = passage.decide(0, prefill.hidden)
    (decided,) = passage.decided
    told = mapped(decided, packed.put)
    if short is None:
        return Plan(told, packed.closed())
    shorter, *columns = short.shorten_all(prefill.hidden, prefill.positions, prefill.visual)
    positions, visual = (packed.put(part) for part in columns)
    # What merges and images hold is overwritten with the next prompt, and nobody asks for it after the first layer.
    short = mapped(replace(short, merges=(), images=()), packed.put)
    return Plan(told, packed.closed(), short, shorter, positions, visual)


class Slot:
    """Where a tensor of some shape lies among those of its dtype."""

    def __init__(self, dtype: torch.dtype, start: int, shape: torch.Size) -> None:
        self.dtype, self.shape = dtype, shape
        self.part = slice(start, start + shape.numel())


class Packed:
    """Tensors laid end to end, by dtype: as many copies as there are dtypes copy them all."""

    def __init__(self) -> None:
        self._lists: dict[torch.dtype, list[Tensor]] = {}
        self._ends: dict[torch.dtype, int] = {}
        self._flat: dict[torch.dtype, Tensor] = {}

    def put(self, tensor: Tensor) -> Slot:
        """Add one."""
        start = self._ends.get(tensor.dtype, 0)
        slot = Slot(tensor.dtype, start, tensor.shape)
        self._ends[tensor.dtype] = slot.part.stop
        self._lists.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
        return slot

    def closed(self) -> Packed:
        """The same when all are in."""
        self._flat, self._lists = {dtype: torch.cat(parts) for dtype, parts in self._lists.items()}, {}
        return self

    def copy(self) -> Packed:
        """The same numbers elsewhere."""
        other = Packed()
        other._flat = {dtype: flat.clone() for dtype, flat in self._flat.items()}
        return other

    def taken(self, slot: Slot) -> Tensor:
        """The one that was put there."""
        return self._flat[slot.dtype][slot.part].view(slot.shape)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same lists, tuples and records with every tensor (or `Slot`) in them changed."""
    if isinstance(value, Tensor | Slot):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(one, change) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: mapped(getattr(value, part.name), change) for part in fields(value)})
    return value


def replayable(pruner: Pruner) -> bool:
    """True when what a method decides follows from the rows and the layout of a prompt, and the host has no say in it.

    (Not from the tower's attention, from pixels or an annotation: their tensors are others with every prompt.)
    """
    scorer, own_plan = pruner.scorer, type(pruner).plan_alike is Pruner.plan_alike
    return (
        getattr(scorer, "reads_rows_only", False)
        and getattr(pruner.selector, "reads_rows_only", False)
        and own_plan
        and pruner.budget in ("image", "frame")
        and [layer for layer, _ in pruner.schedule] == [0]
    )


@dataclass(frozen=True)
class Reads:
    """What a prefill is described from, see `read_prefill`: `kwargs` are the decoder's before its first layer."""

    anatomy: Anatomy
    pruner: Pruner
    kwargs: Mapping[str, Any]
    glance: Glance
    tower: Sequence[TowerImage]
    own_masks: dict[str, Any] | None

    @property
    def hidden(self) -> Tensor:
        """The rows that the first layer is to read."""
        rows: Tensor = self.kwargs["inputs_embeds"]
        return rows

    @property
    def positions(self) -> Tensor | None:
        """Their positions, None where they are counted."""
        return self.kwargs.get("position_ids")

    @property
    def cache(self) -> Any:
        """What keys and values will be stored in."""
        return cache_in(self.kwargs)


def layout_of(reads: Reads, weights: tuple[int, ...]) -> Hashable | None:
    """All that tells a prefill from others but for its rows and positions; None where each is planned by itself."""
    hidden, glance, kwargs = reads.hidden, reads.glance, reads.kwargs
    settled = glance.seen or reads.own_masks is not None or kwargs.get("deepstack_visual_embeds")
    learning = torch.is_grad_enabled() and hidden.requires_grad
    unforeseen = glance.breaks is None and getattr(reads.anatomy.base, "image_newline", None) is not None
    if settled or learning or unforeseen or not recordable(hidden) or torch.is_autocast_enabled(hidden.device.type):
        return None
    positions, mask = reads.positions, kwargs.get("attention_mask")
    return (
        *glance.layout,
        None if mask is glance.mask else glance.facts_with(mask).valid.numpy().tobytes(),
        *(tuple((one.grid, one.call) for one in reads.tower), hidden.shape, hidden.dtype, hidden.device),
        None if positions is None else (positions.shape, positions.dtype),
        *weights,
    )


def recordable(hidden: Tensor) -> bool:
    """True where CUDA graphs are."""
    return hidden.is_cuda and not torch.cuda.is_current_stream_capturing()


def _weights(anatomy: Anatomy, pruner: Pruner) -> tuple[int, ...]:
    """Where the weights lie that planning reads: those of a model moved since lie elsewhere."""
    network = getattr(pruner.scorer, "network", None)
    layers = anatomy.layers[: (getattr(pruner.scorer, "layer", None) or 0) + 1]
    parts = layers if network is None else [*layers, network]
    return tuple(one.data_ptr() for part in parts for one in part.parameters())
