"""README's call, unchanged, with the true processor of every family: what it makes of pictures is what gets pruned."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import vprune
from tests.conftest import picture
from tests.exactness.agreement import agree
from tests.exactness.families import FAMILIES, IMAGE, LINED, QWEN, VIDEO, VIDEOS, build
from tests.exactness.processors import PATCH, build_processor, lined_side
from tests.exactness.test_families import STEPS, generated, line_breaks, masked, stepped

Media = Image.Image | NDArray[np.uint8]
Rows = list[list[Media]]
Grid = tuple[int, int, int]
ROOT = Path(__file__).parents[2]
README: dict[str, Any] = {"method": "learned", "recycle": "anchors", "size_aware": True}
QUESTIONS = ["what is the number ?", "where is the red circle ?", "count the blue square above the green circle ."]


def clip(seed: int, frames: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A video [frames, height, width, 3] of a picture that fades into another."""
    first, last = (np.asarray(picture(one, size), dtype=np.float32) for one in (seed, seed + 1))
    shares = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None, None]
    return (first * (1 - shares) + last * shares).astype(np.uint8)


# Rows of a batch with none, one and two; all differ in size and shape.
PICTURES: Rows = [[], [picture(1, (28, 80))], [picture(2, (64, 40)), picture(3, (36, 36))]]
CLIPS: Rows = [[], [clip(4, 4, (24, 40))], [clip(6, 4, (40, 32)), clip(8, 4, (36, 24))]]
BOTH: Rows = [[picture(1, (28, 80))], [clip(4, 4, (24, 40))], [clip(6, 4, (40, 32)), picture(2, (64, 40))]]
# InternVL and SmolVLM read frames as pictures, and SmolVLM's processor takes either pictures or videos.
FILMED = [(family, "videos") for family in (*VIDEOS, "internvl", "smolvlm")]
FILMED += [(family, "both") for family in (*VIDEOS, "internvl")]


@pytest.fixture(scope="module", autouse=True)
def _numbers_as_words() -> Iterator[None]:
    """SmolVLM's processor refuses to be made without num2words, which only spells the frame counts of videos."""
    from transformers.models.smolvlm import processing_smolvlm

    with pytest.MonkeyPatch.context() as patch:
        if processing_smolvlm.num2words is None:
            patch.setattr(processing_smolvlm, "num2words", str)
        yield


@pytest.fixture(scope="module")
def made() -> Callable[..., Any]:
    pairs: dict[Any, Any] = {}

    def make(family: str, dtype: torch.dtype = torch.float64) -> Any:
        if (family, dtype) not in pairs:
            pairs[family, dtype] = build(family, dtype), build_processor(family)
        return pairs[family, dtype]

    return make


def conversations(rows: Rows, filled: bool = False) -> list[list[dict[str, Any]]]:
    """One user turn per row; `filled`: the parts hold the pictures themselves."""
    turns = []
    for row, question in zip(rows, QUESTIONS, strict=True):
        parts: list[dict[str, Any]] = []
        for one in row:
            kind = "image" if isinstance(one, Image.Image) else "video"
            parts.append({"type": kind, kind: one} if filled else {"type": kind})
        turns.append([{"role": "user", "content": [*parts, {"type": "text", "text": question}]}])
    return turns


def called(processor: Any, rows: Rows) -> Any:
    """Inputs by README's two calls: template to text, then pictures and text together."""
    text = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations(rows)]
    media: dict[str, Any] = {}
    for name, kind in (("images", Image.Image), ("videos", np.ndarray)):
        nested = [[one for one in row if isinstance(one, kind)] for row in rows]
        if any(nested):
            media[name] = nested
    return processor(**media, text=text, padding=True, return_tensors="pt")


def templated(processor: Any, rows: Rows) -> Any:
    """The same by one call of the template."""
    return processor.apply_chat_template(
        conversations(rows, filled=True),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def expected_grids(family: str, processor: Any, inputs: Any, rows: Rows) -> list[tuple[int, Grid]]:
    """Sample and grid of every image, in order, as the processor's own outputs tell them."""
    found: list[tuple[int, Grid]] = []
    pictures = clips = 0
    filmed = any(isinstance(one, np.ndarray) for row in rows for one in row)
    for sample, row in enumerate(rows):
        if family in ("idefics3", "smolvlm") and not filmed:
            tiles = int(inputs["pixel_attention_mask"][sample].flatten(1).any(-1).sum())  # the others pad the batch
            found += [(sample, (1, 4, 4))] * tiles
            continue
        for one in row:
            grids: list[Grid]
            if isinstance(one, Image.Image):
                grids = grids_of_picture(family, processor, inputs, one, pictures)
                pictures += 1
            else:
                grids = grids_of_clip(family, inputs, one, clips)
                clips += 1
            found += [(sample, grid) for grid in grids]
    if family in ("internvl", "gemma3"):
        assert len(found) == len(inputs["pixel_values"])
    return found


def grids_of_picture(family: str, processor: Any, inputs: Any, image: Image.Image, number: int) -> list[Grid]:
    """The grids of the `number`-th picture of the batch."""
    from transformers.image_processing_utils import select_best_resolution

    if family in QWEN:
        t, h, w = inputs["image_grid_thw"][number].tolist()
        return [(t, h // 2, w // 2)]
    if family == "internvl":
        return [(1, 4, 4)] * int(processor.image_processor(image, crop_to_patches=True)["num_patches"][0])
    if family not in LINED:
        return [(1, 4, 4)]
    tile = lined_side()
    side = tile // PATCH
    together = [count for count in inputs.get("batch_num_images", []) for _ in range(int(count))]
    if together and together[number] > 1:  # LLaVA-OneVision cuts a picture into tiles only where it is alone
        return [(1, side, side)]
    size = inputs["image_sizes"][number].tolist()
    best = select_best_resolution(size, processor.image_processor.image_grid_pinpoints)
    tokens, lines = processor._get_unpadded_features(*size, side, side, *(length // tile for length in best))
    return [(1, side, side), (1, lines, tokens // lines)]


def grids_of_clip(family: str, inputs: Any, video: NDArray[np.uint8], number: int) -> list[Grid]:
    """The grids of the `number`-th video of the batch."""
    if family in QWEN:
        t, h, w = inputs["video_grid_thw"][number].tolist()
        return [(t, h // 2, w // 2)]
    if family in LINED:
        side = lined_side() // PATCH // 2
        return [(inputs["pixel_values_videos"].shape[1], side, side)]
    return [(1, 4, 4)] * len(video)  # every frame is a picture


def check(model: Any, inputs: Any, expected: list[tuple[int, Grid]], **options: Any) -> None:
    """Prune to 0.3 and compare with the masked model; rows without pictures with the model alone."""
    plain = generated(model, inputs)
    with vprune.prune(model, keep=0.3, **options) as pruning:
        pruned = generated(model, inputs)
    reports = list(pruning.last or [])
    assert [(report.sample, report.grid) for report in reports] == expected
    assert [report.tokens_before for report in reports] == [t * h * w for _, (t, h, w) in expected]
    assert all(report.tokens_after == max(1, 3 * report.tokens_before // 10) for report in reports)
    ids, mask, breaks = inputs["input_ids"], inputs["attention_mask"], line_breaks(model, inputs)
    assert mask[:, -1].all() and not mask.all()  # padded, on the left
    visual = (ids == IMAGE) | (ids == VIDEO)
    told = visual.sum() if breaks is None else (visual & ~breaks).sum()
    assert int(told) == sum(report.tokens_before for report in reports)
    with masked(model, ids, mask, reports, options.get("size_aware", False), breaks):
        oracle = stepped(model, inputs, pruned.sequences)
    full = stepped(model, inputs, pruned.sequences)
    assert len(pruned.logits) == STEPS
    agree(pruned.logits, oracle)
    with_pictures = sorted({sample for sample, _ in expected})
    assert all(float((pruned.logits[0] - full[0])[row].abs().max()) > 1e-2 for row in with_pictures)  # the control
    for row in set(range(len(ids))) - set(with_pictures):
        assert torch.equal(pruned.sequences[row], plain.sequences[row])
        for mine, theirs in zip(pruned.logits, plain.logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processors_batch_is_pruned_as_the_masked_model(made: Any, family: str) -> None:
    model, processor = made(family)
    inputs = called(processor, PICTURES).to(torch.float64)
    check(model, inputs, expected_grids(family, processor, inputs, PICTURES), **README)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizing_chat_template_gives_the_same_batch_to_prune(made: Any, family: str) -> None:
    model, processor = made(family)
    inputs, other = templated(processor, PICTURES), called(processor, PICTURES)
    assert inputs.keys() == other.keys() and all(torch.equal(inputs[name], other[name]) for name in other)
    inputs = inputs.to(torch.float64)
    check(model, inputs, expected_grids(family, processor, inputs, PICTURES), method="attention")


@pytest.mark.parametrize(("family", "kind"), FILMED)
def test_videos_of_a_processor_are_pruned_as_the_masked_model(made: Any, family: str, kind: str) -> None:
    (model, processor), rows = made(family), CLIPS if kind == "videos" else BOTH
    inputs = called(processor, rows).to(torch.float64)
    check(model, inputs, expected_grids(family, processor, inputs, rows), method="attention")


def test_pictures_in_one_flat_list_are_each_cut_into_tiles_by_llava_onevision(made: Any) -> None:
    model, processor = made("llava_onevision")
    text = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations(PICTURES)]
    flat = [one for row in PICTURES for one in row]
    inputs = processor(images=flat, text=text, padding=True, return_tensors="pt").to(torch.float64)
    expected = expected_grids("llava_onevision", processor, inputs, PICTURES)
    assert len(expected) == 2 * len(flat)  # an overview and a finer grid of each
    check(model, inputs, expected, **README)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_of_a_processors_batch_is_the_unhooked_model(made: Any, family: str) -> None:
    model, processor = made(family, torch.float32)
    inputs = called(processor, PICTURES)
    plain = generated(model, inputs)
    with vprune.prune(model, keep=1.0, **README) as pruning:
        kept = generated(model, inputs)
    assert pruning.last and all(report.tokens_after == report.tokens_before for report in pruning.last)
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_snippet_of_the_readme_runs(
    made: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.search(r"```python\n(import vprune\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert found is not None
    snippet, keep, loaded = found[1], "keep=0.1", '"assets/models/vlm"'
    assert snippet.count(keep) == snippet.count(loaded) == 1
    tiny, its_processor = made(family, torch.float32)
    tiny.save_pretrained(tmp_path / "model")
    its_processor.save_pretrained(tmp_path / "model")
    # A random model may say one word for ever, whatever it sees; one that may not repeat itself shows what it saw.
    once = copy.deepcopy(tiny.generation_config)
    once.no_repeat_ngram_size = 1
    once.save_pretrained(tmp_path / "model")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    snippet = snippet.replace(loaded, '"model"')
    pruned: dict[str, Any] = {}
    exec(snippet, pruned)
    assert type(pruned["model"]) is type(tiny) and type(pruned["processor"]) is type(its_processor)
    assert all(report.tokens_after == max(1, report.tokens_before // 10) for report in pruned["pruning"].last)
    assert len(pruned["pruning"].last) > 0 and Image.open("kept.png").size[0] > 0
    everything: dict[str, Any] = {}
    exec(snippet.replace(keep, "keep=1.0"), everything)
    model, processor = everything["model"], everything["processor"]
    inputs: dict[str, Tensor] = processor(images=everything["image"], text=everything["prompt"], return_tensors="pt")
    assert torch.equal(everything["answer"], model.generate(**inputs, max_new_tokens=32))
    assert not torch.equal(pruned["answer"], everything["answer"])  # the control
