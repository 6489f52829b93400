"""`vprune eval` on published benchmarks, with tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import made
from tests.exactness.families import build
from tests.exactness.processors import build_processor
from vprune.cli import main


def metrics_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return content


def test_pope_from_a_folder(model_folder: Path, tmp_path: Path) -> None:
    made.pope(tmp_path / "pope")
    given = [f"model={model_folder}", "benchmark=pope", f"benchmark.path={tmp_path / 'pope'}", "max_new_tokens=2"]
    for method in ("full", "random"):
        assert main(["eval", *given, f"method={method}", "keep=0.25", f"out={tmp_path / 'runs' / method}"]) == 0
    metrics = metrics_of(tmp_path / "runs/random")
    assert (metrics["samples"], metrics["benchmark"], metrics["tokens_after"]) == (6, "pope", 9)
    assert set(metrics["accuracy_by_kind"]) == {"random", "popular", "adversarial"}
    full = metrics_of(tmp_path / "runs/full")
    assert {"precision", "recall", "f1", "yes_ratio", "by_subset", "score", "score_name"} <= set(full)
    assert metrics["retention"] == (pytest.approx(metrics["score"] / full["score"]) if full["score"] else None)
    assert main(["report", str(tmp_path / "runs"), "gallery=0"]) == 0


def test_a_mistake_in_a_copy_ends_the_command(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made.pope_rows()
    del rows[1]["label"]
    made.pope(tmp_path / "pope", rows)
    assert main(["eval", f"model={model_folder}", "benchmark=pope", f"benchmark.path={tmp_path / 'pope'}"]) == 2
    assert "row 2: field 'answer' is missing" in capsys.readouterr().err


def test_a_repository_that_is_not_to_be_had(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets", reason="needs vprune[benchmarks]")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert main(["eval", f"model={model_folder}", "benchmark=gqa", "benchmark.repo=nobody/gqa"]) == 2
    told = capsys.readouterr().err
    assert "benchmark.repo=nobody/gqa, config testdev_balanced_instructions, split testdev cannot be loaded" in told
    assert "benchmark.path=FOLDER" in told


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_videomme_shows_the_model_a_video(family: str, tmp_path: Path) -> None:
    build(family, torch.float32).save_pretrained(tmp_path / "model")
    build_processor(family).save_pretrained(tmp_path / "model")
    made.videomme(tmp_path / "videomme")
    given = [f"model={tmp_path / 'model'}", "benchmark=videomme", f"benchmark.path={tmp_path / 'videomme'}"]
    given += ["benchmark.frames=4", "max_new_tokens=2", "limit=2"]
    for method in ("full", "random"):
        assert main(["eval", *given, f"method={method}", "keep=0.5", f"out={tmp_path / 'runs' / method}"]) == 0
    full, pruned = (metrics_of(tmp_path / "runs" / method) for method in ("full", "random"))
    assert full["failed"] == pruned["failed"] == 0
    assert set(pruned["accuracy_by_duration"]) == {"short", "long"}
    assert 0 < pruned["tokens_after"] < pruned["tokens_before"]
    # What LLaVA-OneVision puts behind a video, a line break, stands in the prompt and is no token to prune.
    assert full["tokens_before"] - pruned["tokens_before"] == (family == "llava_onevision")
