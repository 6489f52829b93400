"""`vprune bench segment` on a CPU: its stages, what is given to models of random weights, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vprune import VPruneError
from vprune.bench.app import main
from vprune.bench.segment import read_options
from vprune.bench.unknowing import bump, random_sam
from vprune.segmentation.stages import SAM_STAGES, STAGES

TINY = ["segment", "size=tiny", "device=cpu", "dtype=float32", "words=3", "new=4", "repeats=2"]


def content(folder: Path) -> tuple[dict[tuple[bool, str], dict[str, Any]], dict[str, Any]]:
    """Rows by crops and stage, and what they were measured on."""
    written = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    with (folder / "bench.csv").open(encoding="utf-8") as file:
        assert [row["stage"] for row in csv.DictReader(file)] == [row["stage"] for row in written["rows"]]
    return {(row["crops"], row["stage"]): row for row in written["rows"]}, written["environment"]


@pytest.mark.parametrize("model", ["onevision-7b", "qwen2vl-7b"])
def test_every_stage_of_random_weights(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, f"model={model}", "automatic=2", f"out={tmp_path}"]) == 0
    rows, surroundings = content(tmp_path)
    assert set(rows) == {(crops, stage) for crops in (False, True) for stage in (*STAGES, "labels", "sam", "total")} | {
        (False, "automatic")
    }
    for (crops, stage), row in rows.items():
        assert (row["views"], row["prompts"]) == ((5, 15) if crops else (1, 3))
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["repeats"] == (1 if stage == "automatic" else 2)
    for crops in (False, True):
        assert rows[crops, "sam"]["p80"] >= max(rows[crops, stage]["p50"] for stage in SAM_STAGES)
    assert surroundings["tokens_a_view"] == 64 and surroundings["options"]["size"] == "tiny"
    assert min(surroundings["parameters"].values()) > 0
    assert "5 views, 15 prompts" in capsys.readouterr().out


def test_the_embedded_models_look_at_a_scene(tmp_path: Path) -> None:
    words = ["images=1", "repeats=1", "crops=false", "device=cpu", f"out={tmp_path}"]
    assert main(["segment", *words]) == 0
    rows, _ = content(tmp_path)
    assert {stage for _, stage in rows} == {*STAGES, "labels", "sam", "total"}
    assert rows[False, "total"]["masks"] == 3 and rows[False, "total"]["prompts"] is None
    parts = sum(rows[False, stage]["p50"] for stage in (*STAGES, "labels"))
    assert parts == pytest.approx(rows[False, "total"]["p50"], rel=0.1)


def test_bumps_lie_apart() -> None:
    maps = [bump((27, 27), number, 8) for number in range(8)]
    assert len({int(one.argmax()) for one in maps}) == 8 and all(one.dtype == np.float32 for one in maps)


def test_a_random_sam_draws_what_it_is_asked_for() -> None:
    assert random_sam("vit_h", torch.device("cpu"), True).side == 64


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model=llava"], "choose one of embedded, onevision-7b"),
        (["crops=maybe"], "choose false, true, or both"),
        (["new=8"], "belongs to a model with random weights"),
        (["segmenter=vit_h"], "belongs to a model with random weights"),
        (["model=onevision-7b", "images=2"], "belongs to model=embedded"),
        (["model=onevision-7b", "words=9", "new=8"], "has no so many words"),
        (["maps=none"], "choose one of"),
        (["repeats=0"], "at least 1"),
        (["crop=true"], "did you mean crops"),
    ],
)
def test_mistakes_are_told(words: list[str], told: str) -> None:
    with pytest.raises(VPruneError, match=told):
        read_options(words)


def test_a_clip_that_there_is_not_is_told_before_the_rest_is_made() -> None:
    with pytest.raises(VPruneError, match="clip=ViT-none"):
        main([*TINY, "model=onevision-7b", "clip=ViT-none"])
