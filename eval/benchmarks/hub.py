"""Rows of a data set on the hub, or of its parquet files on disk, read by the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vprune.errors import VPruneError
from vprune.eval.benchmarks.rows import Row

_MOVED = (
    "data sets have moved on the hub before: name where it is now with benchmark.repo=OWNER/NAME (and "
    "benchmark.config=, benchmark.split=, benchmark.revision=), or a local copy with benchmark.path=FOLDER"
)


@dataclass(frozen=True, eq=False)
class StoredImage:
    """The image in one cell of a data set, read when it is asked for."""

    dataset: Any
    index: int
    column: str
    source: str

    def __str__(self) -> str:
        return f"({self.source}, row {self.index + 1}, field {self.column!r})"

    def read(self) -> bytes:
        """The encoded bytes; VPruneError where the cell only names a file that is not here, or a URL."""
        cell = self.dataset[self.index][self.column]
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        path = str(cell.get("path") or "")
        if "://" in path:
            raise VPruneError(f"image {self} is the URL {path}, and nothing is fetched: it should be a file's bytes")
        if not Path(path).is_file():
            raise VPruneError(f"image {self} holds no bytes and names no file that is here ({path or 'no path'})")
        return Path(path).read_bytes()


def load_split(repo: str, config: str | None, split: str, revision: str | None) -> Iterator[Row]:
    """The rows of a split of a data set on the hub, images unread.

    Raises VPruneError, naming the options, if the library is not installed or the data set is not to be had.
    """
    datasets = _library()
    named = f"benchmark.repo={repo}" + (f", config {config}" if config else "") + f", split {split}"
    named += f", revision {revision}" if revision else ""
    try:
        dataset = datasets.load_dataset(repo, name=config, split=split, revision=revision)
    except Exception as error:  # moved, gated, no network: in the words of whichever library found out
        raise VPruneError(f"{named} cannot be loaded ({_first_line(error)}): {_MOVED}") from error
    return _rows(dataset, named)


def load_parquet(files: Sequence[Path]) -> Iterator[Row]:
    """The rows of parquet files, one after the other, images unread; VPruneError for files that are none."""
    datasets = _library()
    source = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} parquet files)"
    try:
        dataset = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # arrow's errors share no base with those of datasets
        raise VPruneError(f"{source} cannot be read ({_first_line(error)})") from error
    return _rows(dataset, source)


def parquet_files(path: Path, config: str | None, split: str) -> list[Path]:
    """The parquet files of a split, where a copy of a hub repository has them; [] if `path` holds none."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    for folder in ([path / config] if config else []) + [path / "data", path]:
        found = sorted([*folder.glob(f"{split}-*.parquet"), *folder.glob(f"{split}.parquet")])
        if found:
            return found
    return []


def _rows(dataset: Any, source: str) -> Iterator[Row]:
    from datasets import Image

    columns = [name for name, feature in dataset.features.items() if _is_image(feature)]
    for column in columns:
        if isinstance(dataset.features[column], Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    filled = {column: dataset.data.column(column).is_valid().to_pylist() for column in columns}
    for index, values in enumerate(dataset.remove_columns(columns)):
        images = {
            column: StoredImage(dataset, index, column, source) if filled[column][index] else None for column in columns
        }
        yield Row({**values, **images}, index + 1, source)


def _is_image(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _library() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise VPruneError(
            "benchmarks on the hub and in parquet files are read by the library datasets: pip install "
            "'vprune[benchmarks]', or name a local copy in JSON or TSV with benchmark.path=FOLDER"
        ) from error
    return datasets


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__
