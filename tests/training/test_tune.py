"""`vprune tune`: one seed, one search; a YAML that `method=` takes; mistakes told before a model is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import vprune
from tests.conftest import build_model
from tests.eval.made import sample_rows, write_benchmark
from vprune.cli import main
from vprune.models import masks
from vprune.pruner import load_method
from vprune.training import tuner

Tune = Callable[..., Path]
TRIALS = 12  # two more than are drawn at random, so that the Gaussian process has a say


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("benchmarks") / "made", sample_rows(8))


@pytest.fixture(scope="module")
def tune(tiny_folder: Path, benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Tune:
    """Run `vprune tune` into a new folder, which is returned."""

    def run(*words: str, code: int = 0) -> Path:
        out = tmp_path_factory.mktemp("tuned")
        given = [f"model={tiny_folder}", f"benchmark={benchmark}", f"out={out}", "keep=0.3", "samples=3", "device=cpu"]
        assert main(["tune", *given, *words]) == code
        return out

    return run


@pytest.fixture(scope="module")
def tuned(tune: Tune) -> Path:
    return tune(f"trials={TRIALS}")


def trials_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_the_same_seed_searches_the_same(tune: Tune, tuned: Path) -> None:
    again, other = tune(f"trials={TRIALS}"), tune("trials=2", "seed=1")
    name = "vflowopt_tuned.yaml"
    assert (again / name).read_text() == (tuned / name).read_text()
    assert trials_of(again) == trials_of(tuned) and len(trials_of(tuned)) == TRIALS
    assert trials_of(other)[1] != trials_of(tuned)[1]


def test_the_best_setting_is_written_and_the_methods_own_came_first(tuned: Path) -> None:
    trials, text = trials_of(tuned), (tuned / "vflowopt_tuned.yaml").read_text()
    own, best = load_method("vflowopt"), max(trials, key=lambda trial: trial["flow"])
    assert trials[0]["first"] == own.first and trials[0]["threshold"] == own.scorer.threshold
    assert best["flow"] >= trials[0]["flow"] and all(-1 <= trial["flow"] <= 1 for trial in trials)
    assert f"Last-token flow {best['flow']:.6f} (trial {best['trial']}); {trials[0]['flow']:.6f} before." in text
    assert "keep=0.3: 12 settings tried on 3 samples, seed 0." in text
    method = load_method(str(tuned / "vflowopt_tuned.yaml"))
    assert (method.keep, method.first, method.cells) == (0.3, best["first"], best["cells"])
    assert method.scorer.alpha == best["alpha"] and method.scorer.threshold == best["threshold"]
    assert (method.recycle, method.size_aware) == (best["recycle"], best["size_aware"])


def test_ways_of_recycling_are_searched_unless_they_are_fixed(tune: Tune, tuned: Path) -> None:
    trials, own = trials_of(tuned), load_method("vflowopt")
    assert (trials[0]["recycle"], trials[0]["size_aware"]) == (own.recycle, own.size_aware)
    assert len({trial["recycle"] for trial in trials}) > 2 and len({trial["size_aware"] for trial in trials}) == 2
    sized = tune(f"trials={TRIALS}", "recycle=nearest")
    assert all("recycle" not in trial for trial in trials_of(sized))
    assert {trial["size_aware"] for trial in trials_of(sized)} == {False, True}
    fixed = tune("trials=3", "recycle=anchors", "size_aware=true")
    assert not any({"recycle", "size_aware"} & set(trial) for trial in trials_of(fixed))
    method = load_method(str(fixed / "vflowopt_tuned.yaml"))
    assert (method.recycle, method.size_aware) == ("anchors", True)
    assert load_method(str(sized / "vflowopt_tuned.yaml")).recycle == "nearest"
    begun = tune("trials=4", "method.recycle=none", "seed=1")
    ways = [trial["recycle"] for trial in trials_of(begun)]
    assert ways[0] == "none" and len(set(ways)) > 1


def test_sizes_are_not_searched_where_attention_takes_none(
    tune: Tune, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "takes_bias", lambda backend: False)
    out = tune("trials=8")
    assert all("size_aware" not in trial for trial in trials_of(out))
    assert load_method(str(out / "vflowopt_tuned.yaml")).size_aware is False
    assert "size_aware=false in all settings: sdpa takes no additive mask" in capsys.readouterr().out


def test_what_the_file_leaves_to_its_class_is_written_beside_the_rest(tmp_path: Path) -> None:
    scorer = {"_target_": "vprune.scoring.vflow.VisualFlow", "threshold": 1.0, "alpha": 0.0}
    brief = {"_target_": "vprune.progressive.Progressive", "scorer": scorer}
    options = {"first": 1.5, "second": 1.0, "threshold": 2.0, "recycle": "nearest", "size_aware": True}
    trial = tuner.Trial(1, options, 0.5)
    method = load_method(str(tuner.write_method(tmp_path, "brief", brief, trial, trial, "Tuned.")))
    assert (method.recycle, method.size_aware, method.first, method.scorer.threshold) == ("nearest", True, 1.5, 2.0)


def test_what_came_of_it_is_said_and_scenes_drawn_for_it_go(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [f"model={tiny_folder}", f"out={out}", "benchmark=scenes_fresh", "benchmark.images=1", "keep=0.3"]
    assert main(["tune", *words, "samples=2", "trials=6", "method.first=2.5", "method.second=0.25", "device=cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    trials = trials_of(out)
    best = max(trials, key=lambda trial: trial["flow"])
    path = out / "vflowopt_tuned.yaml"
    assert said[0].startswith("drawing 1 scenes to ask about") and "benchmark.cache=DIR" in said[0]
    gain = f"{best['flow'] - trials[0]['flow']:.5f} above that of the method's own, {trials[0]['flow']:.5f}"
    assert (
        best["trial"] and f"trial {best['trial']} of 6 (first {best['first']}, second " in said[-3] and gain in said[-3]
    )
    assert said[-2] == f"written to {path}, all settings tried to {out / 'trials.jsonl'}"
    assert said[-1].endswith(f"vprune eval model={tiny_folder} method={path} keep=0.3 limit=256")
    assert sorted(one.name for one in out.iterdir()) == ["trials.jsonl", path.name]
    assert main(["tune", *words, "samples=2", "trials=1", "device=cpu", f"benchmark.cache={tmp_path / 'kept'}"]) == 0
    assert "of 1 trials none is better than the method's own setting (first 1.17, " in capsys.readouterr().out
    assert len(list(tmp_path.glob("kept/*/samples.jsonl"))) == 1


def test_what_is_written_prunes_and_can_be_tuned_again(
    tune: Tune, tuned: Path, tiny_folder: Path, benchmark: Path, tmp_path: Path, tiny_vlm: Any, tiny_processor: Any
) -> None:
    from tests.exactness.prompts import batch

    path = tuned / "vflowopt_tuned.yaml"
    with vprune.prune(tiny_vlm(), str(path), keep=0.3) as pruning:
        tiny_vlm().generate(**batch(tiny_processor, "padded"), max_new_tokens=2)
    assert pruning.last is not None and all(one.tokens_after < one.tokens_before == 36 for one in pruning.last)
    words = [f"model={tiny_folder}", f"benchmark={benchmark}", f"method={path}", "keep=0.3", "max_new_tokens=2"]
    assert main(["eval", *words, f"out={tmp_path}"]) == 0
    again = tune("trials=1", f"method={path}")
    (trial,) = trials_of(again)
    best = max(trials_of(tuned), key=lambda one: one["flow"])
    assert trial["flow"] == pytest.approx(best["flow"], abs=1e-6) and (again / path.name).is_file()


def test_flow_is_one_where_nothing_goes(tiny_vlm: Any, tiny_processor: Any) -> None:
    from transformers import BatchFeature

    from tests.exactness.prompts import batch
    from vprune.eval.models import LoadedModel

    loaded = LoadedModel(tiny_vlm(), tiny_processor, torch.device("cpu"), "float32", None)
    flow = tuner.LastTokenFlow(loaded, [BatchFeature(batch(tiny_processor, "padded"))])
    full, half, little = (flow(load_method("random", keep=keep)) for keep in (1.0, 0.5, 0.05))
    assert full == pytest.approx(1.0, abs=1e-6) and half < 1 and little < 1
    with pytest.raises(vprune.VPruneError, match="samples >= 1"):
        tuner.LastTokenFlow(loaded, [])


@pytest.mark.parametrize("keep", [0.001, 0.05, 0.1, 0.34, 0.5, 0.99])
def test_every_setting_that_is_suggested_is_one_of_the_method(keep: float) -> None:
    class Drawn:
        def __init__(self, at: float) -> None:
            self.at = at

        def suggest_float(self, name: str, low: float, high: float) -> float:
            return low + self.at * (high - low)

        def suggest_int(self, name: str, low: int, high: int) -> int:
            return round(low + self.at * (high - low))

        def suggest_categorical(self, name: str, values: Sequence[Any]) -> Any:
            return values[round(self.at * (len(values) - 1))]

    for at in (0.0, 0.3, 0.77, 1.0):
        method = load_method("vflowopt", keep=keep, **tuner.suggested(Drawn(at), keep))
        assert method.keep == keep and 1 <= method.first <= max(1.0, 1 / keep) + 1e-4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["keep=2"], "keep=2: give a fraction below 1"),
        (["keep=1.0"], "keep=1.0: give a fraction below 1"),
        (["method=attention"], "method=attention has no thirds to tune: choose vflowopt"),
        (["method.first=4"], "first=4"),
        (["trials=0"], "trials=0: expected an integer >= 1"),
        (["samples=2.5"], "samples=2.5: expected an integer >= 1"),
        (["trails=3"], "no option 'trails' (did you mean trials?)"),
        (["benchmark=nowhere"], "benchmark=nowhere is unknown"),
        (["out={file}"], "cannot be written to"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    tune: Tune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
) -> None:
    from vprune.eval import models

    monkeypatch.setattr(models, "load", lambda choice: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    tune(*(word.format(file=tmp_path / "file") for word in words), code=2)
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and told in said[-1] and "Traceback" not in "".join(said)


def test_without_optuna_it_is_named(
    tune: Tune, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    tune("trials=1", code=2)
    assert "pip install 'vprune[tune]'" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_of_another_size_tunes_too(tune: Tune, tmp_path: Path, tiny_processor: Any) -> None:
    build_model("clip", width=48).save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    out = tune("trials=1", f"model={tmp_path}", "samples=1000")
    assert "1 settings tried on 8 samples" in (out / "vflowopt_tuned.yaml").read_text()
