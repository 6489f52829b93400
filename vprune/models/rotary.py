"""Rotary embeddings of the positions of a prompt, as the decoder makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vprune.errors import VPruneError

_UNCHANGING = ("default", "linear", "llama3", "yarn")  # the others look at how long the prompt is


@dataclass(frozen=True)
class Known:
    """What was made of positions [1, L]: cosines and sines [1, L, D], from `frequencies` of that `version`."""

    positions: Tensor
    made: tuple[Tensor, ...]
    frequencies: Tensor
    version: int

    def of(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, ...] | None:
        """The same for positions [B, L'], which begin these in every row; None if they do not."""
        if frequencies is not self.frequencies or frequencies._version != self.version:
            return None
        if positions.shape == self.positions.shape and torch.equal(self.positions, positions):
            return self.made
        length = positions.shape[1]
        own = self.positions[:, :length]
        if own.shape[1] < length:
            return None
        if not torch.equal(own.expand_as(positions), positions):
            return None
        return tuple(part[:, :length] for part in self.made)


_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, str | None], Known]] = WeakKeyDictionary()


def rotations(decoder: Any, layer: int, below: bool, hidden: Tensor, positions: Tensor) -> Any:
    """The rotary embeddings of a layer: some decoders have several kinds of layers that rotate differently.

    On a CPU those of one prompt serve the next one: most are counted from zero. ([1, L, D] may then stand for a batch.)

    Raises:
        VPruneError: the kinds rotate differently, and layers `below` would have to run first.
    """
    rotary = decoder.rotary_emb
    kind = decoder.config.layer_types[layer] if _rotates_by_kind(type(rotary).forward) else None
    if kind is not None and below:
        raise VPruneError(
            f"layer={layer}: the layers of this decoder are of several kinds; only the layer of the stage is possible"
        )
    told = () if kind is None else (kind,)
    frequencies = _frequencies(rotary, kind) if hidden.device.type == "cpu" and positions.ndim == 2 else None
    if frequencies is None:
        with torch.inference_mode(False):  # (some keep what they rotate by, and are the model's)
            return rotary(hidden, positions, *told)
    known = _KNOWN.setdefault(rotary, {})
    found = known[hidden.dtype, kind].of(positions, frequencies) if (hidden.dtype, kind) in known else None
    if found is not None:
        return found
    with torch.inference_mode(False):  # else a model that learns could not use them later
        made = rotary(hidden, positions, *told)
        first = positions[:1]
        if torch.equal(first.expand_as(positions), positions) and all(part.ndim == 3 for part in made):
            one = tuple(part[:1].clone() for part in made)  # (a view would hold on to the whole batch)
            known[hidden.dtype, kind] = Known(first.clone(), one, frequencies, frequencies._version)
    return made


def _frequencies(rotary: Any, kind: str | None) -> Tensor | None:
    """What a kind of layer rotates by, where that changes with no prompt and nobody looks on; else None."""
    how = getattr(rotary, "rope_type", None)
    how = how.get(kind) if isinstance(how, dict) else how
    found = getattr(rotary, "inv_freq" if kind is None else f"{kind}_inv_freq", None)
    watched = rotary._forward_hooks or rotary._forward_pre_hooks or hasattr(rotary, "_hf_hook")
    fixed = how in _UNCHANGING and not watched and isinstance(found, Tensor) and not found.is_inference()
    return found if fixed else None


@cache
def _rotates_by_kind(forward: Callable[..., Any]) -> bool:
    return "layer_type" in signature(forward).parameters


def rotary_positions(positions: Tensor) -> Tensor:
    """The rows of position ids that rotate: `generate` puts those of the text, for masks, before M-RoPE's three."""
    return positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 else positions
