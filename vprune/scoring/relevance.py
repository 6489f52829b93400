"""How much of an answer rests on each visual token: gradient-weighted attention, passed back through all layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy
from vprune.models.masks import least
from vprune.models.probe import attention_swapped
from vprune.records import Prefill

_RECORDING = "vprune_recording"


@dataclass
class Relevance:
    """The relevance of every visual token for the answer that the full model gives: what a learned map is taught.

    Costs far more than pruning saves (the model answers first, and a backward pass follows for each token of the
    answer): a yardstick for learned maps, no method to serve with. See `relevance`.

    Args:
        tokens: of the answer, at most.

    Raises:
        VPruneError: `tokens` is no number of tokens; a later turn of a conversation; a model that adds features between
            layers.

    Example:
        >>> Relevance(tokens=8)
        Relevance(tokens=8)
    """

    tokens: int = 48

    layer: ClassVar[int] = 0  # before the first: the one map serves every stage
    needs_evidence: ClassVar[bool] = False
    tower_layer: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise VPruneError(f"tokens={self.tokens!r}: give a number of tokens, at least 1")

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """Have the full model answer every sample, and ask back what the answers rest on.

        Raises:
            VPruneError: rows of earlier turns are stored, or relevance cannot be followed through this model.
        """
        if not prefill.images:
            return []
        if prefill.stored or prefill.deepstack or prefill.anatomy.has_windows:
            raise VPruneError(
                "method=relevance follows one turn through a plain decoder: "
                f"{prefill.stored} rows of earlier turns are stored, features are added after {prefill.deepstack} "
                "layers; choose another method"
            )
        ids, answer, longer = answered(prefill, self.tokens)
        told = relevance(prefill.anatomy, longer, ids, answer)
        return prefill.of_images(told)


def relevance(anatomy: Anatomy, prefill: Prefill, ids: Tensor, answer: Tensor) -> Tensor:
    """The relevance of every token of a batch for the answers in it, float32 [B, L].

    For each answer token t, with A^l the attention of layer l and G^l the gradient of that token's logit: r = e_row of
    the token before t; for l = last..first: r <- r + r mean_h[(A^l * G^l)^+]; the mean of r over the answer's tokens
    (Chefer et al., arXiv 2103.15679, of which only the last row is computed: O(layers L^2) a token; as in arXiv
    2506.01097). Takes one backward pass per token of the longest answer and holds `memory_of` bytes.

    Args:
        anatomy: of the model.
        prefill: what its decoder reads, answers included.
        ids: LongTensor [B, L], of which only the answers' are read.
        answer: bool [B, L], the answers' tokens, one run a row.

    Example:
        >>> relevance(anatomy, prefill, ids, answer).shape  # doctest: +SKIP
        torch.Size([8, 592])
    """
    held, states = attentions(prefill)
    (sample, row), words, number = answer_places(ids, answer)
    total = torch.zeros(prefill.valid.shape, device=states.device)
    for step in range(int(number.max()) + 1):
        now = number == step
        with torch.enable_grad():
            logits = anatomy.head(states[sample[now], row[now]]).float().gather(1, words[now, None])
            gradients = torch.autograd.grad(logits.sum(), held, retain_graph=True)
        r = torch.zeros_like(total)
        r[sample[now], row[now]] = 1.0
        for weights, gradient in zip(reversed(held), reversed(gradients), strict=True):
            r = r + (r[:, None] @ (weights * gradient).detach().clamp(min=0).mean(1).float()).squeeze(1)
        total += r
    return total / answer.sum(-1, keepdim=True).clamp(min=1)


def answer_places(ids: Tensor, answer: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Where each of the T tokens of the answers is predicted, (samples [T], columns [T]); the tokens; their numbers."""
    sample, column = answer.nonzero(as_tuple=True)
    number = column - answer.int().argmax(-1)[sample]
    return (sample, column - 1), ids[sample, column], number


def memory_of(model_config: Any, batch: int, length: int) -> int:
    """Bytes that `relevance` holds at a time: attention weights and their gradients, float32, of every layer."""
    text = model_config.get_text_config()
    return int(2 * 4 * text.num_hidden_layers * text.num_attention_heads * batch * length**2)


@torch.no_grad()
def answered(prefill: Prefill, most: int) -> tuple[Tensor, Tensor, Prefill]:
    """The greedy answers of the full model: ids [B, L + T], bool [B, L + T], and the prompt with them at its end.

    An answer ends with the token that ends it (which does not count, unless it is the whole answer), or after `most`.
    """
    from transformers import DynamicCache

    decoder: Any = prefill.anatomy.decoder
    ends = set(prefill.anatomy.ends)
    hidden, valid, positions = (
        prefill.hidden,
        prefill.valid,
        prefill.positions.expand(*prefill.positions.shape[:-2], prefill.valid.shape[0], -1),
    )
    cache, rows = DynamicCache(config=decoder.config), hidden
    words: list[Tensor] = []
    counts = torch.ones(valid.shape[0], dtype=torch.bool, device=valid.device)
    goes_on = []
    for _ in range(most):
        out = decoder.forward(
            inputs_embeds=rows,
            attention_mask=valid.long(),
            position_ids=positions[..., -rows.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        word = prefill.anatomy.head(out.last_hidden_state[:, -1]).argmax(-1)
        ended = torch.stack([word == end for end in ends]).any(0) if ends else torch.zeros_like(counts)
        goes_on.append(counts & ~ended if words else counts)
        counts = counts & ~ended
        words.append(word)
        rows = decoder.get_input_embeddings()(word)[:, None].to(hidden.dtype)
        hidden, valid = torch.cat([hidden, rows], 1), torch.nn.functional.pad(valid, (0, 1), value=True)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        if not bool(counts.any()):
            break
    length = prefill.valid.shape[1]
    said, of_answer = torch.stack(words, 1), torch.stack(goes_on, 1)
    ids = torch.cat([said.new_zeros((said.shape[0], length)), said], 1)
    answer = torch.cat([torch.zeros_like(prefill.valid), of_answer], 1)
    return ids, answer, replace(prefill, hidden=hidden, valid=valid, positions=positions)


def attentions(prefill: Prefill) -> tuple[list[Tensor], Tensor]:
    """Every layer's attention weights [B, H, L, L], and the last hidden states [B, L, D] that follow from them."""
    decoder: Any = prefill.anatomy.decoder
    length, valid = prefill.valid.shape[1], prefill.valid
    with torch.enable_grad():
        hidden = prefill.hidden.detach().clone().requires_grad_(True)
    order = torch.arange(length, device=hidden.device)
    allowed = (valid[:, None, None] & (order <= order[:, None])) | (order == order[:, None])
    mask = hidden.new_zeros(allowed.shape).masked_fill(~allowed, least(hidden.dtype))
    held: list[Tensor] = []
    with _recorded(held), attention_swapped(decoder.config, _RECORDING), torch.enable_grad():
        out = decoder.forward(
            inputs_embeds=hidden, attention_mask=mask, position_ids=prefill.positions, use_cache=False
        )
    return held, out.last_hidden_state


@contextmanager
def _recorded(held: list[Tensor]) -> Iterator[None]:
    """Plain attention that puts its weights into `held`, known to the library while the block runs."""
    from transformers.modeling_utils import AttentionInterface

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        weights = (query @ key.transpose(2, 3) * scaling + mask).softmax(-1)
        held.append(weights)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register(_RECORDING, attention)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(_RECORDING, None)
