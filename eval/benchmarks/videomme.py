"""Video-MME (Fu et al., 2024): multiple choice about short, medium and long videos."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vprune.errors import VPruneError
from vprune.eval.benchmarks.images import FORMATS, load_image
from vprune.eval.benchmarks.letters import ALPHABET, chosen, lettered
from vprune.eval.benchmarks.published import Published, mean
from vprune.eval.benchmarks.rows import Row, read_rows
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.benchmarks.yes_no import grouped

DURATIONS = ("short", "medium", "long")
_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm")


@dataclass(kw_only=True, eq=False)
class VideoMme(Published):
    """Video-MME; the duration is a sample's kind, and `frames` are taken from a video at even distances.

    `videos` is the folder of `VIDEOID.mp4` (`data/` in the published archives), or of a folder of frame images each.
    Subtitles are not read.
    """

    name: str = "videomme"
    videos: str | Path | None = None
    frames: int = 32

    image_folders: ClassVar[tuple[str, ...]] = ("data", "videos", "video")
    media_option: ClassVar[str] = "videos"
    has_video: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.frames, int) or self.frames < 2:
            raise VPruneError(f"benchmark.frames={self.frames}: expected an integer >= 2")
        self.images = self.videos
        super().__post_init__()

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 if the prediction chooses the right letter."""
        return float(chosen(prediction, sample.options) == sample.answer)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Accuracy by duration, in the published order."""
        by_duration = {kind: mean(row["correct"] for row in members) for kind, members in grouped(rows).items()}
        return {"accuracy_by_duration": {kind: by_duration[kind] for kind in DURATIONS if kind in by_duration}}

    def load_video(self, sample: Sample) -> NDArray[np.uint8]:
        """`frames` frames of the video at even distances; all of them where it has fewer."""
        assert isinstance(sample.image, Path)
        return _frames(sample.image, self.frames)

    def load_image(self, sample: Sample) -> Image.Image:
        """The video's middle frame."""
        frames = self.load_video(sample)
        return Image.fromarray(frames[len(frames) // 2])

    def _check(self, image: Path, row: Row) -> None:
        if not image.is_file() and not image.is_dir():
            raise row.error("videoID", f"needs {image}, which does not exist; name the folder with benchmark.videos=")

    def _local(self, path: Path) -> Iterable[Row]:
        return read_rows(self._published(path, "[vV]ideo*[mM][mM][eE]*.json*", f"{self.split}.json*"))

    def _sample(self, row: Row) -> Sample:
        name = row.text("videoID")
        folders = [self._file(row, "videoID", name + suffix) for suffix in _SUFFIXES]
        folders += [folder / name for folder in self._folders if (folder / name).is_dir()]
        video = next((place for place in folders if place.exists()), folders[0])
        options = tuple(re.sub(r"^\s*[A-Z][.)]\s*", "", option) for option in row.texts("options"))
        return Sample(
            id=row.text("question_id"),
            image=video,
            kind=row.one_of("duration", DURATIONS),
            question=f"{row.text('question')}\n{lettered(options)}",
            answer=row.one_of("answer", ALPHABET[: len(options)]),
            options=options,
        )


def _frames(video: Path, count: int) -> NDArray[np.uint8]:
    if video.is_dir():
        suffixes = {f".{name.lower()}" for name in FORMATS} | {".jpg"}
        files = sorted(file for file in video.iterdir() if file.suffix.lower() in suffixes)
        if not files:
            raise VPruneError(f"{video} holds no frames")
        chosen_files = [files[place] for place in _places(len(files), count)]
        return np.stack([np.asarray(load_image(file)) for file in chosen_files])
    from transformers import video_utils

    decode: Any = video_utils.load_video  # its annotations leave out the paths it takes

    try:
        frames, _ = decode(
            str(video), sample_indices_fn=lambda metadata, **_: _places(metadata.total_num_frames, count)
        )
    except ImportError as error:
        raise VPruneError("videos are decoded by PyAV: pip install 'vprune[benchmarks]'") from error
    except (OSError, ValueError, IndexError, RuntimeError) as error:
        raise VPruneError(f"video {video} cannot be decoded ({error}); replace the file") from error
    return np.asarray(frames, dtype=np.uint8)


def _places(total: int, count: int) -> NDArray[np.int64]:
    """`count` places among `total`, first and last included, at even distances."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
