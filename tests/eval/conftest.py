from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import build_model, build_processor
from tests.eval.made import sample_rows, write_benchmark, write_samples
from vprune.cli import main

Eval = Callable[..., int]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small is slower on two threads, and much slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with 36 visual tokens, saved as a user would have it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def benchmark_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four samples; the model as it is answers every second one rightly."""
    above = tmp_path_factory.mktemp("benchmarks")
    folder = write_benchmark(above / "made", sample_rows(24))
    arguments = [f"model={model_folder}", f"benchmark={folder}", "method=full", f"out={above / 'first'}"]
    assert main(["eval", *arguments, "max_new_tokens=6"]) == 0
    answers = {row["id"]: row["prediction"] for row in read_predictions(above / "first")}
    rows = sample_rows(24)
    for i, row in enumerate(rows):
        if row["kind"] in ("exists", "colour") and i % 8 < 4:
            row["answer"] = answers[row["id"]]
    write_samples(folder, rows)
    return folder


@pytest.fixture
def evaluate(model_folder: Path, benchmark_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Eval:
    """`vprune eval` on the tiny model and the made benchmark, in an empty working directory; returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, model: Path | str = model_folder, benchmark: Path | str = benchmark_folder) -> int:
        given = [f"model={model}", f"benchmark={benchmark}", "max_new_tokens=6", "batch_size=4", *overrides]
        return main(["eval", *given])

    return run


def read_predictions(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
