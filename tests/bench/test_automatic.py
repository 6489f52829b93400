"""`vprune bench automatic` on two images with few points: what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vprune import VPruneError
from vprune.bench.app import main
from vprune.bench.automatic import read_options


def test_both_sides_are_measured_on_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["automatic", "limit=2", "points=4", "device=cpu", "commit=abc", f"out={tmp_path}"]) == 0
    content = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    prompted, automatic = content["rows"]
    assert (prompted["side"], automatic["side"]) == ("prompted", "automatic")
    assert prompted["images"] == automatic["images"] == 2
    assert prompted["ar100"] > automatic["ar100"] > 0  # sixteen points miss what is small
    assert 0 < prompted["sam_seconds"] < prompted["seconds"] and automatic["times"] == automatic["sam_times"] == 1
    assert prompted["times"] == pytest.approx(automatic["seconds"] / prompted["seconds"])
    assert prompted["sam_times"] == pytest.approx(automatic["seconds"] / prompted["sam_seconds"])
    surroundings = content["environment"]
    assert surroundings["git_commit"] == "abc" and surroundings["versions"]["segment-anything"]
    assert [len(surroundings["each"][side]) for side in ("prompted", "automatic")] == [2, 2]
    with (tmp_path / "bench.csv").open(encoding="utf-8") as file:
        assert [row["side"] for row in csv.DictReader(file)] == ["prompted", "automatic"]
    told = capsys.readouterr().out
    assert "AR@100" in told and "SAM alone" in told


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("points=0", "at least 1"),
        ("limit=few", "at least 1"),
        ("pred_iou=2", "from 0 to 1"),
        ("stability=high", "from 0 to 1"),
        ("segmenter=hf", "choose one of embedded, sam_vit_b"),
        ("point=3", "did you mean points"),
    ],
)
def test_mistakes_are_told(word: str, told: str) -> None:
    with pytest.raises(VPruneError, match=told):
        read_options([word])


def test_a_recipe_that_there_is_not_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(VPruneError, match="recipe"):
        main(["automatic", "recipe=best"])
