"""Every benchmark read from a local copy in its published layout, asked and scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate

from tests.benchmarks import made
from vprune.eval.benchmarks.answers import score_answers
from vprune.eval.benchmarks.chair import Chair
from vprune.eval.benchmarks.gqa import Gqa
from vprune.eval.benchmarks.mmbench import MmBench
from vprune.eval.benchmarks.mme import Mme
from vprune.eval.benchmarks.pope import Pope
from vprune.eval.benchmarks.published import Published
from vprune.eval.benchmarks.scienceqa import ScienceQa
from vprune.eval.benchmarks.videomme import VideoMme
from vprune.eval.benchmarks.vizwiz import VizWizGrounding
from vprune.eval.benchmarks.vqa import TextVqa, VqaV2
from vprune.eval.options import entries
from vprune.eval.overrides import compose_all
from vprune.eval.settings import read_jobs

OWN = ("folder", "scenes", "scenes_fresh", "scenes_segment")


def asked(benchmark: Published) -> dict[str, str]:
    return {sample.id: benchmark.prompt(sample) for sample in benchmark.samples}


def scored(benchmark: Published, said: Mapping[str, str]) -> dict[str, Any]:
    return score_answers(benchmark, said)


@pytest.mark.parametrize("name", [name for name in entries("benchmark") if name not in OWN])
def test_every_yaml_names_a_class_and_options_that_it_takes(name: str, tmp_path: Path) -> None:
    given = [f"benchmark={name}", f"benchmark.path={tmp_path}"]
    assert read_jobs(given)[0].config["benchmark"]["name"] == name
    (composed,) = compose_all(given)
    with pytest.raises(Exception, match=r"holds n|holds no|does not exist"):  # what is missing is the copy, no option
        instantiate(composed.config["benchmark"])


def test_pope(tmp_path: Path) -> None:
    benchmark = Pope(path=made.pope(tmp_path), template="{question}\nOne word.")
    assert list(asked(benchmark)) == [f"{s}-{n}" for s in ("random", "popular", "adversarial") for n in (1, 2)]
    assert asked(benchmark)["random-1"] == "Is there a dog in the image?\nOne word."
    assert benchmark.load_image(benchmark.samples[0]).size == made.SIDE
    said = dict.fromkeys(asked(benchmark), "Yes") | {"random-2": "No."}
    metrics = scored(benchmark, said)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["by_subset"]["random"]["f1"] == 1.0
    assert metrics["by_subset"]["popular"]["precision"] == 0.5
    assert metrics["f1"] == metrics["score"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert metrics["yes_ratio"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert len(Pope(path=tmp_path, subset="popular").samples) == 2
    assert len(Pope(path=tmp_path / "coco_pope_adversarial.json").samples) == 2


def test_gqa(tmp_path: Path) -> None:
    benchmark = Gqa(path=made.gqa(tmp_path))
    assert [sample.kind for sample in benchmark.samples] == ["query", "verify"]
    metrics = scored(benchmark, {"201307251": "Dog.", "201640614": "no"})
    assert (metrics["accuracy"], metrics["accuracy_open"], metrics["accuracy_binary"]) == (0.5, 1.0, 0.0)


def test_mme(tmp_path: Path) -> None:
    benchmark = Mme(path=made.mme(tmp_path), template="{question}\nOne word.")
    assert len(benchmark.samples) == 6
    assert asked(benchmark)["existence/000000006040#1"] == "Is there a boat in this image?\nOne word."
    assert Mme(path=tmp_path).prompt(benchmark.samples[0]).endswith("Please answer yes or no.")
    metrics = scored(benchmark, dict.fromkeys(asked(benchmark), "Yes") | {"existence/000000006040#2": "No"})
    # existence: 3 of 4 questions and 1 of 2 images; celebrity: 1 of 2 questions, and its image is not right
    assert metrics["subtasks"]["existence"] == {"acc": 75.0, "acc_plus": 50.0, "score": 125.0, "images": 2}
    assert metrics["subtasks"]["celebrity"]["score"] == 50.0
    assert (metrics["perception"], metrics["cognition"], metrics["score"]) == (175.0, 0, 175.0)


def test_mmbench_rotates_what_the_file_does_not(tmp_path: Path) -> None:
    file = made.write_table(tmp_path / "mmbench_dev_20230712.tsv", made.mmbench_rows())
    benchmark = MmBench(path=file)
    assert [sample.id for sample in benchmark.samples] == ["241", "1000241", "2000241", "252", "1000252"]
    assert benchmark.prompt(benchmark.samples[1]) == "A text.\nWho?\nA. dog\nB. cow\nC. cat"
    assert [sample.answer for sample in benchmark.samples] == ["B", "A", "C", "A", "B"]
    assert benchmark.load_image(benchmark.samples[0]).size == made.SIDE
    always_a = scored(benchmark, dict.fromkeys(asked(benchmark), "A"))
    assert (always_a["vanilla_accuracy"], always_a["circular_accuracy"]) == (0.5, 0.0)
    said = {"241": "B", "1000241": "dog", "2000241": "(C)", "252": "red", "1000252": "A"}
    metrics = scored(benchmark, said)
    assert (metrics["vanilla_accuracy"], metrics["circular_accuracy"], metrics["score"]) == (1.0, 0.5, 0.5)
    drawn = scored(benchmark, {"241": "B", "252": "A", "1000252": "B"})  # not every rotation of 241 was asked
    assert (drawn["circular_accuracy"], drawn["circular_questions"]) == (1.0, 1)
    once = MmBench(path=tmp_path, circular=False)
    assert [sample.id for sample in once.samples] == ["241", "252"]
    assert scored(once, {"241": "B", "252": "B"})["score"] == 0.5


def test_mmbench_takes_the_rotations_of_the_file(tmp_path: Path) -> None:
    first, second = made.mmbench_rows()
    turned = {**second, "index": 1000252, "A": "blue", "B": "red", "answer": "B", "image": "252"}
    benchmark = MmBench(path=made.write_table(tmp_path / "MMBench_DEV_EN.tsv", [first, second, turned]))
    assert [sample.id for sample in benchmark.samples] == ["241", "252", "1000252"]
    assert benchmark.samples[2].image is benchmark.samples[1].image
    assert scored(benchmark, {"241": "A", "252": "A", "1000252": "B"})["circular_accuracy"] == 0.5


def test_vqav2(tmp_path: Path) -> None:
    benchmark = VqaV2(path=made.vqav2(tmp_path))
    assert [(sample.id, sample.kind, sample.answer) for sample in benchmark.samples] == [
        ("42000", "yes/no", "yes"),
        ("42001", "number", "2"),
    ]
    metrics = scored(benchmark, {"42000": "yes", "42001": "Two dogs."})
    assert metrics["accuracy_by_kind"] == {"yes/no": 1.0, "number": pytest.approx(0.9)}


def test_textvqa(tmp_path: Path) -> None:
    benchmark = TextVqa(path=made.textvqa(tmp_path))
    assert benchmark.samples[0].answer == "dakota"
    assert scored(benchmark, {"34602": "Nous les gosses"})["accuracy"] == 1.0


def test_scienceqa(tmp_path: Path) -> None:
    benchmark = ScienceQa(path=made.scienceqa(tmp_path))
    assert asked(benchmark) == {"4": "Context: Look at the picture.\nWhich is it?\nA. a rock\nB. a plant"}
    assert scored(benchmark, {"4": "B."})["accuracy_by_kind"] == {"natural science": 1.0}


@pytest.mark.parametrize("masks", [True, False])
def test_vizwiz_grounding(tmp_path: Path, masks: bool) -> None:
    made.vizwiz(tmp_path, masks)
    answering = VizWizGrounding(path=tmp_path)
    assert scored(answering, {"VizWiz_val_00000001": "the soup"})["accuracy"] == 1.0
    assert answering.has_evidence
    mask = answering.evidence_mask(answering.samples[0])
    assert mask is not None
    assert np.array_equal(mask, np.arange(20)[None, :].repeat(10, 0) < 10)  # from the PNG, or from the polygon
    pointing = VizWizGrounding(path=tmp_path, ask="box", template="Where is the answer to: {question}")
    metrics = scored(pointing, {"VizWiz_val_00000001": "[0.0, 0.0, 1.0, 1.0]"})
    assert (metrics["iou"], metrics["accuracy_at_50"]) == (0.5, 1.0)


def test_videomme(tmp_path: Path) -> None:
    benchmark = VideoMme(path=made.videomme(tmp_path), frames=3)
    first = benchmark.samples[0]
    assert benchmark.prompt(first).splitlines()[1:3] == ["A. Apples.", "B. Candles."]
    frames = benchmark.load_video(first)
    assert frames.shape == (3, 10, 20, 3)
    assert np.array_equal(frames[-1], np.asarray(made.picture(5)))
    metrics = scored(benchmark, {"001-1": "C", "001-2": "The best answer is A"})
    assert metrics["accuracy_by_duration"] == {"short": 1.0, "long": 0.0}


def test_videos_are_decoded(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    made.videomme(tmp_path / "copy", frames=0)
    (tmp_path / "films").mkdir()
    with av.open(str(tmp_path / "films/fFjv93ACGo8.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 32, 16
        for level in range(0, 250, 25):
            pixels = np.full((16, 32, 3), level, dtype=np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode(None))
    benchmark = VideoMme(path=tmp_path / "copy", videos=tmp_path / "films", frames=4)
    frames = benchmark.load_video(benchmark.samples[0])
    assert frames.shape == (4, 16, 32, 3)
    assert frames.mean((1, 2, 3)) == pytest.approx([0, 75, 150, 225], abs=8)


def test_chair(tmp_path: Path) -> None:
    benchmark = Chair(path=made.chair(tmp_path))
    assert benchmark.samples[0].answer == "dining table, motorcycle, person"
    metrics = scored(benchmark, {"391895": "A man with two dogs rides a motorcycle. The dog barks at a bus."})
    # mentioned: person, dog, motorcycle, dog, bus; the dogs and the bus are not there
    assert metrics["chair_i"] == pytest.approx(3 / 5)
    assert metrics["chair_s"] == 1.0
    assert metrics["object_recall"] == pytest.approx(2 / 3)
    assert metrics["accuracy"] == pytest.approx(2 / 5)


def test_the_fingerprint_follows_the_questions(tmp_path: Path) -> None:
    before = Pope(path=made.pope(tmp_path / "one")).fingerprint
    assert Pope(path=made.pope(tmp_path / "two")).fingerprint == before
    rows = made.pope_rows()
    rows[1]["label"] = "yes"
    assert Pope(path=made.pope(tmp_path / "three", rows)).fingerprint != before
