"""Masks of a pruned model: what is counted, what is set aside for the words looked for, and the benchmark of it."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
import torch

from tests.segmentation.made import TrueMasks, scene
from tests.segmentation.test_reading import one_prompt, true_attention
from vprune import VPruneError
from vprune.eval.models import LoadedModel, ModelChoice, load
from vprune.pruner import load_method
from vprune.scoring.text_attention import TextAttention
from vprune.segmentation import memory, segmenters
from vprune.segmentation.evaluation import OPEN, REFER, ScenesSegment, made_recipe
from vprune.segmentation.maps import Flow, MeanAttention
from vprune.segmentation.marked import with_marked
from vprune.segmentation.reading import read
from vprune.segmentation.recipe import Recipe
from vprune.segmentation.segment import Session

RECIPES = sorted(entry.name.removesuffix(".yaml") for entry in (files("vprune.conf") / "recipe").iterdir())
SCENES = (3, 4)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(ModelChoice("embedded", device="cpu"))


@pytest.fixture(scope="module")
def benchmark() -> ScenesSegment:
    return ScenesSegment(recipe={"max_new_tokens": 48})


def samples_of(benchmark: ScenesSegment, kind: str) -> list[Any]:
    """One sample an image."""
    names = {f"{number:06d}.webp" for number in SCENES}
    own = {one.image.name: one for one in benchmark.samples if one.kind == kind and one.image.name in names}
    return list(own.values())


def test_the_benchmark_of_a_pruned_model(
    loaded: LoadedModel, benchmark: ScenesSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [scene(number)[:2] for number in SCENES]
    monkeypatch.setattr(segmenters, "load_segmenter", lambda *_: TrueMasks(pictures=pictures))
    batches = [samples_of(benchmark, OPEN), samples_of(benchmark, REFER)]
    assert len(batches[0]) == len(SCENES) and batches[1]
    measured = {}
    for method in (None, load_method("attention", keep=0.25)):
        rows = []
        for samples, answers in zip(batches, benchmark.predictor(loaded, method).run(batches), strict=True):
            for sample, answer in zip(samples, answers, strict=True):
                assert answer.error is None and answer.tokens_before == 576
                assert answer.tokens_after == (576 if method is None else 144)
                rows.append({"id": sample.id, "prediction": answer.text})
        measured["full" if method is None else method.name] = benchmark.metrics(rows)
    full = measured.pop("full")
    assert full["referring_miou"] > 0.9 and full["open_ar100"] > 0.8
    for pruned in measured.values():
        assert pruned["referring_miou"] >= 0.95 * full["referring_miou"]
        assert pruned["open_ar100"] >= 0.5 * full["open_ar100"]
    assert full["peak_memory_bytes"] > 0


def test_what_a_picture_took_is_told(loaded: LoadedModel) -> None:
    picture, masks, names, _ = scene(SCENES[0])
    pair = (loaded.model, loaded.processor)
    full = Session(pair, TrueMasks(masks), method=load_method("full"))(picture, names[0]).spent
    assert full is not None and full.tokens_before == full.tokens_after == 576
    assert full.seconds > 0 and full.peak_bytes is not None and full.peak_bytes > 2**20
    pruned = Session(pair, TrueMasks(masks), Recipe(marked=6), load_method("attention", keep=32))(picture, names[0])
    assert pruned.spent is not None and (pruned.spent.tokens_before, pruned.spent.tokens_after) == (576, 32)
    peak = memory.Peak()
    for told in (None, 5, 3, None):
        peak.rise(told)
    assert peak.bytes == 5


class Bound(TextAttention):
    """A scorer that comes back as another one."""

    def bound(self, anatomy: Any) -> Bound:
        return Bound(layer=0)


@pytest.mark.parametrize("recycle", ["none", "grid"])
def test_words_have_tokens_set_aside_within_the_budget(tiny_vlm: Any, tiny_processor: Any, recycle: str) -> None:
    model = tiny_vlm(dtype=torch.float32)
    inputs = one_prompt(tiny_processor)
    true, last = true_attention(model, inputs), inputs["input_ids"].shape[1] - 1
    method = load_method("attention", keep=12, layer=0, recycle=recycle)
    whole = read(model, inputs, [last], MeanAttention())
    columns = whole.images[0].columns
    groups = [[last], [last - 1, last - 2]]
    wanted = set()
    for group in groups:
        attended = true[0][:, group][:, :, columns].mean((0, 1))
        wanted |= set(attended.argsort(descending=True)[:3].tolist())
    before = read(model, inputs, [last], MeanAttention(), method)
    reading = read(model, inputs, [last], MeanAttention(), with_marked(method, groups, 3))
    kept = reading.images[0].standing.kept.tolist()
    assert len(kept) == 12 == reading.visual_tokens[1] and reading.visual_tokens[0] == len(columns)
    assert wanted <= set(kept)
    assert (
        before.images[0].standing.kept.tolist()
        == read(model, inputs, [last], MeanAttention(), method).images[0].standing.kept.tolist()
    )  # the method itself is as it was
    # (Methods whose scorer is made for one model are bound to it first.)
    bound = replace(method, scorer=Bound())
    reading = read(model, inputs, [last], MeanAttention(), with_marked(bound, groups, 3))
    assert wanted <= set(reading.images[0].standing.kept.tolist())
    # More is set aside than the budget holds: the best of each come first.
    tight = read(model, inputs, [last], MeanAttention(), with_marked(load_method("attention", keep=2), groups, 50))
    assert tight.visual_tokens[1] == 2


def test_methods_that_go_by_no_importance_set_nothing_aside() -> None:
    for name in ("random", "pool", "uniform", "tome"):
        with pytest.raises(VPruneError, match="leave marked at 0"):
            with_marked(load_method(name, keep=0.5), [[1]], 4)
    with pytest.raises(VPruneError, match="marked="):
        Recipe(marked=-1)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_made(name: str) -> None:
    assert isinstance(made_recipe(name), Recipe)


def test_recipes_build_up() -> None:
    assert made_recipe("default") == Recipe() == made_recipe(None)
    flow, all_ = made_recipe("flow"), made_recipe("ensemble")
    assert flow.maps == Flow() == all_.maps and not flow.crops and all_.crops and len(all_.questions) == 2
    assert made_recipe({"maps": "flow", "prompting": {"negative": 1}}).prompting.negative == 1
    for wrong in ("best", {"crop_size": 1}, {"rows": "none"}, {"maps": "none"}, {"prompting": {"rounds": 0}}):
        with pytest.raises(VPruneError):
            made_recipe(wrong)
    with pytest.raises(VPruneError, match=r"benchmark\.recipe"):
        ScenesSegment(recipe="best")
