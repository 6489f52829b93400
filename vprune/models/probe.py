"""Queries and keys of any attention layer, whatever the attention backend: the layer is called and stopped half-way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
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


@contextmanager
def _asked_for(attention: nn.Module, rows: Tensor, length: int) -> Iterator[None]:
    """Within the block, queries of some rows only, LongTensor [B, R] of `length`, are computed (zeros elsewhere).

    And no values. Attention that does not project queries, keys and values each by itself is left as it is.
    """
    queries, _, values = parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if rows.shape[1] >= length or not all(isinstance(part, nn.Module) for part in parts):
        yield
        return
    assert queries is not None and values is not None

    def index(hidden: Tensor) -> Tensor:
        return rows.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])

    def few(module: nn.Module, args: Any) -> Any:
        return (args[0].gather(1, index(args[0])),)

    def spread(module: nn.Module, args: Any, made: Tensor) -> Tensor:
        return made.new_zeros((made.shape[0], length, made.shape[-1])).scatter_(1, index(made), made)

    def one(module: nn.Module, args: Any) -> Any:
        return (args[0][:, :1],)

    def repeated(module: nn.Module, args: Any, made: Tensor) -> Tensor:
        return made.expand(-1, length, -1)

    handles = [queries.register_forward_pre_hook(few), queries.register_forward_hook(spread)]
    handles += [values.register_forward_pre_hook(one), values.register_forward_hook(repeated)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_attention(prefill: Prefill, layer: int, rows: Tensor | None = None) -> Captured:
    """Queries and keys of decoder layer `layer` over the prompt as it stands (keys of earlier turns first).

    `rows` LongTensor [B, R]: the columns whose queries are wanted, in that order; None = all. The layer that comes next
    costs one norm and two projections; a later one runs those before it, always with the same attention implementation,
    so that the result does not depend on the model's own.

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
        with nullcontext() if rows is None else _asked_for(chosen.self_attn, rows, hidden.shape[1]):
            caught = capture(
                chosen.self_attn,
                hidden_states=chosen.input_layernorm(hidden),
                position_embeddings=rope,
                attention_mask=None,
                **cache_for(chosen.self_attn, past),
            )
        device = prefill.hidden.device  # the layer may lie on another one
        query = caught.query.to(device)
        if rows is not None:
            query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        return Captured(query, caught.key.to(device), caught.scale)


def rotations(decoder: Any, layer: int, below: bool, hidden: Tensor, positions: Tensor) -> Any:
    """The rotary embeddings of a layer: some decoders have several kinds of layers that rotate differently.

    Raises:
        VPruneError: they do, and layers `below` would have to run first.
    """
    if not _rotates_by_kind(type(decoder.rotary_emb).forward):
        return decoder.rotary_emb(hidden, positions)
    if below:
        raise VPruneError(
            f"layer={layer}: the layers of this decoder are of several kinds; only the layer of the stage is possible"
        )
    return decoder.rotary_emb(hidden, positions, decoder.config.layer_types[layer])


@cache
def _rotates_by_kind(forward: Callable[..., Any]) -> bool:
    return "layer_type" in signature(forward).parameters


def rotary_positions(positions: Tensor) -> Tensor:
    """The rows of position ids that rotate: `generate` puts those of the text, for masks, before M-RoPE's three."""
    return positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 else positions


def keys_valid(prefill: Prefill) -> Tensor | None:
    """`stored_and_new_valid`, None when all are."""
    whole = prefill.past.valid is None and min(prefill.counts, default=0) == prefill.valid.shape[1]
    return None if whole else stored_and_new_valid(prefill)


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
