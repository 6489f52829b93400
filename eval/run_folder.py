"""The folder of one run: written a batch at a time, so that a killed run goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from vprune.errors import VPruneError
from vprune.eval.benchmarks.sample import Sample
from vprune.eval.results import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    Run,
    differences,
    load_run,
    read_config,
)

_REMEDY = "choose another folder with out=DIR, or replace the run with overwrite=true"


class RunFolder:
    """Where one run's files go.

    Nothing is written before the first batch has been answered, so a mistake that shows up only then (a keep larger
    than the image has tokens, say) leaves the folder as it was.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self._config = dict(config)
        self._overwrite = overwrite
        if path.exists() and not path.is_dir():
            raise VPruneError(f"out={path} is a file; name a folder")

    def check(self) -> None:
        """Raise VPruneError if another configuration's run lives here, naming what differs; `overwrite` allows it."""
        file = self.path / CONFIG_FILE
        if self._overwrite:
            return
        if not file.is_file():
            if _size(self.path / PREDICTIONS_FILE):
                raise VPruneError(f"{self.path} holds a {PREDICTIONS_FILE} without its {CONFIG_FILE}; {_REMEDY}")
            return
        found = differences(read_config(file), self._config)
        if found:
            shown = "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
            raise VPruneError(f"{self.path} holds a run of another configuration ({shown}): {_REMEDY}")

    def finished(self, batches: Sequence[Sequence[Sample]]) -> Run | None:
        """The run, if it is complete already."""
        if self._overwrite or not (self.path / METRICS_FILE).is_file():
            return None
        run = load_run(self.path)
        expected = [sample.id for batch in batches for sample in batch]
        return run if [row["id"] for row in run.predictions] == expected else None

    def batches_done(self, batches: Sequence[Sequence[Sample]]) -> tuple[int, list[dict[str, Any]], int]:
        """How many whole batches are on disk, their rows, and the bytes they take.

        Raises VPruneError if a complete line is not the sample that belongs there.
        """
        file = self.path / PREDICTIONS_FILE
        if self._overwrite or not file.is_file():
            return 0, [], 0
        lines = file.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # the kill came in the middle of a line
        rows: list[dict[str, Any]] = []
        done = size = 0
        for batch in batches:
            if len(rows) + len(batch) > len(lines):
                break
            chunk = lines[len(rows) : len(rows) + len(batch)]
            rows += [self._row(line, sample) for line, sample in zip(chunk, batch, strict=True)]
            size += sum(map(len, chunk))
            done += 1
        return done, rows, size

    def check_surroundings(self, environment: Mapping[str, Any]) -> None:
        """Raise VPruneError if what is on disk was answered on another kind of device or in another dtype than now."""
        before = self._environment_before()
        for key in ("device", "dtype"):
            there, here = (str(facts.get(key, "")).partition(":")[0] for facts in (before, environment))
            if there and there != here:
                raise VPruneError(
                    f"{self.path} was begun with {key}={there} and would go on with {here}: "
                    f"say {key}={there}, or start anew with overwrite=true"
                )

    def _environment_before(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / ENVIRONMENT_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    @contextmanager
    def writing(self, size: int, environment: Mapping[str, Any]) -> Iterator[_Writer]:
        """A writer that keeps the first `size` bytes of the predictions and appends whole batches."""
        earlier = self._environment_before().get("sessions", []) if size else []
        writer = _Writer(self.path, self._config, {**environment, "sessions": earlier}, size)
        try:
            yield writer
        finally:
            writer.close()

    def finish(self, metrics: Mapping[str, Any]) -> Run:
        """Write `metrics.json`, which makes the run a finished one, and read it back."""
        _replace(self.path / METRICS_FILE, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
        return load_run(self.path)

    def _row(self, line: bytes, sample: Sample) -> dict[str, Any]:
        try:
            row = json.loads(line)
            same = (row["id"], row["question"], row["answer"]) == (sample.id, sample.question, sample.answer)
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            file = self.path / PREDICTIONS_FILE
            raise VPruneError(f"{file} does not go on with sample {sample.id!r}, so it is not this run's: {_REMEDY}")
        return dict(row)


class _Writer:
    """Appends batches durably; creates the run's files with the first one."""

    def __init__(self, folder: Path, config: dict[str, Any], environment: dict[str, Any], size: int) -> None:
        self._folder = folder
        self._config = config
        self._environment = environment
        self._size = size
        self._file: IO[bytes] | None = None
        self._session: dict[str, Any] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part, over every session that wrote to this run."""
        total: dict[str, float] = {}
        for session in self._environment["sessions"]:
            for part, value in session["seconds"].items():
                total[part] = round(total.get(part, 0.0) + value, 3)
        return total

    def append(self, rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> None:
        """Write one batch as a whole and wait until the disk has it; `seconds` by part go to `environment.json`."""
        if self._file is None:
            self._file = self._open(seconds.get("total", 0.0))
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._session["samples"] += len(rows)
        for part, value in seconds.items():
            self._session["seconds"][part] = round(self._session["seconds"].get(part, 0.0) + value, 4)
        _replace(self._folder / ENVIRONMENT_FILE, json.dumps(self._environment, indent=2, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def _open(self, passed: float) -> IO[bytes]:
        """The file of predictions; the session began `passed` seconds ago, with its first batch."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / PREDICTIONS_FILE).open("ab")
        except OSError as error:
            raise VPruneError(
                f"out={self._folder} cannot be written ({error}); choose another folder with out=DIR"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise VPruneError(
                f"another vprune eval is writing to {self._folder}; wait for it, or choose out=DIR"
            ) from error
        (self._folder / METRICS_FILE).unlink(missing_ok=True)
        file.truncate(self._size)
        _replace(self._folder / CONFIG_FILE, yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True))
        began = time.localtime(time.time() - passed)
        self._session = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z", began), "samples": 0, "seconds": {}}
        self._environment["sessions"] = [*self._environment["sessions"], self._session]
        return file


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
