"""Queries and keys of any attention layer, whatever the attention backend: the layer is called and stopped half-way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vprune import kernels
from vprune.errors import VPruneError
from vprune.kernels.reference import scaled
from vprune.models.cache import PastView, cache_for, widened
from vprune.models.masks import attention_mask_4d
from vprune.models.rotary import rotary_positions, rotations
from vprune.places import some_rows
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


@cache
def gain_offset(kind: Any) -> float | None:
    """What a kind of RMS norm adds to its weights, 0 or 1: y = (weight + offset) x / sqrt(mean(x^2) + eps).

    None for norms of any other form; found out by trying one on the CPU.
    """
    try:
        with torch.device("cpu"), torch.no_grad():
            norm: Any = kind(4, eps=0.25)
            norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 1.5]))
            row = torch.tensor([[3.0, -0.5, 0.25, 1.0]])
            scaled = row * (row.square().mean() + _epsilon(norm)).rsqrt()
            return next((gain for gain in (0.0, 1.0) if torch.allclose(norm(row), (norm.weight + gain) * scaled)), None)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def projected(norm: Any, projection: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """projection(norm(hidden)) of rows [B, N, D]: a product, a factor of each row and a bias, both None if not needed.

    An RMS norm before a linear layer is a factor of each row behind it, W (g x / r) = (W g) x / r: a long prompt is
    read once for r and once for the product, in place of the ten times that the norm alone takes in float32.
    """
    offset = gain_offset(norm.__class__)
    plain = type(projection) is nn.Linear and _as_loaded(projection) and _as_loaded(norm)
    # (Norms are taken in float32, in float64 too; in float16 products of what is not normed yet might be infinite.)
    if offset is None or not plain or hidden.dtype not in (torch.float32, torch.bfloat16):
        return projection(norm(hidden)), None, None
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    mean_square = torch.addcmul(length.new_full((), _epsilon(norm)), length, length, value=1 / hidden.shape[-1])
    factor = mean_square.rsqrt()
    return torch.nn.functional.linear(hidden, projection.weight * _gain(norm)), factor, projection.bias


def _gain(norm: Any) -> Tensor:
    """What an RMS norm of a kind that `gain_offset` knows multiplies its rows by."""
    weight: Tensor = norm.weight
    offset = gain_offset(norm.__class__)
    return weight + offset if offset else weight


def _normed(norm: Any, rows: Tensor, factor: Tensor | None) -> Tensor:
    """norm(rows) of rows [B, R, D] whose `factor` [B, R, 1] `projected` has found, if it has."""
    return norm(rows) if factor is None else _gain(norm) * (rows * factor).to(rows.dtype)


def _as_loaded(module: Any) -> bool:
    """True of a layer that computes what its kind says: nobody hooked it, and its weight is no quantised one."""
    hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    return not hooked and type(module.weight) is nn.Parameter


@contextmanager
def _keys_alone(attention: nn.Module, keys: Tensor) -> Iterator[None]:
    """Within the block a layer projects its rows [B, N, D] onto these keys, and computes no values.

    Of queries it has one head of zeros.
    """

    def first(module: nn.Module, args: Any) -> Any:
        return (args[0][:, :1],)

    def one_head(module: nn.Module, args: Any, made: Tensor) -> Tensor:
        return made.new_zeros((made.shape[0], 1, width)).expand(-1, keys.shape[1], -1)

    def these(module: nn.Module, args: Any, made: Tensor) -> Tensor:
        return keys

    def repeated(module: nn.Module, args: Any, made: Tensor) -> Tensor:
        return made.expand(-1, keys.shape[1], -1)

    parts: Any = attention
    width: int = parts.head_dim
    handles = [
        handle
        for part, answer in ((parts.q_proj, one_head), (parts.k_proj, these), (parts.v_proj, repeated))
        for handle in (part.register_forward_pre_hook(first), part.register_forward_hook(answer))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _separable(attention: Any) -> bool:
    """True where queries, keys and values are projected each by itself, and normed, if at all, head by head."""
    head, norm = getattr(attention, "head_dim", None), getattr(attention, "q_norm", None)
    weight = getattr(norm, "weight", None)
    return (
        isinstance(head, int)
        and all(isinstance(getattr(attention, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj"))
        and (norm is None or (weight is not None and weight.shape == (head,)))
    )


_PLAIN: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
"""Scales of attention layers that were seen to do nothing but project and rotate, see `note_if_plain`."""


def note_if_plain(decoder: Any, attention: Any, layer: int) -> None:
    """Note of an attention layer if it does nothing to queries and keys but project and rotate them; asks the device.

    Such a layer need not be called to learn them: W_q x and W_k x, head by head x * cos + (-x_2, x_1) * sin of their
    halves x_1 and x_2 (RoPE, arXiv 2104.09864). It is tried on three rows, and has to agree to the last bit.
    """
    if attention is None:
        return  # a layer of another kind
    _PLAIN.pop(attention, None)
    parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj")]
    if not all(type(part) is nn.Linear and _as_loaded(part) and not part.weight.is_meta for part in parts):
        return
    weight: Tensor = attention.q_proj.weight
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 3, weight.shape[1], generator=draw, device="cpu").to(weight)
    try:
        with torch.no_grad():
            rope = rotations(decoder, layer, False, rows, torch.tensor([[1, 5, 11]], device=rows.device))
            told = capture(attention, hidden_states=rows, attention_mask=None, position_embeddings=rope)
            # (By the reference: a kernel would be compiled first, and rounds as it does.)
            query, key = (
                kernels.rotate(part(rows), *rope, backend="torch") for part in (attention.q_proj, attention.k_proj)
            )
            alike = torch.equal(told.query, query) and torch.equal(told.key, key)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, VPruneError):
        return  # it wants other positions, or rotates in another way: it will be called
    if alike:
        _PLAIN[attention] = told.scale


def _is_plain(attention: Any, rope: Any) -> bool:
    free = not (attention._forward_pre_hooks or hasattr(attention, "_hf_hook"))
    return attention in _PLAIN and free and isinstance(rope, tuple) and all(part.ndim == 3 for part in rope)


def _some_queries(
    attention: Any, norm: nn.Module, hidden: Tensor, rope: Any, rows: Tensor | int, past: dict[str, Any]
) -> Captured:
    """`capture` behind a norm of each row, with queries of some rows only, LongTensor [B, R], or of the last R."""
    given = {"attention_mask": None, "position_embeddings": rope}
    count = rows if isinstance(rows, int) else rows.shape[1]
    plain = not past and _is_plain(attention, rope)
    if not plain and (count >= hidden.shape[1] or not _separable(attention) or not isinstance(rope, tuple)):
        caught = capture(attention, hidden_states=norm(hidden), **given, **past)
        some_of_each_head = some_rows(caught.query.transpose(0, 1), rows).transpose(0, 1)
        return Captured(some_of_each_head, caught.key, caught.scale)
    product, factor, bias = projected(norm, attention.k_proj, hidden)
    some = _normed(norm, some_rows(hidden, rows), None if factor is None else some_rows(factor, rows))
    turns = tuple(some_rows(one, rows) for one in rope)
    if plain:
        key = kernels.rotate(product, *rope, factor=factor, bias=bias)
        return Captured(kernels.rotate(attention.q_proj(some), *turns), key, _PLAIN[attention])
    with _keys_alone(attention, scaled(product, factor, bias)):
        key = capture(attention, hidden_states=hidden, **given, **past).key
    few = capture(attention, hidden_states=some, attention_mask=None, position_embeddings=turns)
    return Captured(few.query, key, few.scale)


def layer_attention(prefill: Prefill, layer: int, rows: Tensor | int | None = None) -> Captured:
    """Queries and keys of decoder layer `layer` over the prompt as it stands (keys of earlier turns first).

    `rows` LongTensor [B, R]: the columns whose queries are wanted, in that order; R: the last R; None: all. The layer
    that comes next costs one norm and two projections; a later one runs those before it, always with the same attention
    implementation, so that the result does not depend on the model's own.

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
        hidden, past = prefill.hidden, PastView(prefill.cache) if prefill.stored else None
        below = layers[first:last] if first < last else ()
        rope = rotations(decoder, last, bool(below), hidden, rotary_positions(prefill.positions))
        if below:
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
        stored = cache_for(chosen.self_attn, past) if past is not None else {}
        if rows is None:
            given = {"attention_mask": None, "position_embeddings": rope}
            caught = capture(chosen.self_attn, hidden_states=chosen.input_layernorm(hidden), **given, **stored)
        else:
            caught = _some_queries(chosen.self_attn, chosen.input_layernorm, hidden, rope, rows, stored)
        device = prefill.hidden.device  # the layer may lie on another one
        return Captured(caught.query.to(device), caught.key.to(device), caught.scale)


def keys_valid(prefill: Prefill) -> Tensor | None:
    """`stored_and_new_valid`, None when all are."""
    whole = prefill.past.valid is None and min(prefill.counts, default=0) == prefill.valid.shape[1]
    return None if whole else stored_and_new_valid(prefill)


def stored_and_new_valid(prefill: Prefill) -> Tensor:
    """Which of the rows stored and the new ones are no padding, bool [B, S + L]."""
    if not prefill.stored:
        return prefill.valid
    batch, device = prefill.valid.shape[0], prefill.valid.device
    return torch.cat([widened(prefill.past.valid, batch, prefill.stored, True, device), prefill.valid], 1)


def past_bias(prefill: Prefill) -> Tensor | None:
    """The log sizes of the rows stored and (zero) of the new ones, [B, S + L], None when nothing stored is merged."""
    if prefill.past.bias is None:
        return None
    batch, length = prefill.valid.shape
    return widened(prefill.past.bias, batch, prefill.stored + length, 0.0, prefill.valid.device)
