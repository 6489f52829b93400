"""From maps to points and masks, and what becomes of the masks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tests.segmentation.made import TrueMasks
from vprune import VPruneError
from vprune.segmentation.masks import Masks
from vprune.segmentation.prompting import Candidate, Prompting, draw, enlarged, marks_of, mass_inside, otsu
from vprune.segmentation.words import TokenText, names_in, plain


def blob(y: int, x: int, size: int = 3, strength: float = 1.0) -> np.ndarray:
    heat = np.full((24, 24), 0.01, np.float32)
    heat[y : y + size, x : x + size] = strength
    return heat


def disc(y: float, x: float, radius: float, side: int = 96) -> np.ndarray:
    ys, xs = np.mgrid[:side, :side]
    return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2


def test_points_lie_on_the_largest_part_and_beside_it() -> None:
    heat = blob(4, 15, 4) + blob(18, 2, 1)
    marks = marks_of(enlarged(heat, 0.5), Prompting(positive=2, negative=2))
    assert marks.signs.tolist() == [1, 1, 0, 0]
    x, y = marks.points[0] * 24
    assert 15 <= x <= 19 and 4 <= y <= 8
    for x, y in marks.points[2:] * 24:
        assert not (14 <= x <= 20 and 3 <= y <= 9)
    assert marks.box[0] * 24 == pytest.approx(14.5, abs=0.6) and marks.box[3] * 24 == pytest.approx(8.5, abs=0.6)


def test_otsu_parts_two_heaps() -> None:
    values = np.concatenate([np.full(500, 0.2), np.full(50, 0.8)]).astype(np.float32)
    assert 0.2 <= otsu(values) < 0.8
    assert marks_of(
        enlarged(blob(4, 15, 4), 0.0), Prompting(threshold="otsu", positive=1, negative=1)
    ).signs.tolist() == [1, 0]


def test_an_image_is_encoded_once_and_prompts_go_together() -> None:
    masks = np.stack([disc(24, 70, 12), disc(70, 20, 15)])
    segmenter = TrueMasks(masks)
    encoded = segmenter.encode([Image.new("RGB", (96, 96))])
    candidates = [Candidate(0, "one", blob(5, 16)), Candidate(0, "two", blob(16, 4)), Candidate(0, "none", blob(0, 0))]
    candidates.append(Candidate(0, "flat", np.ones((24, 24), np.float32)))
    drawn = draw(segmenter, encoded, candidates, Prompting(rounds=3))
    assert segmenter.encoded == 1 and segmenter.calls == [3, 3, 3]
    assert [one.candidate.name for one in drawn] == ["one", "two"]
    assert all((one.mask == mask).all() for one, mask in zip(drawn, masks, strict=True))
    assert all(0.5 < one.score <= 0.9 for one in drawn)
    assert draw(segmenter, encoded, candidates[3:], Prompting()) == []


def test_a_name_said_twice_finds_two_places() -> None:
    masks = np.stack([disc(24, 70, 12), disc(70, 20, 15)])
    segmenter = TrueMasks(masks)
    both = blob(5, 16) + 0.8 * blob(16, 4)
    encoded = segmenter.encode([Image.new("RGB", (96, 96))])
    drawn = draw(segmenter, encoded, [Candidate(0, "twin", both), Candidate(0, "twin", both)], Prompting(positive=1))
    assert all((one.mask == mask).all() for one, mask in zip(drawn, masks, strict=True))


def test_attention_mass_inside_a_mask() -> None:
    fine = enlarged(blob(5, 16), 0.0)
    assert mass_inside(fine, disc(26, 70, 12)) > 0.95
    assert mass_inside(fine, disc(70, 20, 12)) < 0.05


def test_doubles_go_and_the_best_stay() -> None:
    one, other = disc(30, 30, 15), disc(30, 32, 15)
    masks = Masks.of(np.stack([one, other, disc(70, 70, 10)]), ["a", "b", "c"], [0.5, 0.9, 0.2])
    kept = masks.without_doubles(0.7)
    assert kept.names == ("b", "c") and kept.scores.tolist() == pytest.approx([0.9, 0.2])
    assert len(masks.without_doubles(1.0)) == 3


def test_masks_go_to_coco_and_back(tmp_path: Path) -> None:
    array = np.stack([disc(30, 30, 15), disc(70, 70, 10)])
    masks = Masks.of(array, ["a", "b"], [0.5, 0.9])
    content = {
        "images": [{"id": 7, "width": 96, "height": 96, "file_name": "x.png"}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": masks.to_coco(7, {"a": 1, "b": 2}, first=5),
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    coco = COCO(tmp_path / "x.json")
    for row, one in enumerate(coco.loadAnns(coco.getAnnIds(imgIds=7))):
        assert (coco.annToMask(one).astype(bool) == array[row]).all()
        assert one["id"] == 5 + row and one["category_id"] == 1 + row
        assert coco_mask.toBbox(masks.rles[row]).tolist() == one["bbox"]
    assert (masks.array == array).all()


@pytest.mark.parametrize("count", [0, 2, 300])
def test_index_images_hold_every_mask(count: int, tmp_path: Path) -> None:
    array = np.zeros((count, 20, 30), dtype=bool)
    for row in range(count):
        array[row].flat[2 * row % 600] = True
    masks = Masks.of(array, ["x"] * count, np.linspace(1, 0.1, count)) if count else Masks.none((20, 30))
    index = np.asarray(Image.open(masks.save_png(tmp_path / "index.png")))
    assert index.shape == (20, 30)
    assert set(np.unique(index).tolist()) == set(range(count + 1))
    assert masks.overlay(Image.new("RGB", (30, 20))).width >= 448


class Detections:
    """Takes what `supervision.Detections` takes."""

    def __init__(self, xyxy: Any, mask: Any, confidence: Any, class_id: Any, data: Any) -> None:
        self.xyxy, self.mask, self.confidence, self.class_id, self.data = xyxy, mask, confidence, class_id, data


def test_masks_go_to_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)  # not installed
    with pytest.raises(VPruneError, match="pip install supervision"):
        Masks.none((20, 30)).to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=Detections))
    array = np.stack([disc(30, 30, 15), disc(70, 70, 10), disc(20, 70, 8)])
    masks = Masks.of(array, ["dog", "cat", "dog"], [0.5, 0.9, 0.4])
    found = masks.to_supervision()
    assert (found.mask == array).all() and found.mask.dtype == bool
    assert found.xyxy.tolist() == masks.boxes.tolist() and found.xyxy.shape == (3, 4)
    assert found.confidence.tolist() == pytest.approx([0.5, 0.9, 0.4])
    assert found.class_id.tolist() == [0, 1, 0] and found.data["class_name"].tolist() == ["dog", "cat", "dog"]
    empty = Masks.none((20, 30)).to_supervision()
    assert empty.xyxy.shape == (0, 4) and empty.mask.shape == (0, 20, 30)
    assert empty.class_id.dtype.kind == "i" and empty.data["class_name"].dtype.kind == "U"


def test_masks_go_to_the_true_supervision() -> None:
    pytest.importorskip("supervision")
    found = Masks.of(disc(30, 30, 15)[None], ["dog"], [0.5]).to_supervision()
    assert len(found) == 1 and len(Masks.none((20, 30)).to_supervision()) == 0


def test_masks_of_a_smaller_picture_are_enlarged() -> None:
    masks = Masks.of(np.stack([disc(30, 30, 15), disc(70, 70, 10)]), ["a", "b"], [0.5, 0.9])
    large = masks.resized((192, 288))
    assert large.size == (192, 288) and large.array.shape == (2, 192, 288) and large.names == masks.names
    assert large.boxes[0] == pytest.approx(masks.boxes[0] * [3, 2, 3, 2], abs=2)
    assert large.array[0].mean() == pytest.approx(masks.array[0].mean(), abs=0.01)
    assert masks.resized(masks.size) is masks and Masks.none((2, 3)).resized((4, 6)).array.shape == (0, 4, 6)


def test_an_overlay_of_another_image_is_refused() -> None:
    with pytest.raises(VPruneError, match="on an image of"):
        Masks.none((20, 30)).overlay(Image.new("RGB", (20, 20)))


def test_listings_are_read() -> None:
    assert names_in("black cross, purple cross, purple cross") == ["black cross", "purple cross", "purple cross"]
    assert names_in("The image shows:\n- a dog\n- two chairs and the table.") == [
        "image shows",
        "dog",
        "two chairs",
        "table",
    ]
    assert names_in("1) Car 2") == ["Car 2"]
    assert names_in("  ,.\n") == [] == names_in("none")
    assert plain("the small red circle.") == "small red circle"


def test_words_are_found_by_their_letters() -> None:
    class Bytes:
        """Three bytes a token: letters of several bytes are split."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    ids = list("point to the Łódź tram of Łódź.".encode())
    text = TokenText.of(Bytes(), ids, 0)
    places, after = text.find("Łódź")  # type: ignore[misc]
    assert bytes(ids[places[0] - 1 : places[-1] + 1]).decode() == "Łódź"  # its first letter shows with its last byte
    again = text.find("łódź", after)
    assert again is not None and again[0][0] > places[-1]
    assert text.find("bus") is None
    phrase = "tram of Łódź"
    found = text.find(phrase)
    assert found is not None
    said = [ids[place] for place in text.content(phrase, found[0])]
    assert ord("o") not in said[:4] and len(said) < len(found[0])
