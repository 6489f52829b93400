"""Queries and keys of any attention layer, whatever the attention backend: the layer is called and stopped half-way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vprune.errors import VPruneError
from vprune.models.cache import PastView, cache_for, widened
from vprune.models.masks import attention_mask_4d
from vprune.records import Prefill

_PROBE = "vprune_probe"
_LOCK = threading.RLock()  # a config is shared by all threads that run the model


class Captured(Exception):  # noqa: N818 - a signal that is always caught, no error
    """Carries queries [B, H, R, D] and keys [B, G, N, D] of a layer, normed and rotated, and its scale."""

    def __init__(self, query: Tensor, key: Tensor, scale: float) -> None:
        super().__init__("an attention probe was not caught")
        self.query, self.key, self.scale = query, key, scale


def _stop(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> NoReturn:
    scale = kwargs.get("scaling")
    raise Captured(query, key, query.shape[-1] ** -0.5 if scale is None else float(scale))


@contextmanager
def attention_swapped(config: Any, implementation: str) -> Iterator[None]:
    """Run with another attention implementation in `config`, under a lock, and put the own one back."""
    with _LOCK:
        own = config._attn_implementation
        config._attn_implementation = implementation
        try:
            yield
        finally:
            config._attn_implementation = own


@contextmanager
def _probe_registered() -> Iterator[None]:
    """The probe is known to the library only while it runs: leaving changes nothing anywhere."""
    from transformers.modeling_utils import AttentionInterface

    with _LOCK:
        AttentionInterface.register(_PROBE, _stop)
        try:
            yield
        finally:
            AttentionInterface._global_mapping.pop(_PROBE, None)


def capture(attention: nn.Module, *args: Any, **kwargs: Any) -> Captured:
    """Call an attention module until its queries and keys are known, and return them.

    Raises:
        VPruneError: the module computes attention without the library's attention interface.
    """
    config: Any = attention.config
    with _probe_registered(), attention_swapped(config, _PROBE):
        try:
            attention(*args, **kwargs)
        except Captured as caught:
            return caught
    raise VPruneError(
        f"{type(attention).__name__} does not use the attention interface of transformers: choose another method"
    )


def layer_attention(prefill: Prefill, layer: int) -> Captured:
    """Queries and keys of decoder layer `layer` over the prompt as it stands (keys of earlier turns first).

    The layer that comes next costs one norm and two projections; a later one runs those before it, always with the same
    attention implementation, so that the result does not depend on the model's own.

    Raises:
        VPruneError: the decoder has no such layer.
    """
    layers = prefill.anatomy.layers
    if not -len(layers) <= layer < len(layers):
        raise VPruneError(f"layer={layer}: the decoder has layers 0 to {len(layers) - 1}")
    first, last = prefill.layer, layer % len(layers)
    if last > first and first < prefill.deepstack:
        raise VPruneError(
            f"layer={layer}: features are added after the first {prefill.deepstack} layers (DeepStack); "
            f"only layer={first} is possible here"
        )
    decoder: Any = prefill.anatomy.decoder
    chosen: Any = layers[layer]
    with torch.no_grad():
        hidden, past = prefill.hidden, PastView(prefill.cache) if prefill.cache is not None else None
        below = layers[first:last]
        rope = rotations(decoder, last, bool(below), hidden, rotary_positions(prefill.positions))
        if len(below):
            mask = attention_mask_4d(
                stored_and_new_valid(prefill), past_bias(prefill), hidden.shape[1], "sdpa", hidden.dtype
            )
            with attention_swapped(decoder.config, "sdpa"):
                for module in below:
                    hidden = module(
                        hidden,
                        attention_mask=mask,
                        position_ids=prefill.positions,
                        position_embeddings=rope,
                        **cache_for(module, past),
                    )
                    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        caught = capture(
            chosen.self_attn,
            hidden_states=chosen.input_layernorm(hidden),
            position_embeddings=rope,
            attention_mask=None,
            **cache_for(chosen.self_attn, past),
        )
        device = prefill.hidden.device  # the layer may lie on another one
        return Captured(caught.query.to(device), caught.key.to(device), caught.scale)


def rotations(decoder: Any, layer: int, below: bool, hidden: Tensor, positions: Tensor) -> Any:
    """The rotary embeddings of a layer: some decoders have several kinds of layers that rotate differently.

    Raises:
        VPruneError: they do, and layers `below` would have to run first.
    """
    if "layer_type" not in signature(decoder.rotary_emb.forward).parameters:
        return decoder.rotary_emb(hidden, positions)
    if below:
        raise VPruneError(
            f"layer={layer}: the layers of this decoder are of several kinds; only the layer of the stage is possible"
        )
    return decoder.rotary_emb(hidden, positions, decoder.config.layer_types[layer])


def rotary_positions(positions: Tensor) -> Tensor:
    """The rows of position ids that rotate: `generate` puts those of the text, for masks, before M-RoPE's three."""
    return positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 else positions


def stored_and_new_valid(prefill: Prefill) -> Tensor:
    """Which of the rows stored and the new ones are no padding, bool [B, S + L]."""
    batch, device = prefill.valid.shape[0], prefill.valid.device
    return torch.cat([widened(prefill.past.valid, batch, prefill.stored, True, device), prefill.valid], 1)


def past_bias(prefill: Prefill) -> Tensor | None:
    """The log sizes of the rows stored and (zero) of the new ones, [B, S + L], None when nothing stored is merged."""
    if prefill.past.bias is None:
        return None
    batch, length = prefill.valid.shape
    return widened(prefill.past.bias, batch, prefill.stored + length, 0.0, prefill.valid.device)
