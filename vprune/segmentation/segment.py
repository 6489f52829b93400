"""`segment(image, ...)`: what a model says it sees, or a phrase, as masks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vprune.errors import VPruneError
from vprune.pruner import Pruner
from vprune.segmentation import memory
from vprune.segmentation.asking import Respondent, counted
from vprune.segmentation.masks import Masks, Spent
from vprune.segmentation.prompting import Drawn, draw
from vprune.segmentation.recipe import Recipe as Recipe
from vprune.segmentation.segmenters import Segmenter, load_segmenter
from vprune.segmentation.stages import Stages

MAX_SIDE, MIN_SIDE = 20_000, 1
_WORKING_SIDE = 2048  # larger pictures are segmented at this size and their masks enlarged


def segment(
    image: Image.Image | str | Path,
    model: Any = "embedded",
    segmenter: Segmenter | str = "embedded",
    phrase: str | None = None,
    recipe: Recipe | None = None,
    method: Pruner | None = None,
    device: str = "auto",
) -> Masks:
    """Masks of everything that a vision-language model says it sees, or of what a phrase means; without training.

    Args:
        image: a picture, or the path of one.
        model: "embedded", a folder, a hub id, or a (model, processor) pair.
        segmenter: a name (see `load_segmenter`), or one that is loaded.
        phrase: what to look for; None: everything.
        recipe: how; None: the defaults of `Recipe`.
        method: a `Pruner` that prunes the image before the model's first layer; the maps are lifted to the full grid.
        device: where the models of given names run.

    Returns:
        `Masks`, best first; empty where nothing was found.

    Raises:
        VPruneError: an image that cannot be read, a phrase that the tokenizer cannot say.

    Example:
        >>> masks = vprune.segment("photo.jpg", phrase="the small red circle")  # doctest: +SKIP
        >>> masks.names, masks.scores  # doctest: +SKIP
        (('small red circle',), array([0.87], dtype=float32))
    """
    return Session(model, segmenter, recipe, method, device)(image, phrase)


class Session:
    """A model and a segmenter, loaded once, for any number of pictures."""

    def __init__(
        self,
        model: Any = "embedded",
        segmenter: Segmenter | str = "embedded",
        recipe: Recipe | None = None,
        method: Pruner | None = None,
        device: str = "auto",
    ) -> None:
        from vprune.eval.models import ModelChoice, load, pick_device

        place = pick_device(device)
        if isinstance(model, str):
            loaded = load(ModelChoice(model, device=device))
            model = (loaded.model, loaded.processor)
        self.model, self.processor = model
        self.segmenter: Segmenter = load_segmenter(segmenter, device=place) if isinstance(segmenter, str) else segmenter
        self.recipe = recipe if recipe is not None else Recipe()
        self.method = method if method is not None and method.hooked else None  # method=full changes nothing

    def __call__(self, image: Image.Image | str | Path, phrase: str | None = None) -> Masks:
        """Masks of one picture; see `segment`.

        Raises:
            VPruneError: see `segment`.
        """
        picture = _opened(image)
        since, device = time.perf_counter(), self.model.device
        memory.begin(device)
        stages = Stages(device)
        respondent = self.respondent(stages)
        masks = self._masks(picture, phrase, respondent, stages)
        before, after = counted(respondent.tokens.values())
        seconds, peak = time.perf_counter() - since, memory.peak_bytes(device)
        return replace(masks, spent=Spent(before, after, seconds, peak, stages.seconds))

    def respondent(self, stages: Stages) -> Respondent:
        """What is asked about one picture, and counts its time to `stages`."""
        return Respondent(self.model, self.processor, self.recipe, self.method, stages)

    def _masks(self, picture: Image.Image, phrase: str | None, respondent: Respondent, stages: Stages) -> Masks:
        size = (picture.height, picture.width)
        shrink = min(1.0, _WORKING_SIDE / max(picture.size))
        if shrink < 1:
            picture = picture.resize([max(1, round(side * shrink)) for side in picture.size], Image.Resampling.LANCZOS)
        boxes = self._views(picture, phrase)
        views = [picture.crop(box) for box in boxes]
        candidates = respondent.listed(views) if phrase is None else respondent.referred(views, phrase)
        if not candidates:
            return Masks.none(size)
        used = sorted({one.view for one in candidates})
        renumbered = [replace(one, view=used.index(one.view)) for one in candidates]
        with stages.timed("encode"):
            encoded = self.segmenter.encode([views[view] for view in used])
        with stages.timed("prompt"):
            drawn = draw(self.segmenter, encoded, renumbered, self.recipe.prompting)
        with stages.timed("merge"):
            return self._merged(drawn, [boxes[view] for view in used], picture.size, size, phrase)

    def _views(self, picture: Image.Image, phrase: str | None) -> list[tuple[int, int, int, int]]:
        width, height = picture.size
        whole = (0, 0, width, height)
        if not self.recipe.crops or phrase is not None or min(width, height) < 32:
            return [whole]
        w, h = math.ceil(self.recipe.crop * width), math.ceil(self.recipe.crop * height)
        return [whole, *((x, y, x + w, y + h) for y in (0, height - h) for x in (0, width - w))]

    def _merged(
        self,
        drawn: Sequence[Drawn],
        boxes: Sequence[tuple[int, int, int, int]],
        shown: tuple[int, int],
        size: tuple[int, int],
        phrase: str | None,
    ) -> Masks:
        """All masks in the picture's own frame, doubles and cut ones left out."""
        arrays, names, scores, points, signs = [], [], [], [], []
        heat = np.zeros((shown[1], shown[0]), np.float32)
        for one in drawn:
            x0, y0, x1, y1 = boxes[one.candidate.view]
            if _cut(one.mask, (x0, y0, x1, y1), shown) or one.score < self.recipe.least:
                continue
            whole = np.zeros((shown[1], shown[0]), dtype=bool)
            whole[y0:y1, x0:x1] = one.mask
            arrays.append(whole)
            names.append(one.candidate.name)
            scores.append(one.score)
            points.append(((one.points + np.array([x0, y0])) * (size[1] / shown[0])).astype(np.float32))
            signs.append(one.signs)
            spread = Image.fromarray(one.candidate.heat).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
            heat[y0:y1, x0:x1] += np.asarray(spread) / max(float(one.candidate.heat.max()), 1e-12)
        if not arrays:
            return Masks.none(size)
        masks = Masks.of(np.stack(arrays), names, np.array(scores, np.float32), points, signs)
        best = masks.without_doubles(self.recipe.overlap)
        small = Image.fromarray(heat).resize((max(1, shown[0] // 8), max(1, shown[1] // 8)), Image.Resampling.BOX)
        return replace((best if phrase is None else best.take([0])).resized(size), heat=np.asarray(small))


def refuse_size(size: tuple[int, int], image: str = "the image") -> None:
    """Refuse a picture of this (width, height).

    Raises:
        VPruneError: a side is too long, or there is nothing in it.
    """
    if not MIN_SIDE <= min(size) <= max(size) <= MAX_SIDE:
        raise VPruneError(
            f"{image} is {size[0]} x {size[1]} pixels; sides from {MIN_SIDE} up to {MAX_SIDE} are taken: scale it first"
        )


def _opened(image: Image.Image | str | Path) -> Image.Image:
    from vprune.eval.benchmarks.images import as_rgb, load_image

    if isinstance(image, str | Path):
        picture = load_image(Path(image))
    elif isinstance(image, Image.Image):
        refuse_size(image.size)
        picture = as_rgb(image)
    else:
        raise VPruneError(
            f"no image can be made of {type(image).__name__}; give a path or a PIL image (of an array: "
            "Image.fromarray(array))"
        )
    refuse_size(picture.size)
    return picture


def _cut(mask: NDArray[np.bool_], box: tuple[int, int, int, int], shown: tuple[int, int]) -> bool:
    """True when a mask touches a border of its view that is none of the picture: the rest of it was cut off."""
    x0, y0, x1, y1 = box
    sides = ((x0 > 0, mask[:, 0]), (y0 > 0, mask[0]), (x1 < shown[0], mask[:, -1]), (y1 < shown[1], mask[-1]))
    return any(inner and bool(side.any()) for inner, side in sides)
