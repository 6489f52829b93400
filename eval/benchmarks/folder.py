"""A benchmark on disk: `samples.jsonl` beside the images it names, and optionally `objects.json` with masks.

One JSON object a line:

    {"id": "12-3", "image": "images/12.webp", "kind": "where", "question": "where is the red circle?",
     "answer": "top left", "evidence": [3, 5]}

`evidence` (annotation ids in `objects.json`, COCO format with RLE masks) and `box` (pixels, for kind `refer`) may be
absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vprune.errors import VPruneError
from vprune.eval.benchmarks.images import ImageCache, check_image
from vprune.eval.benchmarks.objects import Objects
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.metrics import exact_match, list_f1, point_in_box

SAMPLES_FILE = "samples.jsonl"
OBJECTS_FILE = "objects.json"


class Folder:
    """Samples of a folder, every line checked when the benchmark is made.

    `list` answers are scored by F1 over the names, answers with a `box` by whether the point lies in it, all others by
    exact match. `template` wraps the question, for models that want an instruction: "{question} Answer briefly.".
    `kinds` limits the kinds a line may name; None allows any.

    Raises VPruneError, with file and line, for broken JSON, missing keys, empty questions, ids given twice, unknown
    kinds, missing, unreadable or oversized images, and evidence that `objects.json` does not know.
    """

    has_video = False

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        template: str = "{question}",
        kinds: Collection[str] | None = None,
    ) -> None:
        self._folder = Path(path).expanduser().resolve()
        if not self._folder.is_dir():
            raise VPruneError(f"benchmark folder {path} does not exist")
        check_template(template)
        self._name = name or self._folder.name
        self._template = template
        self._kinds = kinds
        self._images = ImageCache()
        objects = self._folder / OBJECTS_FILE
        self._objects = Objects(objects) if objects.is_file() else None
        self._samples = self._read()

    @property
    def name(self) -> str:
        """The folder's name, or the one given."""
        return self._name

    @property
    def samples(self) -> Sequence[Sample]:
        """Every sample, in the order of `samples.jsonl`."""
        return self._samples

    @property
    def has_evidence(self) -> bool:
        """Whether `objects.json` stands beside the samples."""
        return self._objects is not None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of `samples.jsonl`, `objects.json` and the images' names and sizes."""
        digest = hashlib.sha256((self._folder / SAMPLES_FILE).read_bytes())
        if self._objects is not None:
            digest.update((self._folder / OBJECTS_FILE).read_bytes())
        for path in sorted({sample.image for sample in self._samples if isinstance(sample.image, Path)}):
            digest.update(f"{path.relative_to(self._folder)} {path.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]

    def prompt(self, sample: Sample) -> str:
        """The question inside the template."""
        return self._template.replace("{question}", sample.question)

    def load_image(self, sample: Sample) -> Image.Image:
        """The sample's image, RGB and upright; decoded once while the cache has room."""
        return sample.image if isinstance(sample.image, Image.Image) else self._images.load(sample.image)

    def load_video(self, sample: Sample) -> NDArray[np.uint8]:
        """One frame: the image."""
        return np.asarray(self.load_image(sample))[None]

    def evidence_mask(self, sample: Sample) -> NDArray[np.bool_] | None:
        """Union of the masks of the sample's evidence, bool `[H, W]`; None without annotation."""
        if self._objects is None or not isinstance(sample.image, Path):
            return None
        return self._objects.mask(sample.evidence, str(sample.image.relative_to(self._folder)))

    def score(self, sample: Sample, prediction: str) -> float:
        """How right a prediction is, in [0, 1], by the rule of the sample's kind."""
        if sample.box is not None:
            return point_in_box(prediction, sample.box)
        return (list_f1 if sample.kind == "list" else exact_match)(prediction, sample.answer)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Nothing beside the accuracy by kind."""
        return {}

    def _read(self) -> list[Sample]:
        file = self._folder / SAMPLES_FILE
        if not file.is_file():
            raise VPruneError(f"benchmark folder {self._folder} has no {SAMPLES_FILE}")
        samples: list[Sample] = []
        line_of: dict[str, int] = {}
        checked: set[Path] = set()
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            sample = self._sample(line, where)
            if sample.id in line_of:
                raise VPruneError(f"{where}: id {sample.id!r} was given in line {line_of[sample.id]} already")
            line_of[sample.id] = number
            self._check(sample, checked, where)
            samples.append(sample)
        if not samples:
            raise VPruneError(f"{file} holds no samples")
        return samples

    def _sample(self, line: bytes, where: str) -> Sample:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise VPruneError(f"{where}: broken JSON ({error})") from error
        if not isinstance(row, dict):
            raise VPruneError(f"{where}: expected a JSON object, got {type(row).__name__}")
        return Sample(
            id=_text(row, "id", where),
            image=self._folder / _text(row, "image", where),
            kind=_text(row, "kind", where),
            question=_text(row, "question", where),
            answer=_text(row, "answer", where),
            evidence=tuple(int(i) for i in _numbers(row, "evidence", where)),
            box=_box(row, where),
        )

    def _check(self, sample: Sample, checked: set[Path], where: str) -> None:
        if self._kinds is not None and sample.kind not in self._kinds:
            raise VPruneError(f"{where}: unknown kind {sample.kind!r}; there are {', '.join(self._kinds)}")
        if sample.kind == "refer" and sample.box is None:
            raise VPruneError(f"{where}: kind 'refer' needs a box, [x0, y0, x1, y1] in pixels")
        path = sample.image
        assert isinstance(path, Path)
        if path not in checked:
            if ".." in path.parts or not path.is_relative_to(self._folder):
                raise VPruneError(f"{where}: image {path} lies outside the benchmark folder {self._folder}")
            try:
                check_image(path)
            except VPruneError as error:
                raise VPruneError(f"{where}: {error}") from error
            checked.add(path)
        if sample.evidence:
            unknown = set(sample.evidence) - (self._objects.ids if self._objects else set())
            if unknown:
                raise VPruneError(
                    f"{where}: evidence {sorted(unknown)} is not annotated in {self._folder / OBJECTS_FILE}"
                )


def check_template(template: str) -> None:
    """Raise VPruneError for a template that has no place for the question."""
    if "{question}" not in template:
        raise VPruneError(f"benchmark.template={template!r} never names {{question}}, so nothing would be asked")


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and key in ("id", "answer"):
        value = str(value)
    if value is None:
        raise VPruneError(f"{where}: {key!r} is missing")
    if not isinstance(value, str):
        raise VPruneError(f"{where}: {key!r} should be text, got {value!r}")
    if not value.strip():
        raise VPruneError(f"{where}: {key!r} is empty")
    return value


def _numbers(row: dict[str, Any], key: str, where: str) -> list[float]:
    value = row.get(key) or []
    if not isinstance(value, list) or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        raise VPruneError(f"{where}: {key!r} should be a list of numbers, got {value!r}")
    return value


def _box(row: dict[str, Any], where: str) -> tuple[float, float, float, float] | None:
    values = _numbers(row, "box", where)
    if not values:
        return None
    if len(values) != 4 or values[0] >= values[2] or values[1] >= values[3]:
        raise VPruneError(f"{where}: 'box' should be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {values}")
    x0, y0, x1, y1 = values
    return x0, y0, x1, y1
