"""Cache layers with a logical length: what they have seen, while they store less.

`generate` asks a cache how long it is to slice ids, count positions and size masks. After pruning, a layer stores fewer
rows than it has seen; answering with the number seen, and with an offset for the mask (the contract of sliding
windows), keeps all of that right by itself, for beams, crops and later turns too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache as memoise
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vprune.errors import VPruneError
from vprune.models.aside import numbers_on

_NAMES = ("cache", "past_key_values")  # of the argument: from transformers 5.24 on, and before


@memoise
def _name_for(kind: Any) -> str:
    return _NAMES[0] if _NAMES[0] in signature(kind.forward).parameters else _NAMES[1]


def cache_for(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a decoder, a layer or its attention takes a cache."""
    own: Any = type(module)
    return {_name_for(own): cache}


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of such a module, None if there is none."""
    return next((one for name in _NAMES if (one := kwargs.get(name)) is not None), None)


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of such a module but for the cache."""
    return {name: value for name, value in kwargs.items() if name not in _NAMES}


@dataclass(frozen=True)
class StoredRows:
    """What is known of the first V rows that a cache layer stores; all later rows are valid and unmerged.

    `valid` bool [B, V] (False: padding), None when all are; `bias` [B, V] float32 or 64, log size of merged rows, None
    when there is none. `floor` stored rows at the start may not be cropped one by one, since rows among them were
    dropped. `columns` LongTensor [B, V]: where they stood among all tokens seen, for layers that look back a limited
    way (None elsewhere, and where nothing was dropped).
    """

    valid: Tensor | None
    bias: Tensor | None
    floor: int
    columns: Tensor | None = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> StoredRows:
        valid, bias, columns = (
            None if part is None else change(part) for part in (self.valid, self.bias, self.columns)
        )
        return StoredRows(valid, bias, self.floor, columns)

    def reordered(self, index: Tensor) -> StoredRows:
        """The same for other rows of the batch, LongTensor or bool `index`."""
        return self._each(lambda part: part[index.to(part.device)])

    def repeated(self, repeats: int) -> StoredRows:
        """The same with every row of the batch `repeats` times."""
        return self._each(lambda part: part.repeat_interleave(repeats, 0))

    def cropped(self, length: int) -> StoredRows:
        """The same for the first `length` rows stored."""
        return self._each(lambda part: part[:, :length])

    def columns_of(self, batch: int, stored: int, dropped: int, device: torch.device) -> Tensor:
        """Where the first `stored` rows stood, LongTensor [B, stored], once `dropped` tokens in all were dropped."""
        columns = torch.arange(dropped, dropped + stored, device=device).expand(batch, -1)
        if self.columns is None:
            return columns
        return torch.cat([self.columns[:, :stored].to(device), columns[:, self.columns.shape[1] :]], 1)

    def continued(
        self, stored: int, valid: Tensor | None, bias: Tensor | None, shape: Sequence[int], floor: int
    ) -> StoredRows:
        """What is known after rows [B, K] of `shape` follow the `stored` ones."""

        def joined(old: Tensor | None, new: Tensor | None, fill: float | bool) -> Tensor | None:
            known = new if new is not None else old
            if known is None:
                return None
            batch, rows = shape
            parts = (widened(old, batch, stored, fill, known.device), widened(new, batch, rows, fill, known.device))
            return torch.cat(parts, 1)

        return replace(self, valid=joined(self.valid, valid, True), bias=joined(self.bias, bias, 0.0), floor=floor)


NOTHING_KNOWN = StoredRows(None, None, 0)


def widened(part: Tensor | None, batch: int, length: int, fill: float | bool, device: torch.device) -> Tensor:
    """What is known of the first rows, [B, V], continued to [B, `length`] with `fill`."""
    if part is None:
        dtype = torch.bool if isinstance(fill, bool) else torch.float32
        return torch.full((batch, length), fill, dtype=dtype, device=device)
    if part.shape[1] == length:
        return part.to(device)
    return torch.nn.functional.pad(part[:, :length], (0, length - part[:, :length].shape[1]), value=fill).to(device)


class LogicalLayer:
    """Mixed into a cache layer's own class: length and mask sizes count the dropped rows, storage does not."""

    dropped: int
    rows: StoredRows
    history: tuple[int, ...]  # where each prefill had last been shortened before it came to this layer
    _physical: int

    @contextmanager
    def physical(self) -> Iterator[None]:
        """Within the block the layer answers with what it stores."""
        self._physical += 1
        try:
            yield
        finally:
            self._physical -= 1

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens seen."""
        length = super().get_seq_length(*args, **kwargs)  # type: ignore[misc]
        return length if self._physical else length + self.dropped

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(keys stored after the next rows, offset of the first of them)."""
        with self.physical():
            length, offset = super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]
        return length, offset + self.dropped

    def crop(self, length: int) -> None:
        """Crop to `length` tokens seen, or, if negative, by so many tokens."""
        if length > 0:
            length = min(0, length - int(self.get_seq_length()))
        with self.physical():
            stored = int(self.get_seq_length())
            if stored + length < self.rows.floor:
                raise VPruneError(
                    f"cannot crop {-length} of {stored} stored rows: the first {self.rows.floor} hold a pruned image; "
                    "start with a new cache instead"
                )
            if length < 0:
                super().crop(length)  # type: ignore[misc]
        self.rows = self.rows.cropped(stored + length)

    def reset(self) -> None:
        """Forget everything."""
        with self.physical():
            super().reset()  # type: ignore[misc]
        self.dropped, self.rows, self.history = 0, NOTHING_KNOWN, ()
        if isinstance(self, LogicalStaticLayer):
            self._dropped = torch.zeros_like(self._dropped)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.rows = self.rows.reordered(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.rows = self.rows.repeated(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.rows = self.rows.reordered(indices)


class LogicalStaticLayer(LogicalLayer):
    """The same for layers of a fixed size: all that decoding asks for are tensors, so that its graph stays one."""

    _dropped: Tensor  # int64 [], beside the library's own count of stored rows
    max_cache_len: int
    cumulative_length: Tensor
    keys: Tensor

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens seen, a tensor []."""
        stored: Any = super(LogicalLayer, self).get_seq_length(*args, **kwargs)  # type: ignore[misc]
        return stored if self._physical or isinstance(stored, int) else stored + self._dropped

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(rows that fit, 0): masks over them are built here, not by the library."""
        return self.max_cache_len, 0

    def static_mask(self, queries: int, backend: str, dtype: torch.dtype) -> Tensor:
        """The mask [B, 1, queries, rows that fit] of the rows that are about to be stored."""
        rows, start = self.rows, self.cumulative_length
        assert rows.valid is not None
        index = torch.arange(self.max_cache_len, device=rows.valid.device)
        own = (torch.arange(queries, device=rows.valid.device) + start.reshape(()))[:, None]
        allowed = (rows.valid[:, None, None] & (index <= own)) | (index == own)
        if rows.bias is None and backend == "sdpa":
            return allowed
        shift = index.new_zeros((), dtype=dtype) if rows.bias is None else rows.bias[:, None, None].to(dtype)
        return torch.where(allowed, shift, max(torch.finfo(dtype).min, torch.finfo(torch.float32).min))


def is_static(cache: Any) -> bool:
    """True for a cache whose layers have a fixed size."""
    return any(getattr(layer, "is_compileable", False) for layer in getattr(cache, "layers", ()))


def fixed_size(cache: Any, number: int = 0) -> int | None:
    """How many rows layer `number` of a static cache has, None for a cache that grows."""
    return int(cache.layers[number].max_cache_len) if is_static(cache) else None


@memoise
def _logical_class(own: type) -> type:
    # Without its own `_layer_type` the library does not register the class as the one to build caches from.
    kind = LogicalStaticLayer if getattr(own, "is_compileable", False) else LogicalLayer
    return type(f"Logical{own.__name__}", (kind, own), {"_layer_type": None})


def logical(cache: Any, number: int = 0) -> LogicalLayer | None:
    """Layer `number` of a cache that was pruned, None when it was not (or there is none)."""
    layers = getattr(cache, "layers", ())
    layer = layers[number] if number < len(layers) else None
    return layer if isinstance(layer, LogicalLayer) else None


def of_one_kind(cache: Any) -> bool:
    """True when all layers of a pruned cache store the same rows: what holds for the first and the last holds for all.

    (Every prefill is shortened more and more on its way, so the layers between cannot differ from two equal ends.)
    """
    first, last = cache.layers[0], cache.layers[-1]
    return bool(first.history == last.history)


def stored_length(cache: Any, number: int = 0) -> int:
    """The number of rows that layer `number` of a cache stores."""
    if cache is None or number >= len(cache.layers):
        return 0
    layer = cache.layers[number]
    if isinstance(layer, LogicalLayer):
        with layer.physical():
            return int(layer.get_seq_length())
    return int(layer.get_seq_length())


def fitting(cache: Any, number: int, rows: StoredRows) -> StoredRows:
    """What is known of the rows of layer `number`, in the form in which a layer of its kind holds it."""
    layer = cache.layers[number]
    if not getattr(layer, "is_compileable", False):
        return rows
    # In one shape for every prompt, so that the graph of a decoding step serves the next prompt too.
    batch, fits, device = layer.keys.shape[0], layer.max_cache_len, layer.keys.device
    bias = None if rows.bias is None else widened(rows.bias, batch, fits, 0.0, device)
    return replace(rows, valid=widened(rows.valid, batch, fits, True, device), bias=bias)


def record_dropped(cache: Any, number: int, dropped: int, rows: StoredRows, stage: int) -> None:
    """Tell a layer that `dropped` of the tokens it has just seen were never stored, and what its rows are.

    `rows` as `fitting` makes them; `stage` is the layer before which they were dropped last.
    """
    layer = cache.layers[number]
    if not isinstance(layer, LogicalLayer):
        # Assigning __class__ fails for differing layouts: a new object takes over the attributes instead.
        own: Any = type(layer)
        other: Any = object.__new__(_logical_class(own))
        other.__dict__ = layer.__dict__
        other.dropped, other._physical, other.history = 0, 0, ()
        cache.layers[number] = layer = other
    layer.dropped += dropped
    layer.rows = rows
    layer.history = (*layer.history, stage)
    if isinstance(layer, LogicalStaticLayer):
        layer._dropped = numbers_on(layer.keys.device, (layer.dropped,))[0]


def note_newest(cache: Any, newest: Tensor) -> None:
    """Tell every layer of a pruned cache which of the rows that are about to come, bool [B, Q], are no padding."""
    known: dict[int, StoredRows] = {}  # layers that store the same rows share what is known of them
    for number, layer in enumerate(cache.layers):
        rows, key = layer.rows, id(layer.rows)
        if key not in known:
            stored = stored_length(cache, number)
            after = rows.cropped(stored).continued(stored, newest, None, newest.shape, rows.floor)
            known[key] = fitting(cache, number, after)
        layer.rows = known[key]


def past_keys_values(cache: Any, layer: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values [B, G, S, D] that a layer stores, None when it stores nothing."""
    length = stored_length(cache, layer)
    if not length:
        return None
    stored = cache.layers[layer]
    return stored.keys[:, :, :length], stored.values[:, :, :length]


class PastView:
    """A cache that is read and never written: earlier turns are seen, nothing of the probing is stored."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The stored rows followed by the given ones."""
        past = past_keys_values(self._cache, layer)
        if past is None:
            return keys, values
        return torch.cat([past[0].to(keys.device), keys], -2), torch.cat([past[1].to(values.device), values], -2)
