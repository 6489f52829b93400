"""What is wrong with a published copy is told with the file, the row and the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import made
from tests.json_files import change
from vprune import VPruneError
from vprune.eval.benchmarks.answers import score_file
from vprune.eval.benchmarks.chair import Chair
from vprune.eval.benchmarks.gqa import Gqa
from vprune.eval.benchmarks.mmbench import MmBench
from vprune.eval.benchmarks.mme import Mme
from vprune.eval.benchmarks.pope import Pope
from vprune.eval.benchmarks.scienceqa import ScienceQa
from vprune.eval.benchmarks.videomme import VideoMme
from vprune.eval.benchmarks.vizwiz import VizWizGrounding
from vprune.eval.benchmarks.vqa import TextVqa, VqaV2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"label": None}, r"coco_pope_random\.json, row 2: field 'label' is empty"),
        ({"text": ""}, r"row 2: field 'text or question' is empty"),
        ({"label": "perhaps"}, r"row 2: field 'label' should be one of yes, no, got 'perhaps'"),
        ({"question_id": 1}, r"row 2: id 'random-1' was given in row 1 already"),
        ({"image": "https://example.org/1.jpg"}, r"row 2: field 'image' is the URL .*benchmark\.images=FOLDER"),
        ({"image": "../1.jpg"}, r"row 2: field 'image' should name a file below the folder"),
        ({"image": "other.jpg"}, r"row 2: image .*other\.jpg does not exist; .*benchmark\.images=FOLDER"),
        ({"image": ["a.jpg"]}, r"row 2: field 'image' should be text, got \['a\.jpg'\]"),
    ],
)
def test_a_row_of_pope(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    first, other = made.pope_rows()
    made.pope(tmp_path, [first, {**other, **second}])
    with pytest.raises(VPruneError, match=message):
        Pope(path=tmp_path)


def test_a_field_that_is_missing_is_told_with_those_there(tmp_path: Path) -> None:
    first, second = made.pope_rows()
    del second["image"]
    made.pope(tmp_path, [first, second])
    with pytest.raises(VPruneError, match=r"row 2: field 'image' is missing; the row has category, question_id, text"):
        Pope(path=tmp_path)


def test_broken_files(tmp_path: Path) -> None:
    made.pope(tmp_path)
    file = tmp_path / "coco_pope_random.json"
    file.write_text(file.read_text() + '{"question_id": 3,\n')
    with pytest.raises(VPruneError, match=r"coco_pope_random\.json, row 3: broken JSON"):
        Pope(path=tmp_path)
    file.write_text("[1]")
    with pytest.raises(VPruneError, match=r"row 1: expected an object with the question's fields, got 1"):
        Pope(path=tmp_path)
    file.write_text("")
    with pytest.raises(VPruneError, match=r"holds no question of benchmark=pope"):
        Pope(path=file)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(VPruneError, match=r"cannot be read"):
        Pope(path=file)


def test_a_folder_that_is_no_copy(tmp_path: Path) -> None:
    with pytest.raises(VPruneError, match=r"holds none of coco_pope_random\.json, .*a copy of pope as published"):
        Pope(path=tmp_path)
    with pytest.raises(VPruneError, match=r"benchmark\.path=.*nowhere does not exist"):
        Pope(path=tmp_path / "nowhere")
    with pytest.raises(VPruneError, match=r"no home on the hub .* benchmark\.path=FOLDER"):
        VizWizGrounding()
    with pytest.raises(VPruneError, match=r"benchmark\.images=.*nowhere is not a folder"):
        Pope(path=made.pope(tmp_path), images=tmp_path / "nowhere")
    with pytest.raises(VPruneError, match=r"never names \{question\}"):
        Pope(path=tmp_path, template="Answer.")
    with pytest.raises(VPruneError, match=r"benchmark\.subset=rndom is unknown; there is random"):
        Pope(path=tmp_path, subset="rndom")


@pytest.mark.parametrize("text", ["yes", "['yes', 'no']"])
def test_an_answer_list_that_is_a_string(tmp_path: Path, text: str) -> None:
    made.vqav2(tmp_path)
    change(tmp_path / "v2_mscoco_val2014_annotations.json", "annotations", 1, "answers", to=text)
    message = r"annotations\.json, row 2: field 'answers' should be a list of texts, got the text"
    with pytest.raises(VPruneError, match=message):
        VqaV2(path=tmp_path)
    made.textvqa(tmp_path)
    change(tmp_path / "TextVQA_0.5.1_val.json", "data", 0, "answers", to=text)
    with pytest.raises(VPruneError, match=r"val\.json, row 1: field 'answers' should be a list of texts"):
        TextVqa(path=tmp_path)


def test_vqav2_questions_and_annotations_belong_together(tmp_path: Path) -> None:
    made.vqav2(tmp_path)
    questions = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    change(questions, "questions", 0, "question_id", to=7)
    with pytest.raises(VPruneError, match=r"row 1: field 'question_id' names '7', without an entry in .*annotations"):
        VqaV2(path=tmp_path)
    change(tmp_path / "v2_mscoco_val2014_annotations.json", "annotations", 1, "question_id", to=42001)
    with pytest.raises(VPruneError, match=r"annotations\.json, row 2: field 'question_id' names '42001', which row 1"):
        VqaV2(path=tmp_path)


def test_an_id_given_twice_in_an_object(tmp_path: Path) -> None:
    made.gqa(tmp_path)
    file = tmp_path / "testdev_balanced_questions.json"
    file.write_text(file.read_text().replace("201640614", "201307251"))
    with pytest.raises(VPruneError, match=r"row 2: id '201307251' was given in row 1 already"):
        Gqa(path=tmp_path)


def test_mme(tmp_path: Path) -> None:
    text = made.mme(tmp_path) / "MME_Benchmark_release_version/existence/000000006040.txt"
    whole = text.read_text()
    text.write_text(whole + "A third?\tNo\n")
    with pytest.raises(VPruneError, match=r"6040\.txt, row 3: field 'question_id' names .* a third time"):
        Mme(path=tmp_path)
    text.write_text(whole.replace("\t", " "))
    with pytest.raises(VPruneError, match=r"6040\.txt, row 1: expected QUESTION<TAB>ANSWER"):
        Mme(path=tmp_path)
    with pytest.raises(VPruneError, match=r"holds no folder of a subtask"):
        Mme(path=text.parent)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"answer": "C"}, r"row 2: field 'answer' should be one of A, B, got 'C'"),
        ({"B": ""}, r"row 2: field 'B' is empty"),
        (
            {"image": "777"},
            r"row 2: field 'image' should be an image in base64 or the index of an earlier row, got '777'",
        ),
        ({"image": "https://example.org/1.jpg"}, r"row 2: field 'image' is the URL"),
        ({"index": "x"}, r"row 2: field 'index' should be an integer, got 'x'"),
    ],
)
def test_a_row_of_mmbench(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    first, other = made.mmbench_rows()
    file = made.write_table(tmp_path / "mmbench_dev_en.tsv", [first, {**other, **second}])
    with pytest.raises(VPruneError, match=message):
        MmBench(path=file)


def test_two_tables_are_not_chosen_between(tmp_path: Path) -> None:
    for name in ("mmbench_dev_en_1.tsv", "mmbench_dev_en_2.tsv"):
        made.write_table(tmp_path / name, made.mmbench_rows())
    with pytest.raises(VPruneError, match=r"holds mmbench_dev_en_1\.tsv, mmbench_dev_en_2\.tsv: name one"):
        MmBench(path=tmp_path)


def test_base64_of_no_image_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    first, second = made.mmbench_rows()
    file = made.write_table(tmp_path / "mmbench_dev.tsv", [first, {**second, "image": "%" * 99}])
    benchmark = MmBench(path=file, circular=False)
    with pytest.raises(VPruneError, match=r"row 2, field 'image'\) is not an image"):
        benchmark.load_image(benchmark.samples[1])


def test_other_benchmarks(tmp_path: Path) -> None:
    problems = made.scienceqa(tmp_path / "science") / "problems.json"
    change(problems, "4", "answer", to=2)
    with pytest.raises(
        VPruneError, match=r"row 1: field 'answer' should be a place among the 2 choices, from 0, got 2"
    ):
        ScienceQa(path=tmp_path / "science")
    change(problems, "4", "choices", to="a rock, a plant")
    with pytest.raises(VPruneError, match=r"row 1: field 'choices' should be a list of texts"):
        ScienceQa(path=tmp_path / "science")
    grounding = made.vizwiz(tmp_path / "vizwiz", masks=False) / "val_grounding.json"
    change(grounding, "VizWiz_val_00000001.jpg", "answer_grounding", to=[[0, 1]])
    with pytest.raises(VPruneError, match=r"row 1: field 'answer_grounding' should be a polygon"):
        VizWizGrounding(path=tmp_path / "vizwiz")
    change(grounding, "VizWiz_val_00000001.jpg", "answer_grounding")
    assert not VizWizGrounding(path=tmp_path / "vizwiz").has_evidence
    with pytest.raises(VPruneError, match=r"field 'mask or answer_grounding' is missing"):
        VizWizGrounding(path=tmp_path / "vizwiz", ask="box")
    made.write_lines(tmp_path / "video/videomme.jsonl", made.videomme_rows())
    with pytest.raises(
        VPruneError, match=r"row 1: field 'videoID' needs .*\.mp4, which does not exist; .*benchmark\.vid"
    ):
        VideoMme(path=tmp_path / "video")
    made.chair(tmp_path / "chair")
    change(tmp_path / "chair/annotations/instances_val2014.json", "annotations", 1, "category_id", to=99)
    with pytest.raises(VPruneError, match=r"row 2: field 'category_id' names '99', which is no category"):
        Chair(path=tmp_path / "chair")
    (tmp_path / "chair/synonyms.txt").unlink()
    with pytest.raises(VPruneError, match=r"synonyms\.txt does not exist: .*benchmark\.synonyms=FILE"):
        Chair(path=tmp_path / "chair")


def test_answers_of_a_file(tmp_path: Path) -> None:
    benchmark = Pope(path=made.pope(tmp_path), subset="random")
    file = made.write_lines(
        tmp_path / "a.jsonl", [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": ""}]
    )
    assert score_file(benchmark, file)["accuracy"] == 0.5
    made.write_lines(file, [{"question": "?", "answer": "yes"}, {"question": "?", "answer": "no"}])  # in order
    assert score_file(benchmark, file)["accuracy"] == 1.0
    for rows, message in (
        ([{"question_id": 1, "answer": "yes"}], r"leaves 1 of 2 samples out, 'random-2' the first"),
        ([{"question_id": 1, "answer": "yes"}] * 2, r"row 2: sample 'random-1' was answered already"),
        ([{"question_id": 9, "answer": "yes"}], r"row 1: field 'question_id' names '9', which is no sample"),
        ([{"question_id": 1}], r"row 1: field 'prediction or answer or text' is missing"),
        ([{"answer": "yes"}], r"answers 1 questions in order, pope has 2"),
    ):
        made.write_lines(file, rows)
        with pytest.raises(VPruneError, match=message):
            score_file(benchmark, file)
