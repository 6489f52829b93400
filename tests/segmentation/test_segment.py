"""`vprune.segment` and the command, with a segmenter that knows the true masks and with the embedded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vprune
from tests.segmentation.made import TrueMasks, scene
from vprune import VPruneError
from vprune.cli import main
from vprune.pruner import load_method
from vprune.segmentation import app
from vprune.segmentation.labels import Labeller
from vprune.segmentation.prompting import Prompting
from vprune.segmentation.segment import Recipe, Session
from vprune.segmentation.segmenters import load_segmenter

SCENE = 3


@pytest.fixture(scope="module")
def session() -> Session:
    return Session("embedded", TrueMasks(scene(SCENE)[1]), device="cpu")


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def test_everything_that_the_model_names_is_outlined(session: Session) -> None:
    picture, masks, names, _ = scene(SCENE)
    found = session(picture)
    assert sorted(found.names) == sorted(names)
    assert found.heat is not None and found.array.shape[1:] == (384, 384)
    for name, mask in zip(found.names, found.array, strict=True):
        assert max(iou(mask, true) for true, called in zip(masks, names, strict=True) if called == name) > 0.9
    assert (np.diff(found.scores) <= 0).all() and (found.scores > 0).all() and (found.scores <= 1).all()


def test_a_phrase_gives_one_mask(session: Session) -> None:
    picture, masks, names, _ = scene(SCENE)
    unique = next(name for name in names if names.count(name) == 1)
    found = session(picture, f"the {unique}")
    assert found.names == (unique,)
    assert iou(found.array[0], masks[names.index(unique)]) > 0.9


def test_a_pruned_model_still_finds_things(session: Session) -> None:
    picture, _, names, _ = scene(SCENE)
    pruned = Session((session.model, session.processor), session.segmenter, method=load_method("attention", keep=0.5))
    unique = next(name for name in names if names.count(name) == 1)
    found = pruned(picture, unique)
    assert len(found) <= 1 and found.size == (384, 384)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (700, 40), (33, 900)])
def test_sizes_of_every_kind(session: Session, size: tuple[int, int]) -> None:
    found = Session((session.model, session.processor), load_segmenter("embedded"))(
        Image.new("RGB", size, (90, 90, 90))
    )
    assert found.size == size[::-1] and found.array.shape == (len(found), *size[::-1])


def test_crops_are_encoded_once_each(session: Session) -> None:
    picture, masks, _, _ = scene(SCENE)
    segmenter = TrueMasks(masks)
    recipe = Recipe(crops=True, prompting=Prompting(rounds=2))
    views = Session((session.model, session.processor), segmenter, recipe)._views(picture, None)
    assert len(views) == 5 and views[0] == (0, 0, 384, 384) and views[-1][2:] == (384, 384)


def test_mistakes(session: Session, tmp_path: Path) -> None:
    picture = scene(SCENE)[0]
    with pytest.raises(VPruneError, match="names nothing"):
        session(picture, " the . ")
    with pytest.raises(VPruneError, match="cannot be found"):
        session(picture, "日本")
    with pytest.raises(VPruneError, match="unknown"):
        load_segmenter("sam_vit_x")
    with pytest.raises(VPruneError, match="checkpoint"):
        load_segmenter("sam_vit_b", tmp_path / "none.pth")
    with pytest.raises(VPruneError, match="up to 20000"):
        session(Image.new("RGB", (20_001, 2)))
    with pytest.raises(VPruneError, match="rows="):
        Recipe(rows="first")
    assert vprune.Masks.none((2, 3)).to_coco() == []


def test_names_go_to_categories() -> None:
    labeller = Labeller(["circle", "square", "heart"])
    assert labeller(["red circle", "large blue heart", "the square"]) == ["circle", "heart", "square"]
    assert labeller([]) == []


def test_a_folder_becomes_one_coco_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in ((3, "a.png"), (4, "more/b.png")):
        scene(number)[0].save(folder / name)
    (folder / "text.jpg").write_text("no image")
    out = tmp_path / "out"
    words = [
        str(folder),
        f"out={out}",
        "device=cpu",
        "categories=[circle,square,triangle,star,cross,ring,heart,diamond]",
    ]
    assert main(["segment", *words]) == 1
    assert "text.jpg" in capsys.readouterr().err
    content = json.loads((out / "annotations.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png", "more/b.png"]
    assert [one["id"] for one in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    assert len(content["categories"]) == 8 and (out / "overlay" / "more" / "b.png").is_file()
    (folder / "text.jpg").unlink()
    work = app.Work

    def none(*_: Any) -> None:
        raise AssertionError("nothing was left to do")

    app.Work = none  # type: ignore[assignment, misc]
    try:
        assert main(["segment", *words]) == 0
    finally:
        app.Work = work  # type: ignore[misc]
    assert json.loads((out / "annotations.json").read_text()) == content
    assert main(["segment", *words, "least=0.1"]) == 2
    assert "another command" in capsys.readouterr().err


def test_commands_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jpg").write_text("no image")
    for words, told in (
        (["nowhere.png"], "does not exist"),
        ([str(tmp_path / "x.jpg")], "is not an image"),
        ([str(tmp_path), "thresold=1"], "there is no option"),
    ):
        assert main(["segment", *words, f"out={tmp_path / 'o'}"]) == 2
        assert told in capsys.readouterr().err
