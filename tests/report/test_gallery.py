"""The gallery on true runs of the tiny model: pictures are computed again and agree with what was recorded."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.report.runs import write_sweep
from tests.report.test_page import Page
from vprune.eval.report import report
from vprune.eval.reporting.gallery import _answer, data_uri, gallery
from vprune.eval.reporting.gather import gather


def test_cards_show_what_the_runs_recorded(evaluated: Path) -> None:
    (section,) = gather(evaluated).sections
    shown = gallery(section, 4)
    assert shown.left_out == ""
    assert 1 <= len(shown.cards) <= 4
    for card in shown.cards:
        assert card.has_map
        assert card.changed == ""
        assert re.fullmatch(r"(9|4) of 36 tokens", card.tokens)
        assert card.picture.startswith("data:image/webp;base64,")
        assert "visual tokens" in card.described


@pytest.mark.parametrize(
    ("score", "right", "verdict"),
    [(1.0, True, "right"), (6 / 7, True, "86% right"), (0.4, False, "40% right"), (0.0, False, "wrong")],
)
def test_a_list_that_is_right_in_part_says_so(tmp_path: Path, score: float, right: bool, verdict: str) -> None:
    (section,) = gather(write_sweep(tmp_path)).sections
    entry = section.entries[0]
    name = next(iter(entry.answers))
    entry.answers[name]["correct"] = score
    answer = _answer(entry, name, "full model")
    assert (answer.right, answer.verdict) == (right, verdict)


def test_the_page_holds_the_pictures(evaluated: Path) -> None:
    page = Page(report(evaluated, gallery=2).read_text(encoding="utf-8"))
    images = page.all("img")
    assert len(images) == 4
    assert all(image["alt"] and image["src"].startswith("data:image/webp") for image in images)


def test_a_benchmark_that_has_changed_is_a_reason(evaluated: Path, tmp_path: Path) -> None:
    (section,) = gather(write_sweep(tmp_path, samples=100)).sections
    for entry in section.entries:
        entry.run.config["benchmark"] = gather(evaluated).sections[0].entries[0].run.config["benchmark"]
    assert "no longer holds sample" in gallery(section, 3).left_out


def test_a_model_that_is_gone_is_a_reason(evaluated: Path) -> None:
    (section,) = gather(evaluated).sections
    for entry in section.entries:
        entry.run.config["model"] = {**entry.run.config["model"], "path": "gone/away"}
    assert "model=gone/away is not in the cache" in gallery(section, 1).left_out


def test_without_a_full_run_there_is_a_reason(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path)
    for file in (folder / "full").iterdir():
        file.unlink()
    (section,) = gather(folder).sections
    assert gallery(section, 3).left_out == "There is no run of the full model on these samples to compare with."


@pytest.mark.parametrize("size", [(1000, 300), (20, 30)])
def test_pictures_are_scaled_down_only(size: tuple[int, int]) -> None:
    encoded = data_uri(Image.new("RGBA", size, "red"), max_side=100).partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert image.size == ((100, 30) if size[0] > 100 else size)
