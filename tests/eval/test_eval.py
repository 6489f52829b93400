from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.eval.conftest import Eval, read_predictions
from tests.eval.made import sample_rows, write_benchmark
from vprune import VPruneError
from vprune.eval.predictor import Predictor
from vprune.eval.results import load_run, load_runs

FILES = {"config.yaml", "predictions.jsonl", "metrics.json", "environment.json"}
CONTRACT = (
    "samples accuracy accuracy_stderr accuracy_by_kind tokens_before tokens_after retention "
    "method keep model benchmark seed seconds"
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_leaves_its_four_files_and_nothing_else(
    evaluate: Eval, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("method=random", "keep=0.25", "out=here") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here"]  # no outputs/, no multirun/
    assert set(contents(tmp_path / "here")) == FILES
    metrics = json.loads((tmp_path / "here/metrics.json").read_text())
    assert set(CONTRACT.split()) <= set(metrics)
    assert (metrics["samples"], metrics["failed"], metrics["retention"]) == (24, 0, None)
    assert (metrics["tokens_before"], metrics["tokens_after"]) == (36, 9)
    assert (metrics["method"], metrics["keep"], metrics["model"], metrics["benchmark"]) == (
        "random",
        0.25,
        "tiny",
        "made",
    )
    rows = read_predictions(tmp_path / "here")
    keys = ["id", "kind", "question", "answer", "prediction", "correct", "tokens_before", "tokens_after"]
    assert all(list(row) == keys for row in rows)
    kinds = [row["kind"] for row in rows]
    assert kinds == sorted(kinds, key=["exists", "colour", "list", "refer"].index)
    config = yaml.safe_load((tmp_path / "here/config.yaml").read_text())
    assert (config["method"]["name"], config["model"]["path"]) == ("random", str(model_folder))
    environment = json.loads((tmp_path / "here/environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["sessions"][0]["samples"] == 24
    out = capsys.readouterr().out
    assert "random" in out
    assert "9 of 36" in out


def test_full_counts_every_token_and_ignores_keep(evaluate: Eval, tmp_path: Path) -> None:
    assert evaluate("method=full", "keep=0.1", "recycle=grid") == 0
    run = load_run(tmp_path / "runs/tiny-made/full-1.0-max_new_tokens_6-batch_size_4")
    assert (run.metrics["keep"], run.metrics["tokens_before"], run.metrics["tokens_after"]) == (1.0, 36, 36)
    assert run.metrics["accuracy"] >= 0.25


def test_keeping_everything_changes_no_answer(evaluate: Eval, tmp_path: Path) -> None:
    assert evaluate("-m", "method=full,attention", "keep=1.0", "out=here") == 0
    full, attention = load_runs(tmp_path / "here")[::-1]
    assert [row["prediction"] for row in full.predictions] == [row["prediction"] for row in attention.predictions]
    assert attention.metrics["retention"] == 1.0


def test_a_sweep_gives_everyone_retention(evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("-m", "method=random,full,uniform", "keep=0.5,0.1", "out=swept", "limit=12") == 0
    runs = load_runs(tmp_path / "swept")
    assert len(runs) == 5
    full = next(run for run in runs if run.metrics["method"] == "full")
    assert full.metrics["accuracy"] > 0
    for run in runs:
        assert run.metrics["retention"] == pytest.approx(run.metrics["accuracy"] / full.metrics["accuracy"])
    assert capsys.readouterr().out.count("method") == 1  # one table


def test_retention_needs_the_same_samples(evaluate: Eval, tmp_path: Path) -> None:
    assert evaluate("method=full", "limit=12", "out=all/full") == 0
    assert evaluate("method=random", "limit=8", "out=all/fewer") == 0
    assert evaluate("method=random", "limit=12", "blank=true", "out=all/blank") == 0
    assert evaluate("method=random", "limit=12", "out=all/same") == 0
    retention = {run.folder.name: run.metrics["retention"] for run in load_runs(tmp_path / "all")}
    assert retention["fewer"] is None
    assert retention["blank"] is None
    assert retention["same"] is not None


def test_a_full_run_that_comes_later_counts_too(evaluate: Eval, tmp_path: Path) -> None:
    assert evaluate("method=random", "limit=8", "out=all/random") == 0
    assert load_run(tmp_path / "all/random").metrics["retention"] is None
    assert evaluate("method=full", "limit=8", "out=all/full") == 0
    assert all(run.metrics["retention"] is not None for run in load_runs(tmp_path / "all"))
    before = read_predictions(tmp_path / "all/random")
    assert evaluate("method=random", "limit=8", "out=all/random") == 0
    assert load_run(tmp_path / "all/random").metrics["retention"] is not None
    assert read_predictions(tmp_path / "all/random") == before


def test_what_will_take_long_on_a_cpu_is_said_at_the_start(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vprune.eval.run._MANY", 12)
    assert evaluate("method=full", "device=cpu", f"out={tmp_path / 'quick'}") == 0
    out = capsys.readouterr().out
    assert out.startswith("24 questions on a CPU; for a first look, limit=256 asks a draw of them\n")
    assert "minutes" not in out
    monkeypatch.setattr(Predictor, "take_seconds", lambda self: {"total": 60.0})
    assert evaluate("method=full", "limit=20", "device=cpu", f"out={tmp_path / 'slow'}") == 0
    out = capsys.readouterr().out
    assert out.startswith("full 1.0: about 4 minutes to go\n")
    assert out.count("minutes") == 1


def test_a_run_began_with_its_first_batch_not_after_it(
    evaluate: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predictor, "take_seconds", lambda self: {"total": 3600.0})
    now = time.time()
    assert evaluate("method=full", "limit=4", "out=here") == 0
    (session,) = json.loads((tmp_path / "here/environment.json").read_text())["sessions"]
    began = time.mktime(time.strptime(session["started"][:19], "%Y-%m-%dT%H:%M:%S"))
    assert now - 3602 < began < time.time() - 3598


def test_a_finished_run_is_shown_not_repeated(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("method=random", "limit=8", "out=here") == 0
    before = contents(tmp_path / "here")
    capsys.readouterr()
    monkeypatch.setattr(
        "vprune.eval.engines.local.load_model", cache(lambda choice: pytest.fail("the model was loaded again"))
    )
    assert evaluate("method=random", "limit=8", "out=here") == 0
    out = capsys.readouterr().out
    assert "finished" in out
    assert "random" in out
    assert contents(tmp_path / "here") == before


def test_another_configuration_is_refused_and_nothing_lost(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("method=random", "limit=8", "out=here") == 0
    before = contents(tmp_path / "here")
    assert evaluate("method=random", "limit=8", "keep=0.7", "out=here") == 2
    error = capsys.readouterr().err
    assert "keep: 0.1 there, 0.7 here" in error
    assert "overwrite=true" in error
    assert contents(tmp_path / "here") == before
    assert evaluate("method=random", "limit=8", "keep=99", "out=here", "overwrite=true") == 2
    assert contents(tmp_path / "here") == before
    assert evaluate("method=random", "limit=8", "keep=0.7", "out=here", "overwrite=true") == 0
    assert load_run(tmp_path / "here").metrics["keep"] == 0.7


def test_samples_that_changed_are_noticed(evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_benchmark(tmp_path / "mine", sample_rows())
    assert evaluate("method=random", "out=here", benchmark=made) == 0
    (made / "samples.jsonl").write_text((made / "samples.jsonl").read_text().replace("yes", "no"))
    assert evaluate("method=random", "out=here", benchmark=made) == 2
    assert "fingerprint.benchmark" in capsys.readouterr().err


def test_too_many_tokens_are_refused_before_anything_is_written(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("method=random", "keep=2880", "out=here") == 2
    assert "keep=2880 but the image has 36 visual tokens" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["method=attention", "keep=37"], "keep=37 but the image has 36 visual tokens (6 x 6); give at most 36"),
        (["method=random", "stages=[[0,36],[1,40]]"], "keep=40 but the image has 36"),
        (["method=random", "layer=3"], "layer=3: the decoder has layers 0 to 2"),
        (["method=attention", "layer=-4"], "layer=-4: the decoder has layers 0 to 2"),
        (["method=attention", "stages=[1,3]"], "layer=3: the decoder has layers 0 to 2"),
    ],
)
def test_what_the_config_of_the_model_tells_is_refused_without_the_model(
    evaluate: Eval,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(
        "vprune.eval.engines.local.load_model", cache(lambda choice: pytest.fail("the model was loaded"))
    )
    assert evaluate(*words, "out=here") == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("keep", ["0", "1.5", "-3", "0.0", "half"])
def test_a_bad_keep_is_refused(evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: str) -> None:
    assert evaluate("method=random", f"keep={keep}") == 2
    assert f"keep={keep}" in capsys.readouterr().err.replace("'", "")
    assert not list(tmp_path.iterdir())


def test_blank_images_are_told(evaluate: Eval, tmp_path: Path) -> None:
    assert evaluate("method=full", "blank=true", "out=here") == 0
    run = load_run(tmp_path / "here")
    assert run.metrics["blank"] is True
    assert run.config["blank"] is True
    by_question: dict[Any, set[Any]] = {}
    for row in run.predictions:
        by_question.setdefault(row["question"], set()).add(row["prediction"])
    assert all(len(answers) == 1 for answers in by_question.values())


def test_the_oracle_reads_the_annotation(evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("method=oracle", "keep=0.25", "out=here") == 0
    assert load_run(tmp_path / "here").metrics["tokens_after"] == 9
    bare = write_benchmark(tmp_path / "bare", [{**row, "evidence": []} for row in sample_rows()])
    (bare / "objects.json").unlink()
    assert evaluate("method=oracle", "keep=0.25", benchmark=bare) == 2
    assert "objects.json" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the model fail on the samples whose id is given."""

    def arrange(name: str) -> None:
        answer = Predictor.answer

        def fail(self: Predictor, prepared: Any) -> Any:
            if any(sample.id == name for sample in prepared.samples):
                raise RuntimeError("out of luck")
            return answer(self, prepared)

        monkeypatch.setattr(Predictor, "answer", fail)

    return arrange


def test_a_sample_that_fails_is_named_and_the_others_count(
    evaluate: Eval, tmp_path: Path, failing: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing("s5")
    assert evaluate("method=random", "out=here") == 1
    assert "sample 's5' failed: RuntimeError: out of luck" in capsys.readouterr().err
    run = load_run(tmp_path / "here")
    assert (run.metrics["samples"], run.metrics["failed"]) == (24, 1)
    (failed,) = [row for row in run.predictions if "error" in row]
    assert (failed["id"], failed["correct"], failed["tokens_after"]) == ("s5", 0.0, None)
    assert evaluate("method=random", "out=here") == 1


def test_a_fault_of_every_sample_is_no_sample_s(
    evaluate: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Predictor, prepared: Any) -> Any:
        raise RuntimeError("no luck at all")

    monkeypatch.setattr(Predictor, "answer", fail)
    with pytest.raises(RuntimeError, match="no luck at all"):
        evaluate("method=random", "out=here")
    assert not (tmp_path / "here").exists()


def test_one_bad_run_of_a_sweep_leaves_the_others(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("-m", "method=random", "keep=0.5,99", "out=here", "limit=8") == 2
    captured = capsys.readouterr()
    assert "keep=99 but the image has 36" in captured.err
    assert "0.5" in captured.out
    assert [run.metrics["keep"] for run in load_runs(tmp_path / "here")] == [0.5]


def test_a_corrupt_image_stops_the_run_and_keeps_what_is_written(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_benchmark(tmp_path / "mine", sample_rows())
    image = made / "images/3.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])  # its header is fine; only refer asks about it
    assert evaluate("method=random", "out=here", "batch_size=1", benchmark=made) == 2
    assert "3.png cannot be decoded" in capsys.readouterr().err
    assert len(read_predictions(tmp_path / "here")) >= 8
    image.write_bytes(whole)


def test_a_model_that_is_none_is_told(evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert evaluate("method=full", model=tmp_path / "empty") == 2
    assert "holds no config.json" in capsys.readouterr().err
    (tmp_path / "empty/config.json").write_text('{"model_type": "bert"}')
    assert evaluate("method=full", model=tmp_path / "empty") == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert evaluate("method=full", model="nobody/nothing") == 2
    assert "model=nobody/nothing is not in the cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("offline", "cached", "told"),
    [
        (True, (), r"is not in the cache \(.*hub\), and the hub does not answer \(HF_HUB_OFFLINE is set\): either"),
        (False, (), r"\(no network\?\): either the id is wrong or the network is missing\. Check how it is spelt, co"),
        (False, (), r"connect, or give a folder that holds the model: model=FOLDER$"),
        (False, ("owner/neam", "other/model"), r"spelt \(did you mean owner/neam, which is cached\?\), connect"),
        (False, ("owner/name",), r"cannot be loaded: .* \(The hub does not answer, no network\?; its copy in .* was"),
    ],
)
def test_a_hub_that_does_not_answer_is_told_from_a_wrong_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, cached: tuple[str, ...], told: str
) -> None:
    from huggingface_hub import HfApi, constants

    from vprune.eval.models import ModelChoice, load

    def silence(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    for name in cached:
        (tmp_path / "hub" / f"models--{name.replace('/', '--')}").mkdir(parents=True)
    monkeypatch.setattr(HfApi, "model_info", silence)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(VPruneError, match=f"^model=owner/name .*{told}"):
        load(ModelChoice("owner/name"))


def test_a_folder_that_cannot_be_written_is_told(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert evaluate("method=full", "out=file") == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert evaluate("method=full", "out=file/below") == 2
    assert "cannot be written" in capsys.readouterr().err
