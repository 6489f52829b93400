"""`segment(image, ...)`: what a model says it sees, or a phrase, as masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vprune.errors import VPruneError
from vprune.pruner import Pruner
from vprune.segmentation.maps import MeanAttention
from vprune.segmentation.masks import Masks
from vprune.segmentation.prompting import Candidate, Drawn, Prompting, draw
from vprune.segmentation.reading import Extractor, read
from vprune.segmentation.segmenters import Segmenter, load_segmenter
from vprune.segmentation.words import TokenText, names_in, plain, unaligned

MAX_SIDE, MIN_SIDE = 20_000, 1
_WORKING_SIDE = 2048  # larger pictures are segmented at this size and their masks enlarged


@dataclass
class Recipe:
    """How a picture becomes masks; see conf/segment.yaml, which names every field and its default.

    Args:
        questions: how the model is asked what it sees; the answers to all of them are merged.
        refer: how it is asked for a phrase, `{phrase}` standing for it.
        maps: what makes maps of attention, see `vprune.segmentation.maps`.
        background: a phrase whose map is taken off every object's (DecAF's contrast); None: no contrast.
        rows: which tokens of a name are asked: all | content (no stop words) | last.
        final: ask the prompt's last token too, where a phrase is looked for.
        crops: look at the four corners of the picture too, each `crop` of its sides.
        prompting: how maps become masks.
        overlap: IoU above which the lesser of two masks is dropped.
        least: masks of a lower score are dropped.
        max_new_tokens: of a listing.

    Raises:
        VPruneError: a value out of range.
    """

    questions: Sequence[str] = ("list the objects.",)
    refer: str = "point to the {phrase}."
    maps: Extractor = field(default_factory=lambda: MeanAttention(first=0.25, last=0.5))
    background: str | None = None
    rows: str = "last"
    final: bool = True
    crops: bool = False
    crop: float = 0.6
    prompting: Prompting = field(default_factory=Prompting)
    overlap: float = 0.7
    least: float = 0.0
    max_new_tokens: int = 96

    def __post_init__(self) -> None:
        if self.rows not in ("all", "content", "last"):
            raise VPruneError(f"rows={self.rows}: choose one of all, content, last")
        if "{phrase}" not in self.refer:
            raise VPruneError(f"refer={self.refer!r}: it has no {{phrase}} in it")
        if not 0.5 <= self.crop < 1 or not 0 < self.overlap <= 1 or not self.questions:
            raise VPruneError("0.5 <= crop < 1, 0 < overlap <= 1 and at least one question are needed")


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
        self.method = method

    def __call__(self, image: Image.Image | str | Path, phrase: str | None = None) -> Masks:
        """Masks of one picture; see `segment`.

        Raises:
            VPruneError: see `segment`.
        """
        picture = _opened(image)
        size = (picture.height, picture.width)
        shrink = min(1.0, _WORKING_SIDE / max(picture.size))
        if shrink < 1:
            picture = picture.resize([max(1, round(side * shrink)) for side in picture.size], Image.Resampling.LANCZOS)
        boxes = self._views(picture, phrase)
        views = [picture.crop(box) for box in boxes]
        candidates = self._candidates(views, phrase)
        if not candidates:
            return Masks.none(size)
        used = sorted({one.view for one in candidates})
        renumbered = [replace(one, view=used.index(one.view)) for one in candidates]
        encoded = self.segmenter.encode([views[view] for view in used])
        drawn = draw(self.segmenter, encoded, renumbered, self.recipe.prompting)
        return self._merged(drawn, [boxes[view] for view in used], picture.size, size, phrase)

    # -- what is looked at ------------------------------------------------------------------------------------------

    def _views(self, picture: Image.Image, phrase: str | None) -> list[tuple[int, int, int, int]]:
        width, height = picture.size
        whole = (0, 0, width, height)
        if not self.recipe.crops or phrase is not None or min(width, height) < 32:
            return [whole]
        w, h = math.ceil(self.recipe.crop * width), math.ceil(self.recipe.crop * height)
        return [whole, *((x, y, x + w, y + h) for y in (0, height - h) for x in (0, width - w))]

    def _candidates(self, views: Sequence[Image.Image], phrase: str | None) -> list[Candidate]:
        if phrase is not None:
            return self._referred(views, phrase)
        found = []
        for number, view in enumerate(views):
            for question in self.recipe.questions:
                found += self._listed(number, view, question)
        return found

    def _prompt(self, question: str) -> str:
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text: str = self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return text

    def _inputs(self, view: Image.Image, question: str) -> Any:
        inputs = self.processor(images=[view], text=[self._prompt(question)], return_tensors="pt")
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _referred(self, views: Sequence[Image.Image], phrase: str) -> list[Candidate]:
        wanted = plain(phrase)
        if not wanted:
            raise VPruneError(f"phrase={phrase!r} names nothing")
        found = []
        for number, view in enumerate(views):
            inputs = self._inputs(view, self.recipe.refer.format(phrase=wanted))
            text, ids = self._text(inputs)
            at = text.find(wanted, last=True)
            if at is None:
                raise unaligned(phrase)
            rows = self._rows(text, wanted, at[0]) + ([len(ids) - 1] if self.recipe.final else [])
            (heat,) = self._heats(view, inputs, [rows])
            found.append(Candidate(number, wanted, heat))
        return found

    def _listed(self, number: int, view: Image.Image, question: str) -> list[Candidate]:
        inputs = self._inputs(view, question)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            said = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.recipe.max_new_tokens,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        answer = self.processor.tokenizer.decode(said[0, length:], skip_special_tokens=True)
        names = names_in(answer)
        if not names:
            return []
        whole = _with_answer(inputs, said)
        text = TokenText.of(self.processor.tokenizer, said[0].tolist(), length)
        groups, kept, after = [], [], 0
        for name in names:
            at = text.find(name, after)
            if at is not None:
                after = at[1]
                groups.append(self._rows(text, name, at[0]))
                kept.append(name)
        return [
            Candidate(number, name, heat) for name, heat in zip(kept, self._heats(view, whole, groups), strict=True)
        ]

    def _text(self, inputs: Any) -> tuple[TokenText, list[int]]:
        ids = inputs["input_ids"][0].tolist()
        images = {getattr(self.model.config, key, None) for key in ("image_token_id", "video_token_id")}
        last = max((place for place, one in enumerate(ids) if one in images), default=-1)
        return TokenText.of(self.processor.tokenizer, ids, last + 1), ids

    def _rows(self, text: TokenText, name: str, places: list[int]) -> list[int]:
        if self.recipe.rows == "all":
            return places
        content = text.content(name, places)
        return content[-1:] if self.recipe.rows == "last" else content

    # -- what is attended to ----------------------------------------------------------------------------------------

    def _heats(self, view: Image.Image, inputs: Any, groups: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """One map a group of rows, float32 [h, w] over the view, less that of the background."""
        flat = [row for group in groups for row in group]
        if not flat:
            return []
        reading = read(self.model, inputs, flat, self.recipe.maps, self.method)
        maps = whole_view(reading.on_grid(0), [reading.on_grid(i) for i in range(1, len(reading.images))])
        heats, start = [], 0
        for group in groups:
            heats.append(maps[start : start + len(group)].mean(0))
            start += len(group)
        if self.recipe.background is not None:
            nothing = self._background(view)
            heats = [(one / one.sum().clamp(min=1e-12) - nothing).clamp(min=0) for one in heats]
        return [one.float().numpy() for one in heats]

    def _background(self, view: Image.Image) -> torch.Tensor:
        assert self.recipe.background is not None
        inputs = self._inputs(view, self.recipe.refer.format(phrase=self.recipe.background))
        text, ids = self._text(inputs)
        at = text.find(self.recipe.background, last=True)
        rows = ([] if at is None else self._rows(text, self.recipe.background, at[0])) or [len(ids) - 1]
        reading = read(self.model, inputs, rows, self.recipe.maps, self.method)
        heat = whole_view(reading.on_grid(0), [reading.on_grid(i) for i in range(1, len(reading.images))]).mean(0)
        return heat / heat.sum().clamp(min=1e-12)

    # -- what is kept -----------------------------------------------------------------------------------------------

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
            arrays.append(_resized(whole, size))
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
        return replace(best if phrase is None else best.take([0]), heat=np.asarray(small))


def whole_view(first: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """One map [R, h, w] of a picture that the model reads as one grid, or as a grid first and finer tiles after it.

    The tiles of models that cut pictures up are left out: the first grid of them shows the whole picture, or is the
    only one. Frames are averaged.
    """
    del others
    return first.mean(1)


def _opened(image: Image.Image | str | Path) -> Image.Image:
    from vprune.eval.benchmarks.images import load_image

    picture = load_image(Path(image)) if isinstance(image, str | Path) else image.convert("RGB")
    if max(picture.size) > MAX_SIDE:
        raise VPruneError(f"the image is {picture.width} x {picture.height} pixels; sides up to {MAX_SIDE} are taken")
    return picture


def _with_answer(inputs: Any, said: torch.Tensor) -> dict[str, Any]:
    """The inputs of a prompt with what was generated behind it."""
    new = said.shape[1] - inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": said, "attention_mask": torch.ones_like(said)}
    kinds = whole.get("mm_token_type_ids", whole.get("token_type_ids"))
    if kinds is not None:
        name = "mm_token_type_ids" if "mm_token_type_ids" in whole else "token_type_ids"
        whole[name] = torch.cat([kinds, kinds.new_zeros(1, new)], 1)
    return whole


def _cut(mask: NDArray[np.bool_], box: tuple[int, int, int, int], shown: tuple[int, int]) -> bool:
    """True when a mask touches a border of its view that is none of the picture: the rest of it was cut off."""
    x0, y0, x1, y1 = box
    sides = ((x0 > 0, mask[:, 0]), (y0 > 0, mask[0]), (x1 < shown[0], mask[:, -1]), (y1 < shown[1], mask[-1]))
    return any(inner and bool(side.any()) for inner, side in sides)


def _resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    if mask.shape == size:
        return mask
    picture = Image.fromarray(mask.astype(np.uint8) * 255).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture) > 127
