from __future__ import annotations

from pathlib import Path

import pytest

from vprune import VPruneError, load_method
from vprune.eval.options import entries
from vprune.eval.reporting.variants import variant
from vprune.eval.settings import PRUNING_OPTIONS, read_jobs
from vprune.method_files import read_method

ROOT = Path(__file__).parents[2]


def folders(*overrides: str, sweep: bool = False) -> list[str]:
    return [str(job.folder) for job in read_jobs(overrides, sweep)]


@pytest.mark.parametrize("method", entries("method"))
def test_every_method_composes(method: str) -> None:
    (job,) = read_jobs([f"method={method}"])
    assert job.method == method
    assert job.config["keep"] is not None


@pytest.mark.parametrize("engine", entries("engine"))
def test_every_engine_composes(engine: str) -> None:
    (job,) = read_jobs([f"engine={engine}"])
    assert job.model_choice.attention == job.config["engine"]["attention"]


def test_the_folder_follows_from_the_configuration() -> None:
    assert folders("method=random", "keep=0.5") == ["runs/embedded-scenes/random-0.5"]
    assert folders("method=full", "keep=0.5", "recycle=grid") == ["runs/embedded-scenes/full-1.0"]
    assert folders("method=random", "keep=57", "limit=9", "seed=3", "blank=true") == [
        "runs/embedded-scenes-limit_9-seed_3-blank/random-57"
    ]
    assert folders("keep=0.5", "recycle=grid", "size_aware=true") == [
        "runs/embedded-scenes/learned-0.5-recycle_grid-size_aware_true"
    ]
    assert folders("out=here/it is") == ["here/it is"]


def test_a_sweep_runs_full_first_and_once() -> None:
    swept = folders("method=random,full", "keep=0.5,0.25", sweep=True)
    assert [Path(folder).name for folder in swept] == ["full-1.0", "random-0.5", "random-0.25"]
    assert folders("method=full,random", "out=there", "keep=3", sweep=True) == ["there/full-1.0", "there/random-3"]


def test_a_sweep_over_samples_gets_a_folder_for_each_task() -> None:
    swept = folders("method=full,random", "keep=0.5", "seed=0,1", "limit=5", "out=there", sweep=True)
    assert sorted(swept) == sorted(
        f"there/embedded-scenes-limit_5{seed}/{run}" for seed in ("", "-seed_1") for run in ("full-1.0", "random-0.5")
    )


def test_options_reach_the_method() -> None:
    (job,) = read_jobs(["method=attention", "keep=0.5", "layer=1", "method.scorer.pool=max", "seed=3"])
    assert job.method_options == {"keep": 0.5, "layer": 1, "pool": "max", "seed": 3}
    assert job.config["method"]["scorer"]["layer"] == 1
    (job,) = read_jobs(["method=random"])
    assert job.method_options == {"keep": 0.1, "seed": 0}


def test_a_file_may_be_a_variation_of_a_method(tmp_path: Path) -> None:
    """`name:` says of which: runs are called by it, and what they have otherwise is told as if it had been given."""
    file = tmp_path / "mine.yaml"
    text = (ROOT / "conf" / "method" / "learned.yaml").read_text(encoding="utf-8")
    file.write_text(text.replace("size_aware: true", "size_aware: false\nname: learned\nbudget: question"))
    swept = read_jobs([f"method=learned,{file}", "keep=0.5"], sweep=True)
    assert [(job.method, job.folder.name) for job in swept] == [("learned", "learned-0.5"), ("learned", "mine-0.5")]
    plain, varied = (job.config for job in swept)
    told = {key: value for key, value in varied.items() if value != plain[key] and key != "method"}
    assert told == {"size_aware": False, "budget": "question"}
    assert variant(plain, [plain, varied]) == ""
    assert sorted(variant(varied, [plain, varied]).split(", ")) == ["budget question", "not size-aware"]
    (given,) = read_jobs([f"method={file}", "budget=image"])
    assert (given.config["budget"], given.method_options["budget"]) == ("image", "image")
    file.write_text(text + "name: full\n")
    with pytest.raises(VPruneError, match=r"mine\.yaml: name: full is no method .* or leave it out"):
        read_jobs([f"method={file}"])
    file = file.rename(tmp_path / "full.yaml")
    file.write_text(text)
    with pytest.raises(VPruneError, match=r"full\.yaml: full is the model without pruning .* call the file otherwise"):
        read_jobs([f"method={file}"])


@pytest.mark.parametrize("file", sorted((ROOT / "assets" / "methods").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_variation_is_its_method_but_for_its_options(file: Path) -> None:
    own = read_method(str(file))
    plain = read_method(own.pop("name"))
    assert {key for key, value in own.items() if value != plain.get(key)} <= set(PRUNING_OPTIONS)
    assert load_method(str(file), keep=0.2).keep == 0.2


def test_a_model_may_be_an_entry_a_hub_id_or_a_folder(tmp_path: Path) -> None:
    (job,) = read_jobs(["model=some-org/some_model-1.5", "model.revision=main"])
    assert (job.model_choice.path, job.model_choice.revision) == ("some-org/some_model-1.5", "main")
    assert job.config["model"]["name"] == "some-org/some_model-1.5"
    assert not job.model_choice.trust_remote_code
    strange = tmp_path / "my = model, (1)"
    strange.mkdir()
    (job,) = read_jobs([f"model={strange}"])
    assert job.model_choice.path == str(strange)
    assert job.config["model"]["name"] == strange.name


def test_a_benchmark_may_be_a_folder(tmp_path: Path) -> None:
    (job,) = read_jobs([f"benchmark={tmp_path}", "benchmark.template='{question} Briefly.'"])
    assert job.config["benchmark"]["path"] == str(tmp_path)
    assert job.config["benchmark"]["template"] == "{question} Briefly."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=attentoin", r"method=attentoin is unknown \(did you mean attention\?\); there is attention, "),
        ("model=embeded", r"model=embeded is unknown \(did you mean embedded\?\).*local folder, a hub id"),
        ("model=./nowhere", r"model=\./nowhere is unknown; there is embedded, hf, a local folder, a hub id"),
        ("+bugdet=sample", r"there is no option 'bugdet' \(did you mean budget\?\)"),
        ("benchmark=nowhere", r"benchmark=nowhere is unknown; there is chair, .*folder, .*scenes.*samples\.jsonl"),
        ("benchmark=", r"benchmark= is unknown"),
        ("engine=locl", r"did you mean local"),
        ("kep=0.1", r"there is no option 'kep' \(did you mean keep\?\); there is .*keep, layer"),
        ("metod=full", r"did you mean method\?"),
        ("method.foo=1", r"there is no option 'method\.foo'.*method\.keep"),
        ("keep", r"'keep' is not an override of the form key=value; did you mean keep=VALUE\?"),
        ("keep=[", r"is not an override of the form key=value"),
        ("keep=0.5,0.1", r"keep=0\.5,0\.1 names several values; add -m"),
        ("~limit", r"nothing can be taken out"),
        ("limit=0", r"limit=0: expected an integer >= 1 or null"),
        ("limit=many", r"limit=many: expected"),
        ("seed=-1", r"seed=-1: expected an integer >= 0"),
        ("batch_size=0", r"batch_size=0: expected"),
        ("batch_size=2.5", r"batch_size=2\.5: expected"),
        ("max_new_tokens=true", r"max_new_tokens=True: expected"),
        ("blank=perhaps", r"blank=perhaps: say true or false"),
        ("dtype=int8", r"dtype=int8 is unknown; there is auto, float32"),
        ("model=hf", r"incomplete or wrong: .*Missing mandatory value: model\.path"),
    ],
)
def test_a_mistake_is_told_with_what_there_is(override: str, message: str) -> None:
    with pytest.raises(VPruneError, match=message):
        read_jobs([override])


def test_a_sweep_cannot_write_two_runs_into_one_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "same").mkdir(parents=True)
    with pytest.raises(VPruneError, match="would share the folder"):
        read_jobs([f"benchmark={tmp_path}/a/same,{tmp_path}/b/same"], sweep=True)


def test_a_missing_value_is_named_as_it_is_typed() -> None:
    with pytest.raises(VPruneError, match=r"add benchmark\.path=\.\.\. to the command"):
        read_jobs(["benchmark=folder"])
