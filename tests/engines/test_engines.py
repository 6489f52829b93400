"""Engines as they are told: what is checked before any of them starts."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eval.conftest import Eval
from vprune import VPruneError
from vprune.eval.engines.engine import make_engine
from vprune.eval.engines.local import Local
from vprune.eval.engines.pool import Pool
from vprune.eval.engines.ray_data import Outcome, _in_order, _portable
from vprune.eval.predictor import Answer
from vprune.eval.results import differences
from vprune.eval.settings import read_jobs

CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vprune.eval.engines.pool._ray", lambda: None)


def outcome(*texts: str, error: str | None = None, facts: dict[str, Any] = CPU) -> Outcome:
    answers = [Answer(text, None, None, error) for text in texts]
    return Outcome(answers, {"total": 1.0, "generate": 0.5}, facts)


def test_the_default_engine_is_local() -> None:
    (job,) = read_jobs([])
    assert make_engine(job.config["engine"]) == Local("sdpa", None)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_its_extra_is_named(evaluate: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("engine=ray", "out=here") == 2
    assert "pip install 'vprune[ray]'" in capsys.readouterr().err
    assert not Path("here").exists()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 0}, r"engine\.workers=0: expected an integer >= 1 or null"),
        ({"workers": 1.5}, r"engine\.workers=1\.5"),
        ({"workers": True}, r"engine\.workers=True"),
        ({"gpus": -1}, r"engine\.gpus=-1: expected a number >= 0 or null"),
        ({"gpus": 1.5}, r"engine\.gpus=1\.5: a part of a GPU \(0\.5\), or whole ones"),
        ({"cpus": None}, r"engine\.cpus=None: expected a number >= 0$"),
        ({"threads": 0}, r"engine\.threads=0"),
        ({"retries": -1}, r"engine\.retries=-1: expected an integer >= 0$"),
    ],
)
def test_values_out_of_range_are_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(VPruneError, match=message):
        Pool(**given)


@pytest.mark.usefixtures("installed")
def test_the_yaml_names_every_field_with_its_default() -> None:
    (job,) = read_jobs(["engine=ray"])
    told = {key: value for key, value in job.config["engine"].items() if key != "_target_"}
    assert vars(make_engine(job.config["engine"])) == told
    assert {**vars(Pool()), "attention": "sdpa"} == told


def test_where_a_run_is_answered_is_no_other_configuration() -> None:
    (local,), (spread,) = read_jobs([]), read_jobs(["engine=ray", "engine.workers=7", "engine.gpus=0.5"])
    assert differences(local.config, spread.config) == []
    (other,) = read_jobs(["engine=ray", "engine.attention=eager"])
    assert differences(local.config, other.config) == ["engine.attention: sdpa there, eager here"]


def test_outcomes_are_put_in_order() -> None:
    coming = iter([(2, outcome("c")), (0, outcome("a")), (3, outcome("d")), (1, outcome("b"))])
    answered = list(_in_order(coming, time.perf_counter()))
    assert [one.answers[0].text for one in answered] == ["a", "b", "c", "d"]
    assert sum(one.seconds["total"] for one in answered) < 1.0  # what passed here, not in the workers
    assert sum(one.seconds["generate"] for one in answered) == 2.0


def test_a_job_travels_with_paths_that_hold_elsewhere_and_stays_off_gpus_it_does_not_get() -> None:
    (job,) = read_jobs(["model=embedded"])
    assert _portable(job, None).model_choice == job.model_choice
    assert _portable(job, 0).model_choice.device == "cpu"
    assert _portable(job, 0).shared.is_absolute()
    (job,) = read_jobs(["device=cuda:1"])
    assert _portable(job, 0).model_choice.device == "cuda:1"


def test_workers_that_run_otherwise_are_refused() -> None:
    coming = iter([(0, outcome("a")), (1, outcome("b", facts={"device": "cuda:0", "dtype": "bfloat16"}))])
    with pytest.raises(VPruneError, match="cpu in float32 and cuda in bfloat16"):
        list(_in_order(coming, 0.0))


def test_a_first_batch_that_fails_as_a_whole_ends_the_run_and_a_later_one_does_not() -> None:
    failed = outcome("", "", error="ValueError: no")
    with pytest.raises(RuntimeError, match="every sample of the first batch failed: ValueError: no"):
        list(_in_order(iter([(1, outcome("b")), (0, failed)]), 0.0))
    assert len(list(_in_order(iter([(1, failed), (0, outcome("a"))]), 0.0))) == 2


def test_a_run_killed_before_its_metrics_needs_no_engine(
    evaluate: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("method=random", "out=here") == 0
    metrics = json.loads((tmp_path / "here/metrics.json").read_text())
    (tmp_path / "here/metrics.json").unlink()

    def no_engine(self: Local, task: object) -> Iterator[None]:
        pytest.fail("nothing was left to answer")

    monkeypatch.setattr(Local, "open", no_engine)
    assert evaluate("method=random", "out=here") == 0
    assert json.loads((tmp_path / "here/metrics.json").read_text()) == metrics
