"""What callers do with a model besides plain `generate`, in every family, against the masked oracle."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

import vprune
from tests.exactness.agreement import EXACT, agree, differ, generate
from tests.exactness.families import IMAGE, QWEN, VIDEO, VIDEOS
from tests.exactness.more_families import (
    TEN,
    inputs_of,
    made,
    positions_of,
    prefill_positions,
    seen_columns,
)
from tests.exactness.test_families import generated, line_breaks, masked, stepped, text_positions

# A random model may say padding or placeholders, which the oracle would take for padding and pictures.
NEVER = {"suppress_tokens": [0, IMAGE, VIDEO]}
families = pytest.mark.parametrize("family", TEN)


def oracle(model: Any, inputs: dict[str, Tensor], reports: list[Any]) -> AbstractContextManager[None]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return masked(model, ids, mask, reports, False, line_breaks(model, inputs))


def rows_of(reports: list[Any]) -> set[int]:
    return {report.sample for report in reports}


def choice(logits: Tensor) -> Tensor:
    """The likeliest words [B, 1] after logits [B, V]."""
    return logits.index_fill(-1, torch.tensor(NEVER["suppress_tokens"]), -torch.inf).argmax(-1, keepdim=True)


class Told:
    """A prompt, the cache that it left, and the words fed since, by calls of the model itself."""

    def __init__(self, family: str, model: Any, inputs: dict[str, Tensor]) -> None:
        self.family, self.model, self.inputs = family, model, inputs
        self.mask, self.ids = inputs["attention_mask"], inputs["input_ids"]
        with torch.no_grad():
            out = model(**inputs, **prefill_positions(family, model, inputs))
        self.cache, self.last = out.past_key_values, out.logits[:, -1]

    def feed(self, words: Tensor) -> Tensor:
        """The logits [B, Q, V] after each of `words` [B, Q], of which zeros are padding."""
        newest = words.shape[1]
        self.mask, self.ids = torch.cat([self.mask, (words != 0).long()], 1), torch.cat([self.ids, words], 1)
        positions = positions_of(self.family, self.model, self.inputs, self.mask, newest)
        with torch.no_grad():
            logits: Tensor = self.model(
                input_ids=words, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache
            ).logits
        self.last = logits[:, -1]
        return logits

    def forget(self, words: int) -> None:
        self.mask, self.ids = self.mask[:, :-words], self.ids[:, :-words]


def after(model: Any, inputs: dict[str, Tensor], words: Tensor) -> list[Tensor]:
    """The oracle's logits after the prompt and after each of `words` but the last."""
    return stepped(model, inputs, torch.cat([inputs["input_ids"], words], 1))


@pytest.mark.parametrize("kind", ["padded", "mixed"])
@families
def test_sampled_words_have_the_likelihoods_of_the_masked_model(family: str, kind: str) -> None:
    model, inputs = made(family), inputs_of(family, kind)
    torch.manual_seed(5)
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        pruned = generate(
            model,
            **inputs,
            max_new_tokens=6,
            do_sample=True,
            temperature=0.7,
            top_k=20,
            **NEVER,
        )
    reports = list(pruning.last or [])
    with oracle(model, inputs, reports):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences))
    differ(pruned.logits, stepped(model, inputs, pruned.sequences), rows_of(reports))


@pytest.fixture
def crops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that pruned cache layers are cropped to."""
    from vprune.models.cache import LogicalLayer

    seen: list[int] = []
    own = LogicalLayer.crop

    def crop(layer: LogicalLayer, length: int) -> None:
        seen.append(length)
        own(layer, length)

    monkeypatch.setattr(LogicalLayer, "crop", crop)
    return seen


@pytest.mark.parametrize("guesser", ["prompt", "assistant"])
@families
def test_guessed_words_are_those_of_plain_decoding(family: str, guesser: str, crops: list[int]) -> None:
    model, inputs = made(family), inputs_of(family, "single")
    words = torch.arange(20, 90)[None]  # any word that is said has been said before, and something after it
    inputs["input_ids"] = torch.cat([inputs["input_ids"], words], 1)
    for name in {"attention_mask", "mm_token_type_ids", "token_type_ids"} & set(inputs):
        inputs[name] = pad(inputs[name], (0, words.shape[1]), value=int(name == "attention_mask"))
    more: dict[str, Any] = {"assistant_model": copy.deepcopy(model)}  # unpruned, so that it guesses wrong at times
    if guesser == "prompt":
        more = {"prompt_lookup_num_tokens": 3}
    # (5.12 cannot look up without an end-of-sequence token)
    greedy: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 2, **NEVER}
    with vprune.prune(model, "uniform", keep=0.3):
        plain = model.generate(**inputs, **greedy)
        assert torch.equal(plain, model.generate(**inputs, **greedy, **more))
    assert crops
    # Guesses stand in the prefill already, so a method that asks the text what it looks at may keep other tokens.
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        guessed = model.generate(**inputs, **greedy, **more)
    with oracle(model, inputs, list(pruning.last or [])):
        expected = torch.cat([choice(logits) for logits in stepped(model, inputs, guessed)], 1)
    assert torch.equal(guessed[:, inputs["input_ids"].shape[1] :], expected)


def without_ids(family: str, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompt as embeddings: placeholders are told by theirs. Qwen counts positions by ids, if not told."""
    given = {name: value for name, value in inputs.items() if name != "input_ids"}
    given["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    return {**given, **prefill_positions(family, model, inputs)}


@pytest.mark.parametrize("keep", [0.3, 1.0])
@pytest.mark.parametrize(("family", "video"), [*((one, False) for one in TEN), *((one, True) for one in VIDEOS)])
def test_embeddings_in_place_of_ids(family: str, video: bool, keep: float) -> None:
    model, inputs = made(family), inputs_of(family, "mixed", video=video)
    positions = prefill_positions(family, model, inputs)
    with torch.no_grad():
        full = model(**without_ids(family, model, inputs)).logits
        torch.testing.assert_close(full, model(**inputs, **positions).logits, rtol=0, atol=0)  # the family can
        with vprune.prune(model, "attention", keep=keep) as pruning:
            pruned = model(**without_ids(family, model, inputs)).logits
    reports = list(pruning.last or [])
    if keep == 1.0:
        assert torch.equal(pruned, full)
        return
    with torch.no_grad(), oracle(model, inputs, reports):
        agree([pruned[:, -1]], [model(**inputs, **positions, use_cache=False).logits[:, -1]])
    differ([pruned[:, -1]], [full[:, -1]], rows_of(reports))


@families
def test_generating_from_embeddings(family: str) -> None:
    if family == "gemma3":
        pytest.skip("Gemma 3's generate takes no inputs_embeds")
    model, inputs = made(family), inputs_of(family, "mixed")
    given = without_ids(family, model, inputs)
    if family in QWEN:  # `generate` would give pictures the positions of text; told, it wants those of text as well
        given["position_ids"] = torch.cat([text_positions(inputs["attention_mask"])[None], given["position_ids"]])
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        expected = generated(model, inputs)
        reports = list(pruning.last or [])
        pruned = generated(model, given)
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(reports, list(pruning.last or []), strict=True))
    assert torch.equal(pruned.sequences, expected.sequences[:, inputs["input_ids"].shape[1] :])
    assert all(torch.equal(a, b) for a, b in zip(pruned.logits, expected.logits, strict=True))


def learned(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss on the last words as the model counts it and in float64, and the gradients of the latter."""
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100  # right behind a picture a dropped token may stand, whose own state is zero
    model.train()
    try:
        out = model(**inputs, labels=labels, use_cache=False)
        own = cross_entropy(out.logits[:, -3:-1].flatten(0, 1), labels[:, -2:].flatten())
        own.backward()
        grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    finally:
        model.eval()
        model.zero_grad()
    return out.loss.detach(), own.detach(), grads


@families
def test_training_learns_as_the_masked_model_does(family: str) -> None:
    model, inputs = made(family), inputs_of(family, "mixed")
    full = learned(model, inputs)
    with vprune.prune(model, "attention", keep=1.0):
        kept = learned(model, inputs)
    assert torch.equal(full[0], kept[0]) and all(torch.equal(full[2][name], kept[2][name]) for name in full[2])
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        loss, own, grads = learned(model, inputs)
    with oracle(model, inputs, list(pruning.last or [])):
        expected = learned(model, inputs)
    torch.testing.assert_close(loss, expected[0], rtol=0, atol=1e-6)  # the library takes it in float32
    torch.testing.assert_close(own, expected[1], rtol=0, atol=EXACT)
    assert grads.keys() == expected[2].keys() and abs(float(own - full[1])) > 1e-3
    exact = 1e-6 if family == "gemma3" else 1e-10  # Gemma takes its norms in float32, weights and all
    for name, grad in grads.items():
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, expected[2][name], rtol=0, atol=exact, msg=name)
    moved = {name for name, grad in grads.items() if float((grad - full[2][name]).abs().max()) > 1e-3}
    tower = {name for name, _ in model.named_parameters() if "vision" in name or "visual" in name}
    assert moved & tower and moved - tower  # gradients reach both, and not those of the unpruned model


@families
def test_every_kind_of_output_comes_back_at_full_length(family: str) -> None:
    model, inputs = made(family), inputs_of(family, "mixed")
    with torch.no_grad(), vprune.prune(model, "attention", keep=0.3) as pruning:
        whole = model(**inputs, output_hidden_states=True)
        plain = model(**inputs, return_dict=False)
        both = model(**inputs, return_dict=False, output_hidden_states=True)
        last = [model(**inputs, logits_to_keep=number).logits for number in (1, 3)]
    assert isinstance(plain, tuple) and torch.equal(plain[0], whole.logits)
    assert isinstance(both, tuple) and all(
        torch.equal(one, other) for one, other in zip(both[2], whole.hidden_states, strict=True)
    )
    for number, logits in zip((1, 3), last, strict=True):
        torch.testing.assert_close(logits, whole.logits[:, -number:], rtol=0, atol=EXACT)
    reports = list(pruning.last or [])
    with torch.no_grad(), oracle(model, inputs, reports):
        expected = model(**inputs, output_hidden_states=True, use_cache=False)
    seen = seen_columns(model, inputs, reports, line_breaks(model, inputs))
    assert len(whole.hidden_states) == len(expected.hidden_states) == 4
    for mine, theirs in zip(whole.hidden_states, expected.hidden_states, strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal((mine != 0).any(-1), seen)  # zeros stand for what was dropped
        torch.testing.assert_close(mine[seen], theirs[seen], rtol=0, atol=EXACT)


@families
def test_attentions_are_those_of_the_tokens_left(family: str) -> None:
    """They come back as the layers made them: a square over the shorter batch, left-padded, not over the prompt."""
    model, inputs = made(family, torch.float32, "eager"), inputs_of(family, "mixed", torch.float32)
    with torch.no_grad(), vprune.prune(model, "attention", keep=0.3) as pruning:
        attentions = model(**inputs, output_attentions=True).attentions
    seen = seen_columns(model, inputs, list(pruning.last or []), line_breaks(model, inputs)).sum(-1)
    rows = int(seen.max())
    assert rows < inputs["input_ids"].shape[1]
    assert [tuple(one.shape) for one in attentions] == [(len(seen), 4, rows, rows)] * 3


@pytest.mark.parametrize("kind", ["padded", "mixed"])
@families
def test_a_loop_of_ones_own(family: str, kind: str) -> None:
    model, inputs = made(family), inputs_of(family, kind)
    steps: dict[float, list[Tensor]] = {}
    for keep in (0.3, 1.0):
        with vprune.prune(model, "attention", keep=keep) as pruning:
            told = Told(family, model, inputs)
            reports = list(pruning.last or [])
            steps[keep] = [told.last, *(told.feed(choice(told.last))[:, 0] for _ in range(4))]
        if keep == 0.3:
            words = torch.cat([told.ids, choice(told.last)], 1)
            with oracle(model, inputs, reports):
                agree(steps[keep], stepped(model, inputs, words))
            differ(steps[keep], stepped(model, inputs, words), rows_of(reports))
    told = Told(family, model, inputs)
    plain = [told.last, *(told.feed(choice(told.last))[:, 0] for _ in range(4))]
    assert all(torch.equal(one, other) for one, other in zip(plain, steps[1.0], strict=True))


@families
def test_the_longest_row_may_have_no_picture(family: str) -> None:
    """Pruning then shortens rows, and not the batch: what was dropped must be hidden by the mask alone."""
    model, inputs = made(family), inputs_of(family, "mixed")
    rows, width = inputs["input_ids"].shape
    for name in {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"} & set(inputs):
        inputs[name] = pad(inputs[name], (4, 0))
    inputs["input_ids"][0] = torch.arange(width + 4) % 50 + 20
    inputs["attention_mask"][0] = 1
    lengths: list[int] = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        pruned = generated(model, inputs)
    hook.remove()
    reports = list(pruning.last or [])
    assert width + 4 in lengths[:2] and rows_of(reports) == set(range(1, rows))
    with oracle(model, inputs, reports):
        agree(pruned.logits, stepped(model, inputs, pruned.sequences))
    differ(pruned.logits, stepped(model, inputs, pruned.sequences), rows_of(reports))


@families
def test_a_placeholder_that_the_model_says_is_no_picture(family: str) -> None:
    model, inputs = made(family), inputs_of(family, "mixed")
    words = torch.tensor([[IMAGE, 12, IMAGE], [31, IMAGE, IMAGE], [IMAGE, 32, 33]])
    plain = torch.where(words == IMAGE, 40, words)
    with vprune.prune(model, "attention", keep=0.3) as pruning:
        told = Told(family, model, inputs)
        report = pruning.last
        said = [told.feed(words[:, :1]), told.feed(words[:, 1:])]  # alone and among others
    assert pruning.last is report and told.cache.get_seq_length() == told.ids.shape[1]
    length, embeddings = inputs["input_ids"].shape[1], model.get_input_embeddings()(words).detach()

    def speak(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs["inputs_embeds"].clone()
        given[:, length : length + 3] = embeddings
        return args, {**kwargs, "inputs_embeds": given}

    # The oracle is told other words, since it would look for pictures, and their embeddings are put in below.
    with oracle(model, inputs, list(report or [])):
        hook = model.get_decoder().register_forward_pre_hook(speak, with_kwargs=True)
        expected = after(model, inputs, torch.cat([plain, plain[:, :1]], 1))[1:]
        hook.remove()
    agree(torch.cat(said, 1).unbind(1), expected)
