"""`vprune segment` on images of every kind, and on what is none: a clear error, or a valid file."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.segmentation.made import scene
from vprune import VPruneError
from vprune.cli import main
from vprune.segmentation.segment import _opened


def content_of(out: Path) -> dict[str, Any]:
    """What the command wrote, once pycocotools has read it and every mask in it."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(out / "annotations.json")
    sizes = {one["id"]: (one["height"], one["width"]) for one in coco.dataset["images"]}
    for one in coco.dataset["annotations"]:
        assert coco.annToMask(one).shape == sizes[one["image_id"]] and 0 <= one["score"] <= 1
    return dict(coco.dataset)


def kinds(folder: Path) -> dict[str, tuple[int, int]]:
    """Images of every kind in a folder, with the (width, height) that they are seen at."""
    picture, rng = scene(3)[0], np.random.default_rng(0)
    folder.mkdir()
    picture.convert("L").save(folder / "grey.png")
    transparent = picture.convert("RGBA")
    transparent.putalpha(Image.fromarray(rng.integers(0, 255, (384, 384), np.uint8)))
    transparent.save(folder / "transparent.png")
    deep = np.asarray(picture.convert("L"), dtype=np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.crop((0, 0, 384, 200)).save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (20_000, 3), "red").save(folder / "wide.png")
    Image.new("RGB", (2, 20_000), "red").save(folder / "tall.png")
    whole = dict.fromkeys(("grey.png", "transparent.png", "deep.png"), (384, 384))
    return whole | {"turned.jpg": (200, 384), "dot.png": (1, 1), "wide.png": (20_000, 3), "tall.png": (2, 20_000)}


def test_images_of_every_kind_and_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    sizes = kinds(folder)
    whole = (folder / "grey.png").read_bytes()
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "short.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (20_001, 1)).save(folder / "wider.png")
    assert main(["segment", str(folder), f"out={out}", "device=cpu", "phrase=the red circle"]) == 1
    told = capsys.readouterr().err
    for name in ("text.jpg", "empty.png", "short.png", "wider.png"):
        assert f"failed: {name}: " in told
    assert "sides from 1 up to 20000" in told and "Traceback" not in told
    content = content_of(out)
    assert {one["file_name"]: (one["width"], one["height"]) for one in content["images"]} == sizes
    for name in sizes:
        with Image.open(out / "overlay" / Path(name).with_suffix(".png")) as drawn:
            assert drawn.width >= 1


def test_nothing_found_is_a_valid_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = tmp_path / "x.png", tmp_path / "out"
    scene(3)[0].save(image)
    words = [str(image), f"out={out}", "device=cpu", "least=1.0"]
    assert main(["segment", *words, "phrase=the red circle", "categories=[circle,square]"]) == 0
    assert "0 masks in 1 image," in capsys.readouterr().out
    content = content_of(out)
    assert content["annotations"] == [] and [one["name"] for one in content["categories"]] == ["circle", "square"]
    assert (out / "overlay" / "x.png").is_file()


def test_overwriting_with_a_mistake_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = tmp_path / "x.png", tmp_path / "out"
    scene(3)[0].save(image)
    assert main(["segment", str(image), f"out={out}", "device=cpu", "phrase=red circle"]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = [str(image), f"out={out}", "device=cpu", "phrase=red zebra"]
    assert main(["segment", *words, "overwrite=true"]) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main(["segment", *words]) == 2
    assert "another command" in capsys.readouterr().err


def test_a_folder_s_progress_is_told_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vprune.eval.console.SECONDS_BETWEEN_LINES", 0.0)
    for name in "abc":
        scene(3)[0].save(tmp_path / f"{name}.png")
    assert main(["segment", str(tmp_path), f"out={tmp_path / 'out'}", "device=cpu", "phrase=circle"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [f"segment: {done} of 3 images" for done in range(3)]
    assert told[3].startswith("3 masks in 3 images, written to")


def test_mistakes_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, image, nothing = tmp_path / "text.jpg", tmp_path / "x.png", tmp_path / "none"
    text.write_text("no image")
    scene(3)[0].save(image)
    nothing.mkdir()
    wide = tmp_path / "wider.png"
    Image.new("L", (20_001, 1)).save(wide)
    out = f"out={tmp_path / 'out'}"
    for words, told in (
        ([str(tmp_path / "nowhere.png")], "does not exist"),
        ([str(nothing)], "holds no images"),
        ([str(text)], "is not an image"),
        ([str(wide)], f"image {wide} is 20001 x 1 pixels; sides from 1 up to 20000 are taken"),
        (["phrase=circle"], "vprune segment needs IMAGE_OR_DIR"),
        ([str(image), "the", "red", "circle"], 'quotes around it: phrase="the red circle"'),
        ([str(image), "phrase=the", "red", "circle"], 'quotes around it: phrase="the red circle"'),
        ([str(image), str(text)], "several images go into a folder"),
        ([str(image), "phrase=日本"], "tokenizer does not know '日本' (it knows above, "),
        ([str(image), "phrase=the red zebra"], "tokenizer does not know 'zebra' (it knows above, "),
        ([str(nothing.parent), "phrase=zebra and yak"], "does not know 'zebra', 'and', 'yak'"),
        ([str(image), "phrase= the . "], "names nothing"),
        ([str(image), "method=fastv", "keep=0.5", "phrase=circle"], "before the first layer"),
        ([str(image), "method=random", "keep=0.5", "marked=4", "phrase=circle"], "leave marked at 0"),
        ([str(image), "segmenter=sam_vit_b", "segmenter.path=none.pth"], "needs a checkpoint"),
    ):
        assert main(["segment", *words, "device=cpu", out]) == 2
        line = capsys.readouterr().err.strip()
        assert told in line and "\n" not in line
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").touch()
    assert main(["segment", str(image), "device=cpu", out]) == 2
    assert f"out={tmp_path / 'out'} cannot be written ({tmp_path / 'out'} is a file)" in capsys.readouterr().err
    assert main(["segment"]) == 2 and "IMAGE_OR_DIR" in capsys.readouterr().err


def test_pictures_that_are_given_are_seen_as_their_files_are() -> None:
    scenery = scene(3)[0]
    deep = Image.fromarray(np.asarray(scenery.convert("L"), dtype=np.uint16) * 257)
    clear = scenery.convert("RGBA")
    clear.putalpha(0)
    assert np.array_equal(np.asarray(_opened(deep)), np.asarray(scenery.convert("L").convert("RGB")))
    assert np.asarray(_opened(clear)).min() == 255
    for wrong, told in (
        (np.zeros((4, 4, 3), np.uint8), r"of ndarray; give a path or a PIL image"),
        (None, "of NoneType"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels"),
        (Image.new("L", (20_001, 1)), "20001 x 1 pixels"),
    ):
        with pytest.raises(VPruneError, match=told):
            _opened(wrong)  # type: ignore[arg-type]
