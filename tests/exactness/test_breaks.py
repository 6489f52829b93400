"""Line breaks among visual tokens are foretold from sizes, so that nobody waits for the vision tower to see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vprune
from tests.exactness.families import KINDS, LINED, batch, build
from vprune.bench.architectures import ARCHITECTURES, make_prompt
from vprune.bench.architectures import build as build_shape
from vprune.models import prefill
from vprune.models.anatomy import dissect, newline_places, visual_kinds
from vprune.models.breaks import breaks_to_come
from vprune.training.prompts import read_prompt

PICTURED = [kind for kind in KINDS if any(KINDS[kind])]


def foretold(model: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
    anatomy = dissect(model)
    return breaks_to_come(anatomy, inputs)(visual_kinds(anatomy, inputs["input_ids"], None))


@pytest.mark.parametrize("kind", PICTURED)
@pytest.mark.parametrize("family", LINED)
def test_they_are_where_the_model_puts_them(family: str, kind: str) -> None:
    model, inputs = build(family, torch.float32), batch(family, kind, torch.float32)
    told = foretold(model, inputs)
    there = newline_places(dissect(model), read_prompt(model, inputs).hidden)
    assert told is not None and there is not None and bool(there.any())
    assert torch.equal(told, there)


@pytest.mark.parametrize("kind", PICTURED)
def test_a_video_ends_with_one(kind: str) -> None:
    model = build("llava_onevision", torch.float32)
    inputs = batch("llava_onevision", kind, torch.float32, video=True)
    told = foretold(model, inputs)
    there = newline_places(dissect(model), read_prompt(model, inputs).hidden)
    assert told is not None and there is not None and bool(there.any())
    assert torch.equal(told, there)
    frames = inputs["pixel_values_videos"]
    assert foretold(model, {**inputs, "pixel_values_videos": frames[:, :1]}) is None  # frames that make fewer rows
    assert foretold(model, {**inputs, "pixel_values_videos": None}) is None


def test_pictures_and_videos_of_one_prompt() -> None:
    model = build("llava_onevision", torch.float32)
    pictures = batch("llava_onevision", "padded", torch.float32)
    videos = batch("llava_onevision", "padded", torch.float32, video=True)
    both = {**pictures, **videos}
    for name in ("input_ids", "attention_mask"):
        both[name] = torch.cat([videos[name], pictures[name]], 1)
    told = foretold(model, both)
    there = newline_places(dissect(model), read_prompt(model, both).hidden)
    assert told is not None and there is not None and torch.equal(told, there)
    assert foretold(model, {**both, "image_sizes": None}) is None
    assert foretold(model, {**both, "pixel_values_videos": None}) is None


@pytest.mark.parametrize("family", LINED)
def test_nobody_looks_at_the_features(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(family, torch.float32), batch(family, "padded", torch.float32)
    with torch.no_grad(), vprune.prune(model, "attention", keep=0.4) as pruning:
        wanted = model(**inputs).logits
        kept = [one.kept.tolist() for one in pruning.last or []]

    def look(*_: Any) -> None:
        raise AssertionError("looked")

    monkeypatch.setattr(prefill, "newline_places", look)
    with torch.no_grad(), vprune.prune(model, "attention", keep=0.4) as pruning:
        found = model(**inputs).logits
        assert kept == [one.kept.tolist() for one in pruning.last or []] and kept
    assert torch.equal(wanted, found)
    # Where sizes cannot tell it is looked.
    monkeypatch.setattr("vprune.models.breaks._packed", lambda *_: None)
    with vprune.prune(model, "attention", keep=0.4), pytest.raises(AssertionError, match="looked"):
        model(**inputs)


@pytest.mark.parametrize("numbers", [[2], [3, 2], [2, 1]])
def test_numbers_of_pictures_that_are_not_there(numbers: list[int]) -> None:
    """The model reads as many of `batch_num_images` as there are pictures: so does what foretells it."""
    architecture = ARCHITECTURES["onevision-7b"]
    model = build_shape(architecture.config(True), torch.device("cpu"), torch.float32)
    inputs = {
        **make_prompt(model, architecture, "image", 64, 1).inputs,
        "batch_num_images": torch.tensor(numbers),
    }
    assert len(inputs["image_sizes"]) == 1
    there = newline_places(dissect(model), read_prompt(model, inputs).hidden)
    found = foretold(model, inputs)
    assert found is not None and there is not None and int(there.sum()) == 1
    assert torch.equal(found, there)


@pytest.mark.parametrize("family", LINED)
def test_where_sizes_do_not_tell(family: str) -> None:
    model, inputs = build(family, torch.float32), batch(family, "padded", torch.float32)
    assert foretold(model, {**inputs, "image_sizes": None}) is None
    assert foretold(model, {**inputs, "image_sizes": inputs["image_sizes"][:1]}) is None  # fewer rows than placeholders
    assert foretold(model, {**inputs, "image_sizes": torch.zeros_like(inputs["image_sizes"])}) is None
    plain = build("qwen2_vl", torch.float32)
    assert foretold(plain, batch("qwen2_vl", "padded", torch.float32)) is None
