"""Data sets of the hub: their parquet files read offline, and what is said when one has moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import made
from vprune import VPruneError
from vprune.eval.benchmarks.gqa import Gqa
from vprune.eval.benchmarks.mmbench import MmBench
from vprune.eval.benchmarks.mme import Mme
from vprune.eval.benchmarks.pope import Pope
from vprune.eval.benchmarks.scienceqa import ScienceQa
from vprune.eval.benchmarks.videomme import VideoMme
from vprune.eval.benchmarks.vqa import TextVqa, VqaV2

datasets = pytest.importorskip("datasets", reason="needs vprune[benchmarks]")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]], image: str | None = "image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if image is not None:
        table = table.cast_column(image, datasets.Image())
    table.to_parquet(str(path))
    return path


def picture(seed: int = 0) -> dict[str, Any]:
    return {"bytes": made.encoded(seed), "path": None}


def test_pope(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(n),
            "question_id": str(n % 2 + 1),
            "question": "Is there a dog?",
            "answer": "yes",
            "image_source": "x",
        }
        | {"image": picture(n), "category": category}
        for n, category in enumerate(["adversarial", "adversarial", "popular", "random"])
    ]
    write(tmp_path / "data/test-00000-of-00001.parquet", rows)
    benchmark = Pope(path=tmp_path)
    assert [sample.id for sample in benchmark.samples] == ["adversarial-1", "adversarial-2", "popular-1", "random-2"]
    assert benchmark.load_image(benchmark.samples[3]).tobytes() == made.picture(3).tobytes()
    assert len(Pope(path=tmp_path, subset="popular").samples) == 1


def test_gqa_joins_its_images(tmp_path: Path) -> None:
    types = {"structural": "query", "semantic": "attr", "detailed": "x"}
    row = {"id": "07333408", "imageId": "n578", "question": "What?", "answer": "no", "types": types}
    write(tmp_path / "testdev_balanced_instructions/testdev-00000-of-00001.parquet", [row], image=None)
    images = write(
        tmp_path / "testdev_balanced_images/testdev-00000-of-00001.parquet", [{"id": "n578", "image": picture()}]
    )
    names = {"config": "testdev_balanced_instructions", "images_config": "testdev_balanced_images"}
    benchmark = Gqa(path=tmp_path, **names)
    assert benchmark.load_image(benchmark.samples[0]).size == made.SIDE
    assert benchmark.samples[0].kind == "query"
    write(images, [{"id": "n579", "image": picture()}])
    with pytest.raises(
        VPruneError, match=r"row 1: field 'imageId' names 'n578', which testdev_balanced_images does not"
    ):
        Gqa(path=tmp_path, **names)


def test_mme_and_mmbench(tmp_path: Path) -> None:
    pair = {"question_id": "OCR/0001.jpg", "image": picture(), "question": "Is it? Please answer yes or no."}
    rows = [pair | {"answer": answer, "category": "OCR"} for answer in ("Yes", "No")]
    write(tmp_path / "mme/data/test-00000-of-00001.parquet", rows)
    assert [sample.id for sample in Mme(path=tmp_path / "mme").samples] == ["OCR/0001.jpg#1", "OCR/0001.jpg#2"]
    row = {"index": 5, "question": "Who?", "hint": "nan", "A": "x", "B": "y", "C": "nan", "D": "nan", "answer": "A"}
    row |= {"category": "c", "L2-category": "l", "image": picture()}
    write(tmp_path / "mmbench/en/dev-00000-of-00001.parquet", [row])
    benchmark = MmBench(path=tmp_path / "mmbench", config="en")
    assert benchmark.prompt(benchmark.samples[0]) == "Who?\nA. x\nB. y"


def test_open_questions(tmp_path: Path) -> None:
    row = {
        "question_type": "what",
        "multiple_choice_answer": "net",
        "answers": made.vqa_answers(("net", 9), ("nets", 1)),
    }
    row |= {
        "image_id": 262148,
        "answer_type": "other",
        "question_id": 262148000,
        "question": "What?",
        "image": picture(),
    }
    write(tmp_path / "vqa/data/validation-00000-of-00001.parquet", [row])
    sample = VqaV2(path=tmp_path / "vqa").samples[0]
    assert (sample.answer, len(sample.answers)) == ("net", 10)
    row = {"image_id": "a", "question_id": 34602, "question": "brand?", "image": picture(), "answers": ["x"] * 10}
    write(tmp_path / "text/data/validation-00000-of-00001.parquet", [row])
    assert TextVqa(path=tmp_path / "text").samples[0].id == "34602"


def test_scienceqa_passes_over_rows_without_an_image(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 0, "hint": "", "subject": "social science"}
    rows = [row | {"image": None}, row | {"image": picture()}]
    write(tmp_path / "data/test-00000-of-00001.parquet", rows)
    assert [sample.id for sample in ScienceQa(path=tmp_path).samples] == ["2"]


def test_videomme(tmp_path: Path) -> None:
    made.videomme(tmp_path)
    write(tmp_path / "videomme/test-00000-of-00001.parquet", made.videomme_rows(), image=None)
    benchmark = VideoMme(path=tmp_path, config="videomme", frames=2)
    assert benchmark.load_video(benchmark.samples[1]).shape == (2, 10, 20, 3)


def test_a_field_that_is_missing_or_a_string(tmp_path: Path) -> None:
    row = {"image_id": "a", "question_id": 1, "question": "brand?", "image": picture(), "answers": "x, y"}
    file = write(tmp_path / "data/validation-00000-of-00001.parquet", [row])
    with pytest.raises(VPruneError, match=r"parquet, row 1: field 'answers' should be a list of texts, got the text"):
        TextVqa(path=tmp_path)
    del row["answers"]
    write(file, [row])
    with pytest.raises(VPruneError, match=r"row 1: field 'answers' is missing; the row has image_id, question_id"):
        TextVqa(path=tmp_path)


def test_a_cell_that_names_a_url(tmp_path: Path) -> None:
    row = {"category": "random", "question_id": "1", "question": "?", "answer": "yes"}
    url = {"bytes": None, "path": "https://example.org/1.jpg"}
    write(tmp_path / "test.parquet", [row | {"image": url}], image=None)
    benchmark = Pope(path=tmp_path)
    with pytest.raises(VPruneError, match=r"row 1, field 'image'\) is the URL https://example\.org/1\.jpg"):
        benchmark.load_image(benchmark.samples[0])


def test_a_data_set_that_has_moved_names_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'x/POPE' doesn't exist on the Hub or cannot be accessed."
        )

    monkeypatch.setattr(datasets, "load_dataset", gone)
    message = (
        r"benchmark\.repo=x/POPE, split test, revision v1 cannot be loaded \(Dataset 'x/POPE' doesn't exist.*moved on "
        r"the hub before: .*benchmark\.repo=OWNER/NAME .*benchmark\.revision=.*benchmark\.path=FOLDER"
    )
    with pytest.raises(VPruneError, match=message):
        Pope(repo="x/POPE", revision="v1")


def test_what_the_hub_is_asked_for_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"id": "0", "question_id": "1", "question": "?", "answer": "no", "category": "random", "image": picture()}
    table = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    calls = []

    def load(*names: object, **options: object) -> Any:
        calls.append((names, options))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    benchmark = Pope(repo="x/POPE", config="c", revision="v1")
    assert calls == [(("x/POPE",), {"name": "c", "split": "test", "revision": "v1"})]
    assert benchmark.load_image(benchmark.samples[0]).size == made.SIDE
    assert len(benchmark.fingerprint) == 16


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(VPruneError, match=r"pip install 'vprune\[benchmarks\]', or name a local copy"):
        Pope(repo="x/POPE")
