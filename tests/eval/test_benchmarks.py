from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.eval.made import SIDE, sample_rows, write_benchmark, write_samples
from vprune import VPruneError
from vprune.eval.batches import draw, form
from vprune.eval.benchmarks.folder import Folder
from vprune.eval.benchmarks.scenes import Scenes
from vprune.eval.benchmarks.scenes_fresh import ScenesFresh
from vprune.eval.scenes.world import KINDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_benchmark(tmp_path / "made", sample_rows())


def test_samples_are_read_and_scored_by_kind(folder: Path) -> None:
    benchmark = Folder(folder)
    assert benchmark.name == "made"
    exists, colour, listing, refer = benchmark.samples[:4]
    assert benchmark.load_image(exists).size == (SIDE, SIDE)
    assert benchmark.prompt(colour) == "what is the number of the square ?"
    assert benchmark.score(exists, "Yes.") == 1.0
    assert benchmark.score(listing, "red circle") == pytest.approx(2 / 3)
    assert benchmark.score(refer, "x00 y01") == 1.0
    assert benchmark.score(refer, "x05 y05") == 0.0


def test_evidence_becomes_a_mask(folder: Path) -> None:
    benchmark = Folder(folder)
    assert benchmark.has_evidence
    mask = benchmark.evidence_mask(benchmark.samples[1])
    assert mask is not None
    assert mask.shape == (SIDE, SIDE)
    assert mask.sum() == 8 * 9
    nothing = benchmark.evidence_mask(benchmark.samples[0])
    assert nothing is not None
    assert not nothing.any()


def test_uncompressed_masks_are_read_too(folder: Path) -> None:
    content = json.loads((folder / "objects.json").read_text())
    content["annotations"][1]["segmentation"]["counts"] = [0, 5, SIDE * SIDE - 5]
    (folder / "objects.json").write_text(json.dumps(content))
    benchmark = Folder(folder)
    mask = benchmark.evidence_mask(benchmark.samples[1])
    assert mask is not None
    assert mask.sum() == 5


def test_the_template_wraps_the_question(folder: Path) -> None:
    benchmark = Folder(folder, template="{question} Answer with one word.")
    assert benchmark.prompt(benchmark.samples[0]) == "is the circle red ? Answer with one word."
    with pytest.raises(VPruneError, match="never names"):
        Folder(folder, template="Answer.")


def test_the_fingerprint_follows_the_samples(folder: Path) -> None:
    before = Folder(folder).fingerprint
    assert Folder(folder).fingerprint == before
    rows = sample_rows()
    rows[0]["answer"] = "no"
    write_samples(folder, rows)
    assert Folder(folder).fingerprint != before


def change(index: int, **values: Any) -> list[dict[str, Any]]:
    rows = sample_rows()
    for key, value in values.items():
        if value is None:
            del rows[index][key]
        else:
            rows[index][key] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (change(2, question="  "), r"line 3: 'question' is empty"),
        (change(2, question=None), r"line 3: 'question' is missing"),
        (change(2, question=7), r"line 3: 'question' should be text, got 7"),
        (change(1, image="images/9.png"), r"line 2: image .*9\.png does not exist"),
        (change(1, image="../secret.png"), r"line 2: image .* lies outside"),
        (change(5, id="s1"), r"line 6: id 's1' was given in line 2"),
        (change(1, evidence=[99]), r"line 2: evidence \[99\] is not annotated"),
        (change(1, evidence="all"), r"line 2: 'evidence' should be a list"),
        (change(3, box=None), r"line 4: kind 'refer' needs a box"),
        (change(3, box=[5, 5, 1, 1]), r"line 4: 'box' should be"),
        ([], r"holds no samples"),
    ],
)
def test_a_bad_sample_is_named_with_its_line(folder: Path, rows: list[dict[str, Any]], message: str) -> None:
    write_samples(folder, rows)
    with pytest.raises(VPruneError, match=message) as caught:
        Folder(folder)
    assert "samples.jsonl" in str(caught.value)


@pytest.mark.parametrize("line", ["{broken", '["a", "list"]', '{"id": "x"', b"\xff\xfe".decode("latin-1")])
def test_a_broken_line_is_named(folder: Path, line: str) -> None:
    with (folder / "samples.jsonl").open("a") as file:
        file.write("\n" + line + "\n")
    with pytest.raises(VPruneError, match=r"samples\.jsonl, line 14"):
        Folder(folder)


def test_a_bad_image_is_found_before_anything_runs(folder: Path) -> None:
    (folder / "images/2.png").write_bytes(b"no image")
    with pytest.raises(VPruneError, match=r"line 3: .*2\.png is not an image"):
        Folder(folder)
    Image.new("1", (12_000, 10_000)).save(folder / "images/2.png")
    with pytest.raises(VPruneError, match=r"line 3: .*120 megapixels"):
        Folder(folder)


def test_scenes_know_their_kinds(folder: Path) -> None:
    assert Scenes(folder).name == "scenes"
    write_samples(folder, change(2, kind="smell"))
    with pytest.raises(VPruneError, match=r"line 3: unknown kind 'smell'; there are exists, colour"):
        Scenes(folder)
    assert Folder(folder).samples[2].kind == "smell"


@pytest.mark.parametrize("content", ["[]", "{", '{"images": [], "annotations": [{"id": 1}]}'])
def test_objects_that_are_no_coco_are_refused(folder: Path, content: str) -> None:
    (folder / "objects.json").write_text(content)
    with pytest.raises(VPruneError, match=r"objects\.json is not a COCO"):
        Folder(folder)


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VPruneError, match=r"has no samples\.jsonl"):
        Folder(tmp_path)
    with pytest.raises(VPruneError, match="does not exist"):
        Folder(tmp_path / "nowhere")


def test_a_fresh_split_is_drawn_once(tmp_path: Path) -> None:
    fresh = ScenesFresh(tmp_path / "cache", seed=1, images=2)
    assert len({sample.image for sample in fresh.samples}) == 2
    assert all(fresh.score(sample, sample.answer) == 1.0 for sample in fresh.samples)
    (drawn,) = (tmp_path / "cache").iterdir()
    written = (drawn / "samples.jsonl").stat().st_mtime_ns
    assert ScenesFresh(tmp_path / "cache", seed=1, images=2).fingerprint == fresh.fingerprint
    assert (drawn / "samples.jsonl").stat().st_mtime_ns == written
    assert ScenesFresh(tmp_path / "cache", seed=2, images=2).fingerprint != fresh.fingerprint


@pytest.mark.parametrize("options", [{"seed": -1}, {"images": 0}, {"images": "few"}, {"photographs": "mine"}])
def test_a_fresh_split_that_cannot_be_drawn_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(VPruneError, match=f"benchmark.{next(iter(options))}="):
        ScenesFresh(tmp_path, **options)


def test_the_shipped_split_is_whole() -> None:
    scenes = Scenes()
    assert len(scenes.samples) >= 3000
    assert {sample.kind for sample in scenes.samples} == set(KINDS)
    assert all(scenes.score(sample, sample.answer) == 1.0 for sample in scenes.samples)
    masks = [scenes.evidence_mask(sample) for sample in scenes.samples[:50]]
    assert all(
        mask is not None and mask.any() for mask, sample in zip(masks, scenes.samples, strict=False) if sample.evidence
    )


def test_a_draw_keeps_the_shares_of_the_kinds(folder: Path) -> None:
    samples = Folder(folder).samples
    drawn = draw(samples, 8, seed=0)
    assert [sample.kind for sample in drawn].count("list") == 2
    assert drawn == draw(samples, 8, seed=0)
    assert drawn != draw(samples, 8, seed=1)
    assert [s.id for s in drawn] == [s.id for s in samples if s in drawn]
    assert draw(samples, 99, seed=0) == list(samples)
    assert draw(samples, None, seed=0) == list(samples)


def test_batches_hold_one_kind_each_and_every_sample_once(folder: Path) -> None:
    samples = Folder(folder).samples
    batches = form(samples, 2)
    assert all(len({sample.kind for sample in batch}) == 1 for batch in batches)
    assert [len(batch) for batch in batches] == [2, 1] * 4
    assert sorted(s.id for batch in batches for s in batch) == sorted(s.id for s in samples)
