"""`vprune eval benchmark=scenes_segment`: open-ended and referring segmentation of the scenes, pruned or whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from vprune.errors import VPruneError
from vprune.eval.benchmarks.sample import Benchmark, Sample
from vprune.eval.benchmarks.scenes import Scenes
from vprune.segmentation.memory import Peak
from vprune.segmentation.metrics import coco_measures, intersection_and_union, mean_iou, overall_iou
from vprune.segmentation.recipe import Recipe

OPEN, REFER = "open", "refer"
_APART = 1.0  # pixels by which a border of an expression's box and of its object's mask may differ


class ScenesSegment:
    """Every image once for everything in it, and every `point to ...` question as a referring expression.

    Raises:
        VPruneError: see `Scenes` and `made_recipe`; from `samples`, for an expression none of whose objects is in its
            box.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        name: str = "scenes_segment",
        segmenter: str = "embedded",
        segmenter_path: str | None = None,
        empty_union: float = 0,
        recipe: Mapping[str, Any] | str | None = None,
    ) -> None:
        self.name, self._scenes = name, Scenes(path, name=name)
        self._segmenter, self._segmenter_path = segmenter, segmenter_path
        self._empty, self._recipe, self._peak = float(empty_union), made_recipe(recipe), Peak()
        first = next(iter(self._scenes.samples))
        assert isinstance(first.image, Path)
        self._folder = first.image.parent.parent
        self.fingerprint, self.has_evidence, self.has_video = self._scenes.fingerprint, False, False

    @cached_property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self._folder / "objects.json").read_text(encoding="utf-8"))
        return content

    @cached_property
    def _by_id(self) -> dict[int, dict[str, Any]]:
        return {int(one["id"]): one for one in self._content["annotations"]}

    @property
    def categories(self) -> Sequence[str]:
        """What there can be in an image."""
        return tuple(str(one["name"]) for one in self._content["categories"])

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """One sample an image (kind `open`), and one an expression (kind `refer`)."""
        images = [
            Sample(f"open-{one['id']:06d}", self._folder / one["file_name"], OPEN, "", "", (int(one["id"]),))
            for one in self._content["images"]
        ]
        expressions = [one for one in self._scenes.samples if one.kind == REFER]
        for one in expressions:
            self._meant(one)
        return [*images, *expressions]

    def _meant(self, sample: Sample) -> dict[str, Any]:
        """The one object that an expression means: that in its box.

        The evidence of "the leftmost star" is all the stars, for the answer rests on all of them.
        """
        assert sample.box is not None  # (`Folder` sees to it)
        apart = {number: _apart(self._by_id[number]["segmentation"], sample.box) for number in sample.evidence}
        nearest = min(apart, key=apart.__getitem__, default=None)
        if nearest is None or apart[nearest] > _APART:
            raise VPruneError(
                f"{self.name}, sample {sample.id}: none of its evidence {list(sample.evidence)} has the box "
                f"{list(sample.box)}, so no mask can be told right; the box has to be that of one of their masks, "
                f"[x0, y0, x1, y1] to within {_APART:g} pixel"
            )
        return self._by_id[nearest]

    def prompt(self, sample: Sample) -> str:
        """The phrase of an expression; nothing for an image."""
        return sample.question.removeprefix("point to ").removesuffix(".")

    def load_image(self, sample: Sample) -> Image.Image:
        """The sample's image."""
        return self._scenes.load_image(sample)

    def load_video(self, sample: Sample) -> NDArray[np.uint8]:
        """There are none."""
        raise VPruneError(f"benchmark={self.name} has images only")

    def evidence_mask(self, sample: Sample) -> None:
        """No mask is told: what is to be found would be given away."""
        return

    def truth(self, sample: Sample) -> list[NDArray[np.bool_]]:
        """The masks that belong to a sample: all objects of an image, the one that an expression means."""
        if sample.kind == OPEN:
            own = [one for one in self._content["annotations"] if one["image_id"] == sample.evidence[0]]
        else:
            own = [self._meant(sample)]
        return [coco_mask.decode(_packed(one["segmentation"])).astype(bool) for one in own]

    def score(self, sample: Sample, prediction: str) -> float:
        """IoU of an expression's mask; of an image, the recall of its objects averaged over IoU .5 to .95."""
        found, truth = _decoded(prediction), self.truth(sample)
        if sample.kind == REFER:
            i, u = self._pair(found, truth[0])
            return i / u if u else self._empty
        best = [max((_iou(mask, one) for mask in found), default=0.0) for one in truth]
        return float(np.mean([[b > t for t in np.arange(0.5, 1.0, 0.05)] for b in best])) if best else 1.0

    def _pair(self, found: Sequence[NDArray[np.bool_]], truth: NDArray[np.bool_]) -> tuple[int, int]:
        return intersection_and_union(found[0] if found else np.zeros_like(truth), truth)

    def predictor(self, loaded: Any, method: Any) -> SegmentPredictor:
        """What answers the samples."""
        session = session_of(loaded, method, self._segmenter, self._segmenter_path, self._recipe)
        self._peak = Peak()
        return SegmentPredictor(self, session, peak=self._peak)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """referring_miou, referring_oiou, open_ap, open_ap50 and open_ar100 of the rows of `predictions.jsonl`.

        And `peak_memory_bytes`, of what this process answered of them; None if it answered nothing.
        """
        samples = {sample.id: sample for sample in self.samples}
        pairs: list[tuple[int, int]] = []
        found: list[dict[str, Any]] = []
        images: list[int] = []
        for row in rows:
            sample = samples[row["id"]]
            if sample.kind == REFER:
                pairs.append(self._pair(_decoded(row["prediction"] or "[]"), self.truth(sample)[0]))
                continue
            images.append(sample.evidence[0])
            for one in json.loads(row["prediction"] or "[]"):
                result = {"image_id": sample.evidence[0], "category_id": 1}
                found.append({**result, "segmentation": one["segmentation"], "score": one["score"]})
        truth = {
            **self._content,
            "images": [one for one in self._content["images"] if one["id"] in images],
            "annotations": [one for one in self._content["annotations"] if one["image_id"] in images],
        }
        measured = {
            "referring_miou": mean_iou(pairs, self._empty),
            "referring_oiou": overall_iou(pairs, self._empty) if pairs else float("nan"),
            **coco_measures(truth, found),
        }
        rounded = {key: None if np.isnan(value) else round(value, 6) for key, value in measured.items()}
        return {**rounded, "peak_memory_bytes": self._peak.bytes}


def made_recipe(given: Mapping[str, Any] | str | None) -> Recipe:
    """The recipe of an entry in conf/recipe/, or of fields of conf/segment.yaml in place of their defaults.

    `maps` may be the name of an entry in conf/maps/, too.

    Raises:
        VPruneError: there is no such entry or field, or a value is out of range.
    """
    from omegaconf import OmegaConf

    from vprune.eval.options import entries, listed
    from vprune.eval.overrides import unknown
    from vprune.segmentation.app import configured, recipe_of

    if isinstance(given, str):
        if given not in entries("recipe"):
            words = f"{listed('recipe')}, or fields of conf/segment.yaml"
            raise unknown("benchmark.recipe", given, entries("recipe"), words)
        text = (files("vprune.conf") / "recipe" / f"{given}.yaml").read_text(encoding="utf-8")
        fields: Any = OmegaConf.to_container(OmegaConf.create(text))
    else:
        fields = dict(given or {})
    if not fields:
        return Recipe()
    defaults = configured([f"maps={fields.pop('maps')}"] if isinstance(fields.get("maps"), str) else [])
    if wrong := set(fields) - set(defaults):
        raise VPruneError(f"benchmark.recipe: there is no {', '.join(sorted(wrong))} in conf/segment.yaml")
    merged: Any = OmegaConf.to_container(OmegaConf.merge(defaults, fields))
    recipe: Recipe = recipe_of(merged)
    return recipe


def session_of(
    loaded: Any,
    method: Any,
    segmenter: str,
    segmenter_path: str | None,
    recipe: Recipe | Mapping[str, Any] | str | None,
) -> Any:
    """The `Session` of a loaded model; `recipe`: one, or what `made_recipe` makes one of.

    Raises:
        VPruneError: see `made_recipe` and `load_segmenter`.
    """
    from vprune.segmentation.segment import Session
    from vprune.segmentation.segmenters import load_segmenter

    how = recipe if isinstance(recipe, Recipe) else made_recipe(recipe)
    loaded_segmenter = load_segmenter(segmenter, segmenter_path, loaded.device)
    return Session((loaded.model, loaded.processor), loaded_segmenter, how, method, str(loaded.device))


class SegmentPredictor:
    """Answers samples with masks, as JSON: a list of segmentation, score and name, best first.

    `categories` gives the category ids of names; None: the names stand alone. `peak` is told how much memory the
    pictures took.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        session: Any,
        categories: Callable[[Sequence[str]], Sequence[int]] | None = None,
        peak: Peak | None = None,
    ) -> None:
        self.benchmark, self.session, self.categories = benchmark, session, categories
        self.peak = peak if peak is not None else Peak()
        self._since = time.perf_counter()

    def run(self, batches: Sequence[Sequence[Sample]], workers: int | None = None) -> Iterator[list[Any]]:
        """The answers to each batch in turn."""
        for batch in batches:
            yield [self._answer(sample) for sample in batch]

    def _answer(self, sample: Sample) -> Any:
        from vprune.eval.predictor import Answer

        phrase = self.benchmark.prompt(sample) if sample.kind == REFER else None
        try:
            masks = self.session(self.benchmark.load_image(sample), phrase)
        except (OSError, RuntimeError, ValueError) as error:
            return Answer("", None, None, error=f"{type(error).__name__}: {error}")
        found = [{key: one[key] for key in ("segmentation", "score", "name")} for one in masks.to_coco()]
        if self.categories is not None:
            for one, category in zip(found, self.categories(masks.names), strict=True):
                one["category_id"] = category
        self.peak.rise(masks.spent.peak_bytes)
        return Answer(json.dumps(found), masks.spent.tokens_before, masks.spent.tokens_after)

    def take_seconds(self) -> dict[str, float]:
        """Seconds since the last call."""
        now = time.perf_counter()
        taken, self._since = {"total": now - self._since}, now
        return taken


def _apart(rle: Mapping[str, Any], box: Sequence[float]) -> float:
    """Pixels between the border of a mask and that of a box (x0, y0, x1, y1) where they lie furthest apart."""
    x, y, w, h = coco_mask.toBbox(_packed(rle))
    return float(np.abs(np.subtract(box, (x, y, x + w, y + h))).max())


def _packed(rle: Mapping[str, Any]) -> dict[str, Any]:
    return {"size": list(rle["size"]), "counts": str(rle["counts"]).encode()}


def _decoded(prediction: str) -> list[NDArray[np.bool_]]:
    return [coco_mask.decode(_packed(one["segmentation"])).astype(bool) for one in json.loads(prediction)]


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    i, u = intersection_and_union(one, other)
    return i / u if u else 0.0
