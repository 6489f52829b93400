"""Training a scorer: labels against the whole rule, gates against the pruned model, runs that go on after a break."""

from __future__ import annotations

import gc
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vprune
from tests.conftest import GRID
from tests.exactness.prompts import KINDS, batch
from vprune import VPruneError
from vprune.models.anatomy import dissect
from vprune.pruner import Pruner
from vprune.scoring.relevance import answer_places, answered, attentions, relevance
from vprune.training import prompts
from vprune.training.effect import Budgeting, answer_logits, border_of, divergence, full_states, gate, gated_states
from vprune.training.labels import as_label
from vprune.training.prompts import Answered, Painted, read_prompt, with_answers

WHOLE = (1, GRID, GRID)


class Fixed:
    """Scores that are what they are."""

    needs_evidence = False
    tower_layer = None

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def __call__(self, prefill: Any) -> list[Tensor]:
        return list(self.scores)


def asked(processor: Any, kind: str = "padded", dtype: torch.dtype = torch.float64) -> Answered:
    inputs = batch(processor, kind, dtype)
    rows = len(inputs["input_ids"])
    return with_answers(inputs, [[5 + row, 9, 2][: 3 - row % 2] for row in range(rows)], 0)


def test_answers_go_behind_their_prompts(tiny_processor: Any) -> None:
    inputs = batch(tiny_processor, "padded")
    joined = with_answers(inputs, [[7], [8, 9, 2]], 0)
    for row, answer in enumerate([[7], [8, 9, 2]]):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        seen = joined.inputs["attention_mask"][row] == 1
        assert joined.inputs["input_ids"][row][seen].tolist() == prompt + answer
        assert joined.inputs["input_ids"][row][joined.answer[row]].tolist() == answer
        assert int(joined.begins[row]) == len(joined.answer[row]) - len(answer)


@pytest.mark.parametrize("kind", KINDS)
def test_relevance_is_the_last_row_of_the_whole_rule(tiny_vlm: Any, tiny_processor: Any, kind: str) -> None:
    """R <- R + mean_h[(A G)^+] R from R = I, layer by layer, all N x N of it (arXiv 2103.15679)."""
    model, told = tiny_vlm(dtype=torch.float64), asked(tiny_processor, kind)
    prefill = read_prompt(model, told.inputs)
    ids = told.inputs["input_ids"]
    mine = relevance(dissect(model), prefill, ids, told.answer)
    held, states = attentions(prefill)
    (sample, column), words, _ = answer_places(ids, told.answer)
    wanted = torch.zeros(ids.shape, dtype=torch.float64)
    for row, place, word in zip(sample.tolist(), column.tolist(), words.tolist(), strict=True):
        logit = model.get_output_embeddings()(states[row, place])[word]
        whole = torch.eye(ids.shape[1], dtype=torch.float64)
        for weights, gradient in zip(held, torch.autograd.grad(logit, held, retain_graph=True), strict=True):
            whole = whole + (weights[row] * gradient[row]).detach().clamp(min=0).mean(0) @ whole
        wanted[row] += whole[place]
    wanted = wanted / told.answer.sum(-1, keepdim=True)
    torch.testing.assert_close(mine.double(), wanted, rtol=0, atol=1e-6)
    visual = prefill.visual & ~told.answer
    assert float(mine[visual].max()) > 1e-3  # the control: something rests on the picture
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_the_answer_that_relevance_asks_about_is_the_models_own(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "padded")
    ids, answer, longer = answered(read_prompt(model, inputs), 6)
    said = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(ids[:, -6:], said) and bool(answer[:, -6:].all()) and int(answer.sum()) == 12
    assert longer.hidden.shape[1] == ids.shape[1] == longer.valid.shape[1]


def test_a_label_is_the_upper_half() -> None:
    label = as_label(torch.tensor([[4.0, 1.0, 3.0, 0.0, 2.0, 1.0], [0.0] * 6]))
    assert torch.allclose(label[0], torch.tensor([4.0, 0, 3, 0, 2, 0]) / 9) and torch.allclose(
        label[1], torch.full((6,), 1 / 6)
    )


@pytest.mark.parametrize("kind", ["single", "padded", "several"])
@pytest.mark.parametrize("keep", [0.03, 0.1, 0.3, 0.7])
def test_hard_gates_are_the_pruned_model(tiny_vlm: Any, tiny_processor: Any, keep: float, kind: str) -> None:
    model, told = tiny_vlm(dtype=torch.float64), asked(tiny_processor, kind)
    prefill = read_prompt(model, told.inputs)
    images = list(prefill.images)
    scores = torch.randn(len(images), GRID * GRID, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = torch.stack([prefill.hidden[image.sample, image.columns] for image in images])
    with torch.no_grad():
        gated = gated_states(prefill, [(images, gate(scores, rows, WHOLE, Budgeting(keep)))])
        method = Pruner(keep=keep, scorer=Fixed(scores), recycle="anchors", size_aware=True)
        with vprune.prune(model, method):
            pruned = model(**told.inputs, use_cache=False).logits
        full = answer_logits(model, full_states(prefill), told)
    (sample, column), _, _ = answer_places(told.inputs["input_ids"], told.answer)
    mine = answer_logits(model, gated, told)
    torch.testing.assert_close(mine, pruned[sample, column].float(), rtol=0, atol=1e-4)
    assert float((mine - full).detach().abs().max()) > 1e-2  # the control
    assert (
        float(divergence(full, full, told)) == pytest.approx(0.0, abs=1e-6) and float(divergence(full, mine, told)) > 0
    )


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_soft_gates_hold_the_budget(temperature: float) -> None:
    scores, rows = torch.randn(3, 576), torch.randn(3, 576, 8)
    soft = gate(scores, rows, (1, 24, 24), Budgeting(0.1, temperature=temperature, noise=1.0))
    pure = 57 - 8
    torch.testing.assert_close(soft.log_gates.exp().sum(-1), torch.full((3,), float(pure)), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(soft.sizes.sum(-1), torch.full((3,), 576.0 - pure), rtol=1e-3, atol=1e-2)
    assert soft.anchors.shape == (3, 8) and bool((soft.anchors.diff(dim=-1) > 0).all())


def test_the_border_moves_with_the_scores() -> None:
    scores = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    border = border_of(scores, 7)
    torch.testing.assert_close(
        torch.sigmoid(scores - border).sum(-1), torch.full((2,), 7.0, dtype=torch.float64), rtol=0, atol=1e-5
    )
    (gradient,) = torch.autograd.grad(border.sum(), scores)
    torch.testing.assert_close(gradient.sum(-1), torch.ones(2, dtype=torch.float64))  # all up by one, border up by one
    step = torch.zeros_like(scores)
    step[0, 3] = 1e-4
    moved = (border_of(scores.detach() + step, 7) - border_of(scores.detach() - step, 7))[0, 0] / 2e-4
    assert float(moved) == pytest.approx(float(gradient[0, 3]), rel=1e-2, abs=1e-4)


def test_the_effect_teaches_scores(tiny_vlm: Any, tiny_processor: Any) -> None:
    """Scores that descend on the effect keep the answer better than those they started from."""
    model, told = tiny_vlm(), asked(tiny_processor, "padded", torch.float32)
    prefill = read_prompt(model, told.inputs)
    images = list(prefill.images)
    rows = torch.stack([prefill.hidden[image.sample, image.columns] for image in images])
    with torch.no_grad():
        full = answer_logits(model, full_states(prefill), told)

    def loss(scores: Tensor, temperature: float) -> Tensor:
        how = Budgeting(0.2, temperature=temperature, noise=1.0)
        states = gated_states(prefill, [(images, gate(scores, rows, WHOLE, how))])
        return divergence(full, answer_logits(model, states, told), told)

    torch.manual_seed(1)
    scores = (0.1 * torch.randn(2, GRID * GRID)).requires_grad_(True)
    before = float(loss(scores.detach(), 0.0).detach())
    optimizer = torch.optim.Adam([scores], lr=0.2)
    for step in range(90):
        optimizer.zero_grad()
        loss(scores, 0.15 ** (step / 90)).backward()
        optimizer.step()
    assert float(loss(scores.detach(), 0.0)) < 0.5 * before


def test_painted_questions_are_true_and_the_same_again() -> None:
    def first_two(skip: int = 0) -> list[Answered]:
        stream = iter(Painted(7, 8, "test", torch.device("cpu"), questions=4, skip=skip))
        return [next(stream), next(stream)]

    one, again = first_two(), first_two()
    for mine, theirs in zip(one, again, strict=True):
        assert all(torch.equal(mine.inputs[key], theirs.inputs[key]) for key in mine.inputs)
    assert torch.equal(first_two(1)[0].inputs["input_ids"], one[1].inputs["input_ids"])
    assert one[0].repeats == 4 and torch.equal(one[0].inputs["pixel_values"][0], one[0].inputs["pixel_values"][3])
    assert not torch.equal(one[0].inputs["pixel_values"][0], one[0].inputs["pixel_values"][4])


def test_processes_that_draw_scenes_are_waited_for_at_the_end_alone() -> None:
    before = set(active_children())
    stream = iter(Painted(7, 4, "test", torch.device("cpu"), questions=4, workers=1))
    next(stream)
    del stream
    gc.collect()  # (on a GPU's host letting go of them took 5 seconds for each, out of the minutes of the training)
    (worker,) = set(active_children()) - before
    assert worker.is_alive()
    prompts._LOADERS.pop()
    gc.collect()
    assert not worker.is_alive()


def test_an_image_seen_once_is_the_image_seen_four_times(tiny_vlm: Any, tiny_processor: Any) -> None:
    inputs = batch(tiny_processor, "single")
    four = {key: value.repeat_interleave(4, 0) for key, value in inputs.items()}
    seen, model = [], tiny_vlm()
    handle = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[0] if args else ()))),
        with_kwargs=True,
    )
    plain, once = read_prompt(model, four), read_prompt(model, four, repeats=4)
    handle.remove()
    torch.testing.assert_close(once.hidden, plain.hidden, rtol=1e-5, atol=1e-6)
    assert len(once.images) == 4 and not model.model.vision_tower._forward_hooks


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from vprune.training.checkpoint import claim

    config: Any = OmegaConf.create({"out": str(tmp_path), "seed": 0, "objective": "effect"})
    claim(tmp_path, config)
    (tmp_path / "checkpoint.pt").touch()
    claim(tmp_path, config)
    with pytest.raises(VPruneError, match="other values of seed"):
        claim(tmp_path, OmegaConf.merge(config, {"seed": 1}))  # type: ignore[arg-type]


def test_a_folder_without_a_checkpoint_starts_anew_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from omegaconf import OmegaConf

    from vprune.training.checkpoint import claim

    made = {"answers.jsonl": ("model",)}
    config: Any = OmegaConf.create({"out": str(tmp_path), "seed": 0, "objective": "effect", "model": "a"})
    changed: Any = OmegaConf.merge(config, {"objective": "relevance"})
    claim(tmp_path, config, made)
    (tmp_path / "answers.jsonl").touch()
    (tmp_path / "log.jsonl").write_text("of effect")
    claim(tmp_path, config, made)
    assert capsys.readouterr().out == ""
    claim(tmp_path, changed, made)
    said = "other values of objective (effect there, relevance here), and broken off before its first checkpoint: "
    assert f"{tmp_path} was begun with {said}it starts anew and keeps answers.jsonl" in capsys.readouterr().out
    assert OmegaConf.load(tmp_path / "config.yaml") == changed
    assert [one.name for one in sorted(tmp_path.glob("log*"))] == ["log.jsonl.before"]
    with pytest.raises(VPruneError, match="other values of model"):
        claim(tmp_path, OmegaConf.merge(changed, {"model": "b"}), made)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["method: random\n", "a: [", "- 1\n", ""])
def test_the_config_of_something_else_is_not_written_over(tmp_path: Path, content: str) -> None:
    from omegaconf import OmegaConf

    from vprune.training.checkpoint import claim

    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(VPruneError, match=r"config\.yaml (is not of this recipe's making|cannot be read)"):
        claim(tmp_path, OmegaConf.create({"out": str(tmp_path), "seed": 0}))
    assert (tmp_path / "config.yaml").read_text() == content


def test_the_card_of_the_shipped_scorer_tells_what_its_config_tells() -> None:
    from vprune.scoring.learned import shipped
    from vprune.scoring.network import ScorerNetwork

    for folder in shipped():
        network, card = ScorerNetwork.load(folder), (folder / "README.md").read_text()
        shape, recipe = network.config, network.config.recipe
        optimizer, keeps = recipe["optimizer"], recipe["effect"]["keeps"]
        told = [
            f"| {sum(part.numel() for part in network.parameters()):,}: ",
            f"decoder layer {shape.layer}",
            f"{shape.contents} channels of the visual rows; {shape.matches} learned matches",
            f"objective {recipe['objective']}",
            f"at {', '.join(f'{100 * keep:g}' for keep in keeps[:-1])} and {100 * keeps[-1]:g}% of the tokens",
            f"| seed | {recipe['seed']} |",
            f"{optimizer['batch_size']} questions a step, {optimizer['questions_per_image']} about each scene",
            f"{optimizer['minutes']} minutes by the clock, AdamW at {optimizer['lr']:g}, {optimizer['warmup']} steps",
        ]
        missing = [words for words in told if words not in card]
        assert not missing, f"{folder / 'README.md'} does not say {missing}"
