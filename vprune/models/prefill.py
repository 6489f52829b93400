"""What a decoder is called with: read before, exchanged for something shorter, put back to length after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy, newline_places, visual_kinds, visual_layout
from vprune.models.aside import fetched, sent
from vprune.models.breaks import breaks_to_come
from vprune.models.cache import NOTHING_KNOWN, StoredRows, cache_for, cache_in, is_static, logical, stored_length
from vprune.models.masks import DENSE_BACKENDS, new_rows_valid, padding_mask, plainly_causal, valid_of_finished
from vprune.records import Prefill, TowerImage, VisualTokens, instruction_rows


@dataclass(frozen=True)
class Facts:
    """What follows from a prompt's places alone, on the CPU.

    `valid` bool [B, L]: no padding; `kinds` bool [kinds, B, L]: places of pictures and of videos; `behind` LongTensor
    [B, L]: how many valid columns follow; `instruction` as in `Prefill`, `instruction_sent` on the prompt's device, and
    its `tail` as `instruction_tail`.
    """

    valid: Tensor
    kinds: Tensor
    behind: Tensor
    instruction: tuple[Tensor, Tensor]
    instruction_sent: tuple[Tensor, Tensor]
    tail: int

    @classmethod
    def of(cls, kinds: Tensor, mask: Tensor | None, device: torch.device) -> Facts:
        """Find them out from a mask [B, S + L] (None = no padding), both on the CPU, of a prompt on `device`."""
        length = kinds.shape[-1]
        valid = torch.ones_like(kinds[0]) if mask is None else mask[:, -length:].to(torch.bool)
        kinds = kinds & valid
        behind = valid.sum(-1, keepdim=True) - valid.cumsum(-1)
        rows, row_valid = instruction_rows(valid, kinds.any(0))
        sent_there = (sent(rows, device), sent(row_valid, device))
        at_the_end = bool(row_valid.all()) and int(rows[:, 0].min()) + rows.shape[1] == length
        return cls(valid, kinds, behind, (rows, row_valid), sent_there, rows.shape[1] if at_the_end else 0)


@dataclass(frozen=True)
class Glance:
    """A look at a prompt before the vision tower is in the device's queue: later, the host would wait for the tower.

    `mask`: the caller's, [B, S + L], None if there is none; `on_host` hands over, on the CPU, where they are on their
    way, the prompt's ids [B, L] (or the `kinds` of a prompt without), the same mask, and whether a mask that came
    finished is `plainly_causal`. `tell_breaks` tells the places of line breaks, bool [B, L] on the CPU, or None where
    nobody can yet. `seen`: tokens that the cache has seen. `make_cache` makes one where the model was given none and
    may want one, else None.
    """

    anatomy: Anatomy
    device: torch.device
    mask: Tensor | None
    on_host: Callable[[], Sequence[Tensor | None]]
    tell_breaks: Callable[[Tensor], Tensor | None]
    seen: int = 0
    make_cache: Callable[[], Any] | None = None

    @classmethod
    def at(cls, anatomy: Anatomy, kwargs: Mapping[str, Any], input_ids: Tensor | None) -> Glance:
        """Look now at what the model was called with."""
        cache, mask, plain = cache_in(kwargs), kwargs.get("attention_mask"), None
        # (What can be found out on the CPU, beside the tower's work, launches nothing here, where a GPU is idle.)
        read = visual_kinds(anatomy, None, kwargs.get("inputs_embeds")) if input_ids is None else input_ids
        seen = 0 if cache is None else int(cache.get_seq_length())
        finished = next(iter(mask.values())) if isinstance(mask, dict) and len(mask) == 1 else mask
        if not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = None
        if isinstance(finished, Tensor) and finished.ndim == 4 and is_static(cache) and not seen:
            mask = valid = valid_of_finished(finished, read.shape[-1])
            plain = plainly_causal(finished, valid)
        given = cache is not None or kwargs.get("use_cache") is False
        make = None if given else partial(new_cache, anatomy)
        on_host = fetched((read, mask, plain))
        return cls(anatomy, read.device, mask, on_host, breaks_to_come(anatomy, kwargs), seen, make)

    @cached_property
    def kinds_on_host(self) -> Tensor:
        """The places of pictures and of videos, bool [kinds, B, L] on the CPU."""
        read, *_ = self.on_host()
        assert read is not None
        return read if read.dtype == torch.bool else visual_kinds(self.anatomy, read, None)

    @cached_property
    def kinds(self) -> Tensor:
        """The same on the prompt's device."""
        return sent(self.kinds_on_host, self.device)

    @property
    def plain(self) -> bool:
        """True where the model was given a finished mask that says no more than `mask` does."""
        plain = self.on_host()[2]
        return plain is not None and bool(plain)

    @cached_property
    def sees_any(self) -> bool:
        """True when there are visual tokens."""
        return bool(self.kinds_on_host.numpy().any())  # (torch would wake all cores for it)

    @cached_property
    def breaks(self) -> Tensor | None:
        """The places of line breaks, as far as they are known before the decoder's inputs are there."""
        return self.tell_breaks(self.kinds_on_host)

    @cached_property
    def cache(self) -> Any:
        """A cache for the decoder, which would make its own, out of our sight; None where it is given one."""
        return None if self.make_cache is None else self.make_cache()

    @cached_property
    def facts(self) -> Facts:
        """What follows if the decoder is given the same mask."""
        return Facts.of(self.kinds_on_host, self.on_host()[1], self.device)

    @cached_property
    def layout(self) -> tuple[bytes | None, ...]:
        """The places of pictures, of what is no padding and of line breaks, to be told from others."""
        return tuple(
            None if one is None else one.numpy().tobytes()
            for one in (self.kinds_on_host, self.facts.valid, self.breaks)
        )

    def facts_with(self, mask: Tensor | None) -> Facts:
        """What follows with the mask that the decoder is given; another one is read from the device."""
        if mask is self.mask:
            return self.facts
        return Facts.of(self.kinds_on_host, None if mask is None else mask.cpu(), self.device)


def new_cache(anatomy: Anatomy) -> Any:
    """The cache that a decoder makes for itself when it is given none."""
    from transformers import DynamicCache

    config: Any = anatomy.decoder.config
    return DynamicCache(config=config)


def with_cache(anatomy: Anatomy, kwargs: dict[str, Any], glance: Glance) -> dict[str, Any]:
    """The decoder's arguments with the cache that it would otherwise make for itself.

    Raises:
        VPruneError: a static cache with sliding windows, or for an attention backend whose masks are not built here.
    """
    config: Any = anatomy.decoder.config
    cache = cache_in(kwargs)
    wanted = kwargs.get("use_cache")
    if cache is None and (wanted or (wanted is None and getattr(config, "use_cache", False))):
        made = glance.cache
        if made is None or stored_length(made):  # (a second look at the same prompt starts anew)
            made = new_cache(anatomy)
        return {**kwargs, **cache_for(anatomy.decoder, made)}
    if is_static(cache):
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise VPruneError(
                "a static cache with sliding-window layers cannot be pruned: "
                "leave cache_implementation at its default, 'dynamic'"
            )
        if anatomy.backend not in DENSE_BACKENDS:
            raise VPruneError(
                f"a static cache cannot be pruned with attention implementation {anatomy.backend!r}: "
                f"use one of {', '.join(DENSE_BACKENDS)}, or leave cache_implementation at its default, 'dynamic'"
            )
    return kwargs


def masks_of_model(kwargs: dict[str, Any], given_to_model: Tensor | None) -> dict[str, Any] | None:
    """The finished masks per kind of layer that a model hands to its decoder, "all" if one serves all; else None.

    (Pictures that see themselves both ways: Gemma 3, PaliGemma. `generate` finishes plain causal masks for static
    caches; those are handed on by models that were given them.)
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        return None if needs_none(mask) else mask
    if isinstance(mask, Tensor) and mask.ndim == 4 and (given_to_model is not None or is_static(cache_in(kwargs))):
        return {"all": mask}
    return None


def needs_none(mask: Any) -> bool:
    """True of a finished mask by which every kind of layer does without one: its kernel is told what is causal."""
    return isinstance(mask, dict) and all(one is None for one in mask.values())


def callers_mask(kwargs: dict[str, Any], given_to_model: Tensor | None, seen: int | None = None) -> Any:
    """The mask of the prompt as the caller passed it, [B, length] or None, whatever was made of it since.

    `seen`: tokens that the cache has seen, None = it is asked.
    """
    cache = cache_in(kwargs)
    mask, queries = kwargs.get("attention_mask"), kwargs["inputs_embeds"].shape[1]
    finished = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    if given_to_model is not None and (finished or is_static(cache)):
        return given_to_model
    if queries > 1 and is_static(cache) and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return padding_mask(mask, (int(cache.get_seq_length()) if seen is None else seen) + queries)
    return None if isinstance(mask, dict) else mask


def read_prefill(
    anatomy: Anatomy,
    kwargs: dict[str, Any],
    glance: Glance,
    tower: Sequence[TowerImage],
    evidence: Sequence[Any] | None,
) -> Prefill:
    """Describe the prefill that the decoder is about to run with `kwargs`.

    Raises:
        VPruneError: a mask that is not [batch, length], or visual tokens that are no whole images.
    """
    inputs, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), cache_in(kwargs)
    (batch, length, _), device = inputs.shape, inputs.device
    valid = new_rows_valid(mask, length, device)
    if valid is None:
        valid = torch.ones((batch, length), dtype=torch.bool, device=device)
    facts = glance.facts_with(mask)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(glance.seen, glance.seen + length, device=device)[None]
    stored = stored_length(cache) if glance.seen else 0
    newlines = glance.breaks
    if newlines is None:
        there = newline_places(anatomy, inputs)
        newlines = None if there is None else there.cpu()  # the host waits for the vision tower
    images = visual_layout(anatomy, list(facts.kinds), tower, newlines)
    return Prefill(
        anatomy=anatomy,
        hidden=inputs,
        positions=positions,
        valid=valid,
        visual=(glance.kinds.to(device) & valid).any(0),
        images=_sent(images, facts.behind, device),
        tower=list(tower),
        evidence=evidence,
        cache=cache,
        stored=stored,
        seen=glance.seen,
        past=_past_rows(cache, mask, stored),
        deepstack=len(kwargs.get("deepstack_visual_embeds") or ()),
        counts=tuple(facts.valid.sum(-1).tolist()),
        instruction=facts.instruction,
        instruction_sent=facts.instruction_sent,
        instruction_tail=facts.tail,
    )


def _sent(images: Sequence[VisualTokens], behind: Tensor, device: torch.device) -> list[VisualTokens]:
    """The images with their columns on the device, sent there together; `behind` as in `Facts`."""
    if not images:
        return []
    all_columns, sizes = torch.cat([one.columns for one in images]), [len(one) for one in images]
    ends = torch.tensor(sizes).cumsum(0)
    last = all_columns[ends - 1]
    first = all_columns[ends - torch.tensor(sizes)]
    starts: list[int] = torch.where(last - first == torch.tensor(sizes) - 1, first, -1).tolist()
    after: list[int] = behind[torch.tensor([image.sample for image in images]), last].tolist()
    columns = torch.split(sent(all_columns, device), sizes)
    found = zip(images, columns, after, starts, strict=True)
    return [replace(image, columns=own, after=more, start=start) for image, own, more, start in found]


def _past_rows(cache: Any, mask: Any, stored: int) -> StoredRows:
    """What is known of the rows stored: by a pruned cache itself, else by the mask of the whole prompt."""
    layer = logical(cache)
    if layer is not None:
        return layer.rows
    if not stored or not isinstance(mask, Tensor) or mask.ndim != 2:
        return NOTHING_KNOWN
    valid = mask[:, :stored].to(torch.bool)
    return NOTHING_KNOWN if bool(valid.all()) else replace(NOTHING_KNOWN, valid=valid)


def restored(output: Any, lengthen: Callable[[Tensor, int], Tensor]) -> Any:
    """The decoder's output with every hidden state passed through `lengthen`, beside how many layers made it."""
    if isinstance(output, tuple):
        return (lengthen(output[0], -1), *output[1:])
    output["last_hidden_state"] = lengthen(output["last_hidden_state"], -1)
    states = output.get("hidden_states")
    if states is not None:
        last = len(states) - 1
        output["hidden_states"] = tuple(lengthen(one, -1 if n == last else n) for n, one in enumerate(states))
    return output


def shortened_deepstack(kwargs: dict[str, Any], shorten: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The features that are added at visual places after each of the first layers (DeepStack), for a shorter batch."""
    marks, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if marks is None or features is None:
        return {}

    def dense(rows: Tensor) -> Tensor:
        return rows.new_zeros((*marks.shape, rows.shape[-1])).masked_scatter(marks[..., None], rows)

    remain = shorten(marks[..., None].to(features[0].dtype)).squeeze(-1) > 0.5
    return {
        "visual_pos_masks": remain,
        "deepstack_visual_embeds": [shorten(dense(rows.to(marks.device)))[remain] for rows in features],
    }
