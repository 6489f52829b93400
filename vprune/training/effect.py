"""Learning from the effect on the answer: which tokens can go without the answer becoming less likely.

The decoder runs over the whole prompt with a gate on every visual token and the merged rows beside them, exactly as
pruning would leave it, and the gradient of the answer's divergence reaches the gates of kept and dropped tokens alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid, one_hot, pad

from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy
from vprune.models.masks import least
from vprune.models.rotary import rotary_positions, rotations
from vprune.records import Grid, Prefill, VisualTokens
from vprune.recycling.absorb import coordinates
from vprune.scoring.relevance import answer_places
from vprune.selection import spread_order
from vprune.training.prompts import Answered

_LEAST = -30.0  # log of the weight that soft gates may shrink to, so that they can open again
_STEP = 32  # lengths are multiples of it: fused kernels want it, and graphs stay few
_HALVINGS = 30  # of the interval in which the border between in and out is looked for


@dataclass(frozen=True)
class Budgeting:
    """How a training step prunes.

    Args:
        keep: rows in all per image, a fraction of its tokens.
        share: of `recycle=anchors`, as is distance; 0 = a single row takes up the rest.
        distance: what distance takes off likeness.
        temperature: of the gates, 0 = the choice is hard, as pruning makes it.
        noise: how much of a logistic distribution is added to the gates' logits, so that few gates stand half open.
        widest: tokens beyond so many times the budget get no gate at all, which shortens what a step has to read.
        power: merged rows are means with the weights softmax(scores) ** power, 0 = all tokens alike.
    """

    keep: float
    share: float = 0.15
    distance: float = 0.5
    temperature: float = 0.0
    noise: float = 0.0
    widest: float = math.inf
    power: float = 0.0


@dataclass(frozen=True)
class Gated:
    """The visual tokens of images of one grid under a choice.

    The log of their gates [I, N], of which `open` an image are not shut for good, merged rows [I, A, D], their sizes
    [I, A] and the tokens where they stand [I, A].
    """

    log_gates: Tensor
    merged: Tensor
    sizes: Tensor
    anchors: Tensor
    open: int


def gate(scores: Tensor, rows: Tensor, grid: Grid, how: Budgeting) -> Gated:
    """Choose by scores [I, N] what stays of rows [I, N, D], and merge the rest into anchors.

    g_j = sigmoid(s_j / temperature + noise - border), the border such that sum_j g_j = P, the tokens that stay pure;
    what is left of a token, 1 - g_j, joins the anchor that it would join if it were pruned.
    """
    count, tokens = scores.shape
    budget = max(1, math.floor(how.keep * tokens))
    anchors = 0 if budget < 2 else max(1, math.floor(budget * how.share + 1e-9))
    pure = budget - anchors
    logits = scores
    if how.temperature:
        even = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
        logits = scores / how.temperature + how.noise * torch.logit(even)
    chosen = logits.detach().topk(pure, -1).indices
    hard = torch.zeros_like(scores).scatter(1, chosen, 1.0)
    stays_open = pure
    if how.temperature:
        inside = logits - border_of(logits, pure)
        log_gates, left = logsigmoid(inside).clamp(min=_LEAST), torch.sigmoid(-inside)
        stays_open = int(min(tokens, how.widest * budget))
        if stays_open < tokens:
            near = logits.detach().topk(stays_open, -1).indices
            log_gates = torch.full_like(log_gates, -torch.inf).scatter(1, near, log_gates.gather(1, near))
    else:
        log_gates, left = torch.zeros_like(scores).masked_fill(hard == 0, -torch.inf), 1 - hard
    if not anchors:
        nothing = rows.new_zeros((count, 0))
        return Gated(log_gates, rows.new_zeros((count, 0, rows.shape[-1])), nothing, nothing.long(), stays_open)
    spread = spread_order(grid, scores.device)
    rank = torch.empty_like(spread).index_copy(0, spread, torch.arange(tokens, device=scores.device))
    places = (rank + tokens * hard.long()).topk(anchors, -1, largest=False).indices.sort(-1).values
    with torch.no_grad():
        where = coordinates(grid, scores.device)
        unit = rows.float() / rows.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
        own = unit.gather(1, places[..., None].expand(-1, -1, unit.shape[-1]))
        apart = torch.cdist(where.expand(count, -1, -1), where[places])
        joins = (unit @ own.transpose(1, 2) - how.distance * apart).argmax(-1)
        joins.scatter_(1, places, torch.arange(anchors, device=scores.device).expand(count, -1))
    member = one_hot(joins, anchors).to(scores.dtype) * left[..., None]
    sizes = member.sum(1)
    shares = member
    if how.power:
        highest = scores.amax(-1, keepdim=True).detach()
        shares = member * (how.power * (scores - highest)).exp()[..., None]
    merged = shares.transpose(1, 2) @ rows.to(scores.dtype) / shares.sum(1).clamp(min=1e-9)[..., None]
    return Gated(log_gates, merged, sizes, places, stays_open)


def border_of(logits: Tensor, count: int) -> Tensor:
    """The border b [I, 1] with sum_j sigmoid(logits_j - b) = count, and the gradient that keeps it so."""
    with torch.no_grad():
        low, high = logits.amin(-1, keepdim=True) - 20, logits.amax(-1, keepdim=True) + 20
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            more = torch.sigmoid(logits - middle).sum(-1, keepdim=True) > count
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        gates = torch.sigmoid(logits - low)
        weights = gates * (1 - gates)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    return low + (weights * (logits - logits.detach())).sum(-1, keepdim=True)


def gated_states(
    prefill: Prefill, groups: Sequence[tuple[Sequence[VisualTokens], Gated]], compiled: bool = False
) -> Tensor:
    """The decoder's last hidden states [B, L, D] of the whole prompt, with gates on its visual tokens.

    A gated token weighs g_j in every attention; a merged row weighs its size, and stands where its anchor did.

    Raises:
        VPruneError: the model adds features between layers, or lays its own masks down.
    """
    anatomy, hidden, device = prefill.anatomy, prefill.hidden, prefill.hidden.device
    _refuse(anatomy, prefill)
    batch, length = prefill.valid.shape
    bias = groups[0][1].log_gates.new_zeros((batch, length))
    total, read = [0] * batch, [length] * batch  # merged rows, and rows that count, of each sample
    parts = []
    for images, gated in groups:
        sample = torch.tensor([image.sample for image in images])
        columns = torch.stack([image.columns for image in images]).to(device)
        on_device = sample.to(device)
        bias = bias.index_put((on_device[:, None], columns), gated.log_gates)
        anchors = gated.anchors.shape[1]
        start = []
        for image in images:
            start.append(total[image.sample])
            total[image.sample] += anchors
            read[image.sample] += gated.open + anchors - len(image)
        slots = (torch.tensor(start)[:, None] + torch.arange(anchors)).to(device)
        parts.append((on_device[:, None], slots, gated, columns.gather(1, gated.anchors)))
    width = max(total)
    merged = hidden.new_zeros((batch, width, hidden.shape[-1]))
    sizes = bias.new_full((batch, width), -torch.inf)
    places = torch.full((batch, width), length, dtype=torch.long, device=device)
    for sample_of, slots, gated, where in parts:
        merged = merged.index_put((sample_of, slots), gated.merged.to(merged.dtype))
        sizes = sizes.index_put((sample_of, slots), gated.sizes.clamp(min=1e-6).log())
        places = places.index_put((sample_of, slots), where)
    positions = prefill.positions.expand(*prefill.positions.shape[:-2], batch, -1)
    positions = torch.cat(
        [positions, positions.gather(-1, places.clamp(max=length - 1).expand(*positions.shape[:-1], -1))], -1
    )
    order = torch.cat([torch.arange(length, device=device).expand(batch, -1), places], 1)
    weights = torch.cat([bias, sizes], 1)
    rows = torch.cat([hidden, merged], 1)
    there = torch.cat([prefill.valid, torch.ones_like(sizes, dtype=torch.bool)], 1) & (weights.detach() > -torch.inf)
    # Only what counts is read: what is shut for good goes, and so does padding where it leaves room.
    left = -(-max(read) // _STEP) * _STEP
    more = max(0, left - there.shape[1])
    rows, positions = pad(rows, (0, 0, 0, more)), pad(positions, (0, more))
    order, weights, there = pad(order, (0, more)), pad(weights, (0, more)), pad(there, (0, more))
    columns = there.byte().argsort(dim=1, descending=True, stable=True)[:, :left].sort(1).values
    rows = rows.gather(1, columns[..., None].expand(-1, -1, rows.shape[-1]))
    order, weights, there = (one.gather(1, columns) for one in (order, weights, there))
    positions = positions.gather(-1, columns.expand(*positions.shape[:-1], -1))
    allowed = there[:, None, None] & (order[:, None, None] <= order[:, None, :, None])
    itself = torch.eye(left, dtype=torch.bool, device=device)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    added = weights.masked_fill(~there, 0.0).to(dtype)
    mask = torch.where(allowed | itself, added[:, None, None], least(dtype))
    states = decoder_states(anatomy, rows, mask, positions, compiled)
    whole = states.new_zeros((batch, length + width + more, states.shape[-1]))
    return whole.scatter(1, columns[..., None].expand(-1, -1, states.shape[-1]), states)[:, :length]


def full_states(prefill: Prefill, compiled: bool = False) -> Tensor:
    """The decoder's last hidden states [B, L, D] of the whole prompt, as it is."""
    order = torch.arange(prefill.valid.shape[1], device=prefill.valid.device)
    mask = (prefill.valid[:, None, None] & (order <= order[:, None])) | (order == order[:, None])
    positions = prefill.positions.expand(*prefill.positions.shape[:-2], prefill.valid.shape[0], -1)
    return decoder_states(prefill.anatomy, prefill.hidden, mask, positions, compiled)


def decoder_states(anatomy: Anatomy, hidden: Tensor, mask: Tensor, positions: Tensor, compiled: bool) -> Tensor:
    """The last hidden states [B, L, D] of a decoder under a finished mask [B, 1, L, L]; `compiled`: layer by layer."""
    decoder: Any = anatomy.decoder
    if not (compiled and isinstance(getattr(decoder, "norm", None), nn.Module)):
        out = decoder(inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False)
        states: Tensor = out.last_hidden_state
        return states
    rotated = rotations(decoder, len(anatomy.layers) - 1, True, hidden, rotary_positions(positions))
    for layer in anatomy.layers:
        hidden = _compiled_layer()(layer, hidden, mask, positions, rotated)
    normed: Tensor = decoder.norm(hidden)
    return normed


@cache
def _compiled_layer() -> Any:
    """One graph for all layers of a decoder, whatever the length: thousands of small kernels become a few hundred."""
    return torch.compile(_layer, dynamic=True)


def _layer(layer: nn.Module, hidden: Tensor, mask: Tensor, positions: Tensor, rotated: Any) -> Tensor:
    out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotated)
    after: Tensor = out[0] if isinstance(out, tuple) else out
    return after


def _refuse(anatomy: Anatomy, prefill: Prefill) -> None:
    if prefill.deepstack or anatomy.has_windows:
        raise VPruneError(
            f"{type(anatomy.base).__name__} adds features between its layers, or has layers with windows: its scorer "
            "cannot be trained on the effect yet; give objective=relevance"
        )


def answer_logits(model: Any, states: Tensor, batch: Answered) -> Tensor:
    """The logits [T, V] that predict the tokens of the answers, all of the batch in a row."""
    logits: Tensor = model.get_output_embeddings()(states[answer_places(batch.inputs["input_ids"], batch.answer)[0]])
    return logits.float()


def certain(batch: Answered, vocabulary: int) -> Tensor:
    """Logits [T, V] that hold the tokens of the answers for certain, in place of the full model's."""
    return 1e4 * one_hot(batch.inputs["input_ids"][batch.answer], vocabulary).float()


def divergence(full: Tensor, pruned: Tensor, batch: Answered) -> Tensor:
    """KL(full || pruned) of the answers' tokens [T, V], the mean over the tokens of each answer, then over answers."""
    expected = log_softmax(full, -1)
    each = (expected.exp() * (expected - log_softmax(pruned, -1))).sum(-1)
    lengths = batch.answer.sum(-1)
    share = (1.0 / lengths.float()).repeat_interleave(lengths)
    return (each * share).sum() / len(batch)
