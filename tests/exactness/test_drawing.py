"""Reports as pictures and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vprune
from tests.conftest import picture
from tests.exactness.prompts import batch
from vprune import VPruneError


def report_of(model: Any, inputs: dict[str, torch.Tensor], method: str, **options: Any) -> Any:
    with torch.no_grad(), vprune.prune(model, method, keep=0.25, **options) as pruning:
        model(**inputs)
    return pruning.last


@pytest.mark.parametrize("method", [name for name in vprune.method_names() if name != "full"])
def test_every_report_draws_and_describes(tiny_vlm: Any, tiny_processor: Any, method: str) -> None:
    report = report_of(tiny_vlm(), batch(tiny_processor, "single"), method)
    drawn = report.draw(picture(0))
    panels = 1 if report.importance is None else 2
    assert drawn.mode == "RGB" and drawn.width >= panels * 300 and drawn.height >= 300
    assert f"{report.tokens_after} of 36 visual tokens (6 x 6) stay" in report.describe()
    assert report.draw().size[0] > 0


@pytest.mark.parametrize("given", ["kept.png", Path("kept.png"), np.zeros((4, 4, 3)), ["kept.png"], 3])
def test_what_is_no_picture_is_refused(tiny_vlm: Any, tiny_processor: Any, given: Any) -> None:
    report = report_of(tiny_vlm(), batch(tiny_processor, "single"), "random")
    told = r"draw takes the picture that was pruned, a PIL.Image .*save\('kept.png'"
    for drawn in (report, report[0]):
        with pytest.raises(VPruneError, match=told):
            drawn.draw(given)


def test_there_is_no_report_before_a_prompt_with_images_and_none_of_the_full_model(
    tiny_vlm: Any, tiny_processor: Any
) -> None:
    inputs = batch(tiny_processor, "single")
    text = {key: inputs[key][:, -3:] for key in ("input_ids", "attention_mask")}
    for method in ("random", "full"):
        with torch.no_grad(), vprune.prune(tiny_vlm(), method) as pruning:
            assert pruning.last is None
            tiny_vlm()(**text)
            assert pruning.last is None
            tiny_vlm()(**inputs)
            before = pruning.last
            tiny_vlm()(**text)
            assert pruning.last is before and (before is None) == (method == "full")


def test_pruned_patches_are_grey_and_kept_ones_are_not(tiny_vlm: Any, tiny_processor: Any) -> None:
    report = report_of(tiny_vlm(), batch(tiny_processor, "single"), "random")
    pixels = np.asarray(report.draw(picture(0, (60, 60))), dtype=np.int64)[-444:, :444]
    patches = pixels.reshape(6, 74, 6, 74, 3)[:, 10:-10, :, 10:-10]
    colourful = (patches.max(-1) - patches.min(-1)).mean((1, 3)).flatten()
    kept = np.zeros(36, dtype=bool)
    kept[report.kept.numpy()] = True
    assert colourful[~kept].max() < 3 < colourful[kept].min()


def test_a_report_of_several_images(tiny_vlm: Any, tiny_processor: Any) -> None:
    report = report_of(tiny_vlm(), batch(tiny_processor, "several"), "attention", recycle="grid")
    pictures = [picture(n) for n in range(3)]
    assert report.draw(pictures).height > 3 * 300
    assert len(report.describe().splitlines()) == 3 and "merged tokens" in report.describe()
    with pytest.raises(vprune.VPruneError, match="2 pictures for a report of 3 images"):
        report.draw(pictures[:2])
