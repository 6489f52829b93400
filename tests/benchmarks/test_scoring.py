"""Every rule of scoring on cases computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.made import SYNONYMS
from vprune import VPruneError
from vprune.eval.benchmarks.boxes import box_mask, mask_iou, read_box
from vprune.eval.benchmarks.hallucination import ObjectWords, chair
from vprune.eval.benchmarks.letters import chosen, lettered
from vprune.eval.benchmarks.vqa_accuracy import normalise_textvqa, normalise_vqa, textvqa_accuracy, vqa_accuracy
from vprune.eval.benchmarks.yes_no import mme_answer, pope_answer, rates


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("2", ["2"] * 10, 1.0),
        ("2", ["2"] + ["3"] * 9, 0.3),  # nine times 1/3, once 0
        ("2", ["2"] * 2 + ["3"] * 8, (8 * 2 / 3 + 2 * 1 / 3) / 10),
        ("2", ["2"] * 3 + ["3"] * 7, (7 * 1.0 + 3 * 2 / 3) / 10),
        ("2", ["2"] * 4 + ["3"] * 6, 1.0),
        ("Two", ["2"] * 5 + ["the two"] * 5, 1.0),
        ("The dog.", ["dog"] * 9 + ["cat"], 1.0),
        ("4", ["2"] * 9 + ["3"], 0.0),
        ("Yes", ["yes"] * 10, 0.0),  # all annotators agree: the official evaluation compares the texts as they are
    ],
)
def test_vqa_accuracy_leaves_one_annotator_out(prediction: str, answers: list[str], score: float) -> None:
    assert vqa_accuracy(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A Dog!", "dog"),
        ("none", "0"),
        ("ten to five", "10 to 5"),
        ("10,000 people", "10000 people"),
        ("3.5 in.", "3.5 in"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("well-known", "well known"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("its", "its"),
        ("yall", "y'all"),
        ("an apple and the pear", "apple and pear"),
        ("\tline\nbreak ", "line break"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_published(text: str, normal: str) -> None:
    assert normalise_vqa(text) == normal


def test_textvqa_normalises_everything_and_sets_possessives_apart() -> None:
    assert normalise_textvqa("McDonald's, USA?") == "mcdonald 's usa"
    assert textvqa_accuracy("Yes", ["yes"] * 10) == 1.0
    assert textvqa_accuracy("7-eleven", ["7 eleven"] * 3 + ["shop"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (B). ", "B"),
        ("B.", "B"),
        ("B. a dog", "B"),
        ("B) a cat", "B"),
        ("(B) a dog", "B"),
        ("The answer is B.", "B"),
        ("Answer: (B) a dog", "B"),
        ("I would choose option B", "B"),
        ("It shows B", "B"),
        ("a dog", "B"),
        ("It is A DOG, surely", "A"),  # as published: in a short answer, A is the letter
        ("It is A DOG, of that I am sure", "B"),
        ("the cat and a dog are there", "B"),  # of the options, only "a dog" occurs
        ("A photo of a very big bird", None),  # the article, and no option
        ("A", "A"),
        ("A or B", None),
        ("E", None),
        ("", None),
        ("hotdogs", None),
    ],
)
def test_a_letter_is_read_from_what_models_write(prediction: str, letter: str | None) -> None:
    assert chosen(prediction, ["a cat", "a dog", "a cow", "two birds"]) == letter


def test_options_are_lettered() -> None:
    assert lettered(["x", "y", "z"]) == "A. x\nB. y\nC. z"


@pytest.mark.parametrize(
    ("prediction", "pope", "mme"),
    [
        ("Yes", "yes", "yes"),
        ("no", "no", "no"),
        ("No, there is not.", "no", "no"),
        ("Yes. There is not much", "yes", "yes"),
        ("NO", "yes", "no"),  # POPE's rule knows No, no and not
        ("There is not", "no", None),
        ("I cannot say", "yes", None),
        ("", "yes", None),
        ("**Yes**", "yes", "yes"),
        ("n", "yes", "no"),
    ],
)
def test_yes_and_no_are_read_by_each_benchmarks_rule(prediction: str, pope: str, mme: str | None) -> None:
    assert pope_answer(prediction) == pope
    assert mme_answer(prediction) == mme


def test_rates_of_yes() -> None:
    said = [("yes", "yes")] * 3 + [("yes", "no")] * 1 + [("no", "yes")] * 2 + [("no", "no")] * 4
    found = rates([{"answer": truth, "prediction": answer} for truth, answer in said])
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["precision"] == pytest.approx(3 / 5)
    assert found["recall"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["yes_ratio"] == pytest.approx(0.5)
    assert found["yes_ratio_labels"] == pytest.approx(0.4)


def test_a_failed_row_is_a_wrong_answer_and_no_prediction() -> None:
    failed = {"answer": "no", "prediction": "", "error": "boom"}
    found = rates([{"answer": "yes", "prediction": "yes"}, failed])
    assert (found["accuracy"], found["precision"], found["yes_ratio"]) == (0.5, 0.5, 1.0)
    assert rates([])["f1"] == 0.0


@pytest.fixture
def words(tmp_path: Path) -> ObjectWords:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS, encoding="utf-8")
    return ObjectWords(tmp_path / "synonyms.txt")


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two men and their puppies.", ["person", "dog"]),
        ("A child, a woman; people", ["person", "person", "person"]),
        ("a hot dog on the desk", ["hot dog", "dining table"]),
        ("hot dogs on dining tables", ["hot dog", "dining table"]),
        ("train tracks, no locomotive... well, a train", ["train", "train"]),
        ("a baby elephant and a baby", ["elephant"]),
        ("passenger trains and minibuses", ["train", "bus"]),
        ("a motor bike, a bike", ["motorcycle", "motorcycle"]),
        ("a bow tie and knives", ["tie", "knife"]),
        ("The man's dog", ["person", "dog"]),
        ("nothing", []),
    ],
)
def test_captions_mention_objects(words: ObjectWords, caption: str, objects: list[str]) -> None:
    assert words.mentioned(caption) == objects


def test_chair_counts_mentions_and_captions() -> None:
    found = chair([(["dog", "dog", "cat"], {"dog", "bus"}), (["bus"], {"bus"}), ([], {"tie"})])
    assert found == {"chair_i": 1 / 4, "chair_s": 1 / 3, "object_recall": 2 / 4}
    assert chair([])["chair_i"] == 0.0


def test_a_synonym_of_two_objects_stands_for_the_later_one(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("person, rider,  horse  man\n\nhorse, rider\n")
    assert ObjectWords(tmp_path / "words.txt").mentioned("a rider, a horse man") == ["horse", "person"]
    (tmp_path / "words.txt").write_text("\n")
    with pytest.raises(VPruneError, match="holds no words"):
        ObjectWords(tmp_path / "words.txt")


@pytest.mark.parametrize(
    ("prediction", "scale", "box"),
    [
        ("[0.1, 0.2, 0.5, 0.4]", "unit", (10, 10, 50, 20)),
        ("<box>(100,200),(500,400)</box>", "thousand", (10, 10, 50, 20)),
        ("50 20 10 10", "pixels", (10, 10, 50, 20)),
        ("it is left", "unit", None),
        ("1, 2, 3", "pixels", None),
    ],
)
def test_a_box_is_read_from_text(prediction: str, scale: str, box: tuple[float, ...] | None) -> None:
    found = read_box(prediction, scale, width=100, height=50)
    assert found == (None if box is None else pytest.approx(box))


def test_iou_of_a_box_and_a_mask() -> None:
    mask = np.zeros((10, 20), dtype=bool)
    mask[:, :10] = True
    assert mask_iou(box_mask((0, 0, 20, 10), 20, 10), mask) == 0.5
    assert mask_iou(box_mask((5, 0, 15, 10), 20, 10), mask) == pytest.approx(50 / 150)
    assert mask_iou(box_mask((0, 0, 10, 10), 20, 10), mask) == 1.0
    assert mask_iou(box_mask((12, 0, 14, 4), 20, 10), mask) == 0.0
