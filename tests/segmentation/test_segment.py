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
from vprune.segmentation.asking import Respondent
from vprune.segmentation.labels import Labeller
from vprune.segmentation.prompting import Prompting
from vprune.segmentation.segment import Recipe, Session
from vprune.segmentation.segmenters import load_segmenter
from vprune.segmentation.stages import STAGES

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


@pytest.mark.parametrize("size", [(33, 900)])
def test_sizes_of_every_kind(session: Session, size: tuple[int, int]) -> None:
    brief = Recipe(max_new_tokens=8)  # of a grey image the model talks without end
    found = Session((session.model, session.processor), load_segmenter("embedded"), brief)(
        Image.new("RGB", size, (90, 90, 90))
    )
    assert found.size == size[::-1] and found.array.shape == (len(found), *size[::-1])


def test_crops_are_looked_at_together(session: Session) -> None:
    picture, masks, names, _ = scene(SCENE)
    recipe = Recipe(crops=True, prompting=Prompting(rounds=3))
    crops = Session((session.model, session.processor), session.segmenter, recipe)
    parts = crops._views(picture, None)
    assert len(parts) == 5 and parts[0] == (0, 0, 384, 384) and parts[-1][2:] == (384, 384)
    segmenter = TrueMasks(pictures=[(picture, masks)], parts=parts[1:])
    crops.segmenter = segmenter
    found = crops(picture)
    # Every view is encoded once, and the prompts of all go together.
    assert segmenter.encoded <= 5 and len(segmenter.calls) == 3 and segmenter.calls[0] >= len(names)
    assert found.spent is not None and found.spent.tokens_before == 5 * 576
    # Nothing that a crop cuts off is left, and nothing twice.
    best = [max(range(len(masks)), key=lambda row, one=one: iou(masks[row], one)) for one in found.array]
    assert all(iou(masks[row], one) > 0.9 for row, one in zip(best, found.array, strict=True))
    assert len(set(best)) == len(best) >= 0.8 * len(masks)
    assert all((one >= 0).all() and (one <= 384).all() for one in found.points)


def test_a_listing_without_a_name_finds_nothing(session: Session) -> None:
    silent = Session((session.model, session.processor), session.segmenter, Recipe(max_new_tokens=1, least=1.0))
    found = silent(scene(SCENE)[0])
    assert len(found) == 0 and found.to_coco() == [] and found.array.shape == (0, 384, 384)
    assert found.spent is not None and found.spent.tokens_before == 576


def test_questions_are_answered_in_one_batch_as_they_are_alone(session: Session) -> None:
    views = [scene(number)[0] for number in (3, 4)] + [scene(3)[0].crop((0, 0, 231, 200))]
    recipe = Recipe(questions=("list the objects.", "what objects are in the image?"), max_new_tokens=12)
    respondent = Respondent(session.model, session.processor, recipe, None)
    asked = [(0, recipe.questions[0]), (1, recipe.questions[1]), (2, recipe.questions[0])]
    together = respondent._answers(views, asked)
    for one, answer in zip(asked, together, strict=True):
        assert respondent._answers(views, [one])[0].tolist() == answer.tolist()
    assert respondent.tokens == dict.fromkeys(range(3), (576, 576))


def test_mistakes(session: Session, tmp_path: Path) -> None:
    picture = scene(SCENE)[0]
    with pytest.raises(VPruneError, match="names nothing"):
        session(picture, " the . ")
    with pytest.raises(VPruneError, match="does not know"):
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


def test_every_stage_is_timed(session: Session) -> None:
    spent = session(scene(SCENE)[0]).spent
    assert spent is not None and tuple(spent.stages) == STAGES
    assert 0.9 * spent.seconds < sum(spent.stages.values()) <= spent.seconds
    looked = session(scene(SCENE)[0], "the circle").spent
    assert looked is not None and tuple(looked.stages) == STAGES[1:]
