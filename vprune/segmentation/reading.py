"""One pass of a model over a prompt, with the attention of every layer shown to an extractor as it goes by."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vprune.attach import Pruning
from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy, dissect
from vprune.models.probe import Captured, capture
from vprune.pruner import Pruner
from vprune.records import Grid, Prefill, Selection

_MASKED = float("-inf")


@dataclass(frozen=True)
class SeenImage:
    """An image as it stands in the sequence that the layers read.

    `columns` LongTensor [K], ascending; `grid` (t, h, w) of its N tokens before pruning; `standing` tells which of the
    K rows stands for each of the N tokens.
    """

    columns: Tensor
    grid: Grid
    standing: Selection


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer over one sequence of N rows, computed a head at a time and never kept.

    `query` [H, N, D], `key` [G, N, D], G dividing H; `mask` float32 [N, N] (or broadcastable), added to the logits.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(self.query.shape[0])

    def head(self, number: int) -> Tensor:
        """All rows of one head: float32 [N, N], each summing to one."""
        key = self.key[number * self.key.shape[0] // self.heads].float()
        logits = self.query[number].float() @ key.T * self.scale + self.mask
        return logits.softmax(-1)

    def rows(self, rows: Tensor) -> Tensor:
        """Some rows of all heads: float32 [H, R, N]."""
        key = self.key.repeat_interleave(self.heads // self.key.shape[0], 0).float()
        logits = self.query[:, rows].float() @ key.transpose(1, 2) * self.scale
        return (logits + self.mask.expand(self.query.shape[1], -1)[rows]).softmax(-1)


class Stream(Protocol):
    """What becomes of the attention of the layers, first to last; only those in `layers` are looked at."""

    layers: range

    def layer(self, number: int, attention: LayerAttention) -> None:
        """Take in the attention of one layer."""

    def finish(self) -> Tensor:
        """The map of every row asked for, over all columns: float32 [R, N]."""


class Extractor(Protocol):
    """A way to make maps of attention."""

    def begin(self, layers: int, visual: Tensor, rows: Tensor) -> Stream:
        """A stream for one pass: `visual` bool [N] marks visual tokens, `rows` LongTensor [R] are asked for."""


@dataclass
class Reading:
    """What a pass showed: `maps` float32 [R, K], what the rows asked for attend to, over the K `tokens` read."""

    images: Sequence[SeenImage]
    maps: Tensor
    tokens: int

    @property
    def visual_tokens(self) -> tuple[int, int]:
        """Visual tokens of all images, and how many of them were read."""
        return sum(len(one.standing.source) for one in self.images), sum(len(one.columns) for one in self.images)

    def on_grid(self, image: int = 0) -> Tensor:
        """The maps [R, N] of one image on its full grid: float32 [R, t, h, w]; what was merged shares evenly.

        A token that is represented by a row gets that row's map, times its share of the row; a dropped token gets zero.
        """
        seen = self.images[image]
        own = self.maps[:, seen.columns.to(self.maps.device)].cpu()
        source, weights = seen.standing.source, seen.standing.weights.to(own.dtype)
        spread = torch.where(source >= 0, own[:, source.clamp(min=0)] * weights, 0.0)
        return spread.reshape(len(own), *seen.grid)


class _Enough(Exception):  # noqa: N818 - a signal that is always caught, no error
    """All that an extractor looks at has been seen."""


class _Whole(Pruner):
    """A method that prunes nothing and yet is shown every prompt before the decoder runs."""

    @property
    def keeps_all(self) -> bool:
        return False


@torch.no_grad()
def read(
    model: Any, inputs: Mapping[str, Any], rows: Sequence[int], extractor: Extractor, method: Pruner | None = None
) -> Reading:
    """Run `model` once over one prompt and make maps of what its rows attend to.

    Nothing of size N x N is kept over layers unless the extractor keeps it: each layer's queries and keys are captured
    as they are computed (whatever the attention backend), shown to the extractor and let go. The pass ends before the
    last layer that the extractor looks at has done its work.

    Args:
        model: a vision-language model.
        inputs: what its processor made of one prompt.
        rows: places in `input_ids` whose attention is wanted.
        extractor: see `vprune.segmentation.maps`.
        method: prunes the image before the first layer; None reads all of it.

    Raises:
        VPruneError: a batch of several prompts, a method that prunes at later layers, no image in the prompt.
    """
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise VPruneError(f"maps are read from one prompt at a time, and {ids.shape[0]} were given")
    anatomy = dissect(model)
    pruning = Pruning(model, method if method is not None else _Whole(keep=1.0, name="whole"))
    # (The stages of some methods follow from the model's layers.)
    if any(layer for layer, _ in pruning.pruner.schedule):
        raise VPruneError("maps need a method that prunes before the first layer only, and leave stages at null")
    watch = _Watch(pruning, anatomy, ids.shape[1], torch.tensor(list(rows)), extractor)
    with pruning, watch.hooked(), suppress(_Enough):
        model(**inputs, use_cache=False)
    if watch.stream is None:
        raise VPruneError("this prompt holds no image: maps are of what is attended to in one")
    return Reading(watch.images, watch.stream.finish(), watch.tokens)


class _Watch:
    """Hooks on the decoder's attention modules for the time of one pass."""

    def __init__(self, pruning: Pruning, anatomy: Anatomy, length: int, rows: Tensor, extractor: Extractor) -> None:
        self.pruning, self.anatomy, self.length, self.rows, self.extractor = pruning, anatomy, length, rows, extractor
        self.prefill: Prefill | None = None
        self.stream: Stream | None = None
        self.images: list[SeenImage] = []
        self.tokens = length
        self._probing = False
        # What offloads weights does so at the end of each module.
        self._to_the_end = hasattr(pruning._model, "hf_device_map")
        own = copy.copy(pruning.pruner)
        score = own.score

        def scored(prefill: Prefill) -> list[Tensor | None]:
            self.prefill = prefill
            self._probing = True  # a scorer may call the same modules for itself
            try:
                return score(prefill)
            finally:
                self._probing = False

        # The copy is this pass's alone: what its method is shown is what we need to know, too.
        own.score = scored  # type: ignore[method-assign]
        pruning.pruner = own

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [
            layer.self_attn.register_forward_pre_hook(self._seen(number), with_kwargs=True)
            for number, layer in enumerate(self.anatomy.layers)
            if isinstance(layer.self_attn, nn.Module)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _seen(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._probing or self.prefill is None:
                return
            if self.stream is None:
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                self._begin(hidden.shape[1], hidden.device)
            assert self.stream is not None
            if number not in self.stream.layers:
                return
            self._probing = True
            try:
                caught = capture(module, *args, **kwargs)
            finally:
                self._probing = False
            self.stream.layer(number, self._attention(number, caught, kwargs.get("attention_mask")))
            if number == self.stream.layers[-1] and not self._to_the_end:
                raise _Enough

        return hook

    def _begin(self, tokens: int, device: torch.device) -> None:
        """Where everything stands in the sequence that the layers read."""
        assert self.prefill is not None
        self.tokens = tokens
        place = torch.arange(self.length)
        reports = list(self.pruning.last or ())
        gone = torch.zeros(self.length, dtype=torch.bool)
        for image, report in zip(self.prefill.images, reports, strict=True):
            lost = torch.ones(len(image), dtype=torch.bool)
            lost[report.kept] = False
            gone[image.columns.cpu()[lost]] = True
        place = torch.where(gone, -1, (~gone).long().cumsum(0) - 1)
        visual = torch.zeros(tokens, dtype=torch.bool)
        for image, report in zip(self.prefill.images, reports, strict=True):
            columns = place[image.columns.cpu()[report.kept]]
            visual[columns] = True
            stands = report.source >= 0
            weights = torch.where(stands, 1.0 / report.sizes[report.source.clamp(min=0)].clamp(min=1), 0.0)
            standing = Selection(report.kept, len(report.source), report.source, weights.double(), report.sizes)
            self.images.append(SeenImage(columns, report.grid, standing))
        self.stream = self.extractor.begin(len(self.anatomy.layers), visual.to(device), place[self.rows].to(device))

    def _attention(self, number: int, caught: Captured, mask: Any) -> LayerAttention:
        tokens, device = self.tokens, caught.query.device
        if isinstance(mask, Tensor) and mask.ndim == 4:
            given = mask[0, 0, :, :tokens]
            added = given.float()
            if given.dtype == torch.bool:
                added = torch.zeros(given.shape, device=device).masked_fill_(~given, _MASKED)
        else:
            place = torch.arange(tokens, device=device)
            behind = place[:, None] - place
            window = self.anatomy.window_of(number)
            hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
            added = torch.zeros(tokens, tokens, device=device).masked_fill_(hidden, _MASKED)
        return LayerAttention(caught.query[0], caught.key[0], caught.scale, added)
