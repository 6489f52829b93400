"""What every published benchmark does alike: find its questions and images, check each row, write the prompts."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vprune.errors import VPruneError
from vprune.eval.benchmarks import hub
from vprune.eval.benchmarks.folder import check_template
from vprune.eval.benchmarks.images import ImageCache, ImageSource, check_image
from vprune.eval.benchmarks.rows import Row, shown
from vprune.eval.benchmarks.sample import Sample


@dataclass(kw_only=True, eq=False)
class Published(ABC):
    """A published benchmark, from the hub or from a local copy in its published layout.

    `path` (a folder, or the question file itself) comes before `repo` with its `config`, `split` and `revision`;
    `images` is the folder of the images where they are not beside the questions. `template` wraps the question.
    `check_images=False` leaves the image files unopened until they are asked for.

    Raises VPruneError, with the file or repository, the row and the field, for whatever is missing or malformed.
    """

    name: str
    template: str = "{question}"
    path: str | Path | None = None
    repo: str | None = None
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    images: str | Path | None = None
    check_images: bool = True

    image_folders: ClassVar[tuple[str, ...]] = ("images",)
    media_option: ClassVar[str] = "images"
    has_video: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_template(self.template)
        if self.path is None and self.repo is None:
            raise VPruneError(
                f"benchmark={self.name} has no home on the hub that vprune knows: name a local copy with "
                "benchmark.path=FOLDER, or a data set with benchmark.repo=OWNER/NAME"
            )
        self._cache = ImageCache()
        self._samples = self._gather()

    @property
    def samples(self) -> Sequence[Sample]:
        """Every sample, in the published order."""
        return self._samples

    @property
    def has_evidence(self) -> bool:
        """Whether masks tell what the answers rest on: not in most benchmarks."""
        return False

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the questions with their answers, and of the image files' names and sizes."""
        digest = hashlib.sha256()
        for one in self._samples:
            told = [one.id, one.kind, one.question, one.answer, one.answers, one.options, one.box]
            digest.update(json.dumps(told).encode())
        for path in sorted({one.image for one in self._samples if isinstance(one.image, Path)}):
            digest.update(f"{path.name} {path.stat().st_size if path.is_file() else 0}\n".encode())
        return digest.hexdigest()[:16]

    def prompt(self, sample: Sample) -> str:
        """The question inside the template."""
        return self.template.replace("{question}", sample.question)

    def load_image(self, sample: Sample) -> Image.Image:
        """The sample's image, RGB and upright; decoded once while the cache has room."""
        return sample.image if isinstance(sample.image, Image.Image) else self._cache.load(sample.image)

    def load_video(self, sample: Sample) -> NDArray[np.uint8]:
        """One frame: the image."""
        return np.asarray(self.load_image(sample))[None]

    def evidence_mask(self, sample: Sample) -> NDArray[np.bool_] | None:
        """None: nothing is annotated."""
        return None

    @abstractmethod
    def score(self, sample: Sample, prediction: str) -> float:
        """How right a prediction is, in [0, 1], by the benchmark's own rule."""

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The benchmark's own figures; none where the accuracy says all."""
        return {}

    @abstractmethod
    def _local(self, path: Path) -> Iterable[Row]:
        """The rows of a local copy that is not in parquet files."""

    @abstractmethod
    def _sample(self, row: Row) -> Sample | None:
        """The question in a row; None for one that is not asked."""

    def _rows(self) -> Iterable[Row]:
        if self.path is None:
            assert self.repo is not None
            return hub.load_split(self.repo, self.config, self.split, self.revision)
        found = hub.parquet_files(self._root(), self.config, self.split)
        return hub.load_parquet(found) if found else self._local(self._root())

    def _root(self) -> Path:
        assert self.path is not None
        root = Path(self.path).expanduser().resolve()
        if not root.exists():
            raise VPruneError(f"benchmark.path={self.path} does not exist")
        return root

    def _gather(self) -> list[Sample]:
        samples: list[Sample] = []
        row_of: dict[str, Row] = {}
        checked: set[Path] = set()
        for row in self._rows():
            sample = self._sample(row)
            if sample is None:
                continue
            if sample.id in row_of:
                raise VPruneError(f"{row}: id {sample.id!r} was given in row {row_of[sample.id].number} already")
            row_of[sample.id] = row
            if self.check_images and isinstance(sample.image, Path) and sample.image not in checked:
                self._check(sample.image, row)
                checked.add(sample.image)
            samples.append(sample)
        if not samples:
            where = f"benchmark.path={self.path}" if self.path is not None else f"benchmark.repo={self.repo}"
            raise VPruneError(f"{where} holds no question of benchmark={self.name}, split {self.split}")
        return samples

    def _check(self, image: Path, row: Row) -> None:
        try:
            check_image(image)
        except VPruneError as error:
            raise VPruneError(f"{row}: {error}; name the folder with benchmark.{self.media_option}=FOLDER") from error

    def _image(self, row: Row, field: str = "image", name: str | None = None) -> Path | ImageSource:
        """The image in `field`: what a data set holds there, or the file of that name (or of `name`) beside it."""
        value = row.values.get(field)
        if isinstance(value, hub.StoredImage):
            return value
        return self._file(row, field, row.text(field) if name is None else name)

    def _file(self, row: Row, field: str, name: str) -> Path:
        """The file called `name` in the first folder that has it; refuses what leaves these folders."""
        if "://" in name:
            raise row.error(
                field,
                f"is the URL {shown(name)}, and nothing is fetched: download the files, and name their folder with "
                f"benchmark.{self.media_option}=FOLDER",
            )
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise row.error(field, f"should name a file below the folder of the images, got {shown(name)}")
        places = [folder / name for folder in self._folders]
        return next((place for place in places if place.is_file()), places[0])

    @cached_property
    def _folders(self) -> list[Path]:
        if self.images is not None:
            folder = Path(self.images).expanduser().resolve()
            if not folder.is_dir():
                raise VPruneError(f"benchmark.{self.media_option}={self.images} is not a folder")
            return [folder]
        if self.path is None:
            raise VPruneError(
                f"benchmark.repo={self.repo} names its images without holding them: name their folder with "
                f"benchmark.{self.media_option}=FOLDER"
            )
        root = self._root()
        root = root.parent if root.is_file() else root
        return [root / folder for folder in self.image_folders] + [root]

    def _published(self, path: Path, *patterns: str) -> Path:
        """`path` if it is a file, else the one file below it that matches the first pattern to match any."""
        if path.is_file():
            return path
        for pattern in patterns:
            found = sorted(path.glob(pattern))
            if len(found) > 1:
                names = ", ".join(file.name for file in found)
                raise VPruneError(
                    f"benchmark.path={self.path} holds {names}: name one of them with benchmark.path=FILE"
                )
            if found:
                return found[0]
        raise VPruneError(
            f"benchmark.path={self.path} holds none of {', '.join(patterns)}, nor parquet files of split "
            f"{self.split!r}: it should be a copy of {self.name} as published"
        )


def mean(values: Iterable[float]) -> float | None:
    """The mean, None of nothing."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
