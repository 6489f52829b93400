"""LVIS, COCO, CODA and RefCOCO read from small copies in their published layouts, asked and scored."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.json_files import change
from tests.segmentation.made import scene
from tests.segmentation.made_published import MADE, made_coco, made_lvis, made_refs, perfect, rle_of, segmented
from vprune.cli import main
from vprune.errors import VPruneError
from vprune.segmentation.coco import Coco, Coda
from vprune.segmentation.finished import score_annotations
from vprune.segmentation.instances import read_instances
from vprune.segmentation.lvis import Lvis
from vprune.segmentation.refcoco import RefCoco


@pytest.mark.parametrize("name", MADE)
def test_the_command_runs_on_a_folder(name: str, tmp_path: Path) -> None:
    root = MADE[name](tmp_path / name)
    given = [f"benchmark={name}", f"benchmark.path={root}", "method=full", f"out={tmp_path / 'run'}", "device=cpu"]
    given.append("benchmark.recipe={max_new_tokens: 24}")
    assert main(["eval", *given]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["samples"] == 1 and metrics["failed"] == 0 and metrics["benchmark"] == name
    told = {
        "coco": {"ap", "ar100"},
        "lvis": {"ap", "ap_r", "ap_c", "ap_f", "fixed_ap"},
        "coda": {"ar100", "corner_ar100"},
        "refcoco": {"oiou", "miou", "precision_at_50"},
    }
    assert told[name] <= set(metrics) and metrics["score"] == metrics[metrics["score_name"]]
    assert metrics["accuracy"] > 0


# -- layouts --------------------------------------------------------------------------------------------------------


def test_every_layout_is_read_and_perfect_results_score_one(tmp_path: Path) -> None:
    images = (0, 1)
    for name, kind in (("coco", Coco), ("lvis", Lvis), ("coda", Coda)):
        benchmark = kind(path=MADE[name](tmp_path / name, images))
        assert [sample.id for sample in benchmark.samples] == ["10", "11"]
        assert benchmark.load_image(benchmark.samples[1]).size == scene(1)[0].size
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(perfect(benchmark)))
        figures = score_annotations(benchmark, file)
        assert figures["score"] == pytest.approx(1)
        file.write_text("[]")
        assert score_annotations(benchmark, file)["score"] == 0
        rows = [{"id": sample.id, "prediction": ""} for sample in benchmark.samples[:1]]
        assert benchmark.metrics(rows)["score"] == 0 and benchmark.score(benchmark.samples[0], "") == 0


def test_files_named_themselves_and_folders_of_images(tmp_path: Path) -> None:
    made_coco(tmp_path / "coco")
    file = tmp_path / "coco/annotations/instances_val2017.json"
    assert len(Coco(path=file).samples) == 1
    (tmp_path / "coco/val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(VPruneError, match=r"images, row 1: image .* does not exist; .*benchmark\.images=FOLDER"):
        Coco(path=file)
    benchmark = Coco(path=file, images=tmp_path / "elsewhere", iou="bbox", classes=False)
    assert benchmark.metrics([{"id": "10", "prediction": None}])["classes"] is False
    made_lvis(tmp_path / "lvis")
    (tmp_path / "lvis/lvis_v1_val.json").rename(tmp_path / "lvis/lvis_v1_minival.json")
    assert len(Lvis(path=tmp_path / "lvis", split="minival", images=tmp_path / "elsewhere").samples) == 1
    before = benchmark.fingerprint
    change(file, "annotations", 0, "area", to=5)
    assert Coco(path=file, images=tmp_path / "elsewhere", iou="bbox").fingerprint != before


def test_an_image_keeps_the_pixels_that_are_annotated(tmp_path: Path) -> None:
    made_coco(tmp_path)
    turned = Image.new("RGB", (384, 384), "white")
    turned.paste("black", (0, 0, 384, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "val2017/000000000000.jpg", exif=exif)
    benchmark = Coco(path=tmp_path)
    assert np.asarray(benchmark.load_image(benchmark.samples[0]))[:90].max() < 30


def test_polygons_and_plain_run_lengths(tmp_path: Path) -> None:
    made_coco(tmp_path)
    file = tmp_path / "annotations/instances_val2017.json"
    polygon, runs = [[10, 10, 50, 10, 50, 30, 10, 30]], {"size": [384, 384], "counts": [384 * 384 - 40, 40]}
    change(file, "annotations", 0, "segmentation", to=polygon)
    change(file, "annotations", 1, "segmentation", to=runs)
    read = read_instances(file)
    assert [int(coco_mask.area(read.rle(read.annotations[number]))) for number in (1, 2)] == [800, 40]


def test_categories_come_from_names(tmp_path: Path) -> None:
    benchmark = Coco(path=made_coco(tmp_path))
    label = benchmark._labels("cpu")
    assert label is not None
    names = [one["name"].replace("_", " ") for one in benchmark.instances.categories.values()]
    assert list(label(names)) == list(benchmark.instances.categories) and list(label([])) == []


# -- expressions ----------------------------------------------------------------------------------------------------


def test_expressions_by_hand(tmp_path: Path) -> None:
    benchmark = RefCoco(path=made_refs(tmp_path))
    (sample,) = benchmark.samples
    assert (sample.id, sample.kind, benchmark.prompt(sample)) == ("100", "refer", scene(0)[2][0])
    other = RefCoco(path=tmp_path / "refcoco", split="testA", images=tmp_path / "train2014")
    assert [one.id for one in other.samples] == ["101"]
    truth = benchmark.truth(sample)
    half = truth & (np.cumsum(truth).reshape(truth.shape) <= truth.sum() // 2)
    said = json.dumps([{"segmentation": rle_of(half)}])
    assert benchmark.score(sample, said) == pytest.approx(half.sum() / truth.sum())
    figures = benchmark.figures([(1, 4), (3, 4), (0, 0), (0, 12)])
    assert (figures["miou"], figures["oiou"]) == (pytest.approx(0.25), pytest.approx(4 / 20))
    assert (figures["precision_at_50"], figures["precision_at_80"], figures["empty_union"]) == (0.25, 0, 0)
    benchmark.empty_union = 1.0
    figures = benchmark.figures([(1, 4), (3, 4), (0, 0), (0, 12)])
    assert (figures["miou"], figures["oiou"]) == (pytest.approx(0.5), pytest.approx(4 / 20))
    assert (benchmark.figures([(0, 0)])["oiou"], benchmark.figures([])) == (1, {})
    file = tmp_path / "found.json"
    for found, iou in ((rle_of(truth), 1), (None, 0)):
        file.write_text(json.dumps([{"sent_id": 100, "segmentation": found}]))
        assert score_annotations(benchmark, file)["oiou"] == iou


def test_an_empty_object_counts_as_asked(tmp_path: Path) -> None:
    made_refs(tmp_path)
    empty = {"size": [384, 384], "counts": [384 * 384]}
    change(tmp_path / "refcoco/instances.json", "annotations", 0, "segmentation", to=empty)
    for counted in (0.0, 1.0):
        benchmark = RefCoco(path=tmp_path, empty_union=counted)
        assert benchmark.score(benchmark.samples[0], "[]") == counted
        metrics = benchmark.metrics([{"id": "100", "prediction": "[]"}])
        assert (metrics["miou"], metrics["oiou"], metrics["empty_union"]) == (counted, counted, counted)


def test_the_other_data_sets_and_json(tmp_path: Path) -> None:
    made_refs(tmp_path, "refcocog", "umd")
    file = tmp_path / "refcocog/refs(umd).p"
    assert len(RefCoco(path=tmp_path, dataset="refcocog").samples) == 1
    file.with_suffix(".json").write_text(json.dumps(pickle.loads(file.read_bytes())))
    file.unlink()
    assert len(RefCoco(path=tmp_path, dataset="refcocog").samples) == 1
    with pytest.raises(VPruneError, match=r"holds none of refs\(google\)\.p"):
        RefCoco(path=tmp_path, dataset="refcocog", split_by="google")
    with pytest.raises(VPruneError, match=r"split_by=umd: refcoco\+ is split by unc"):
        RefCoco(path=tmp_path, dataset="refcoco+", split_by="umd")
    with pytest.raises(VPruneError, match=r"dataset=refcoco2 is unknown"):
        RefCoco(path=tmp_path, dataset="refcoco2")


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    made_refs(tmp_path)
    file = tmp_path / "refcoco/refs(unc).p"
    file.write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(VPruneError, match=r"refs\(unc\)\.p cannot be read as a pickle .*pathlib"):
        RefCoco(path=tmp_path)
    file.write_bytes(b"no pickle")
    with pytest.raises(VPruneError, match=r"cannot be read as a pickle"):
        RefCoco(path=tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("coco", Coco), ("lvis", Lvis), ("coda", Coda)])
def test_a_finished_annotations_json_is_scored(name: str, kind: type[Coco], tmp_path: Path) -> None:
    benchmark = kind(path=MADE[name](tmp_path / name))
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(segmented(benchmark)))
    assert score_annotations(benchmark, file)["score"] == pytest.approx(1)
