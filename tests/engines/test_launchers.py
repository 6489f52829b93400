"""A sweep through Hydra's launchers is the sweep that runs here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.eval.conftest import Eval
from vprune.cli import main
from vprune.eval.launching import split_launcher, take_turns

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "joblib": ("hydra-joblib-launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
    "submitit": ("hydra-submitit-launcher", ["hydra/launcher=submitit_local"]),
}


def installed(name: str) -> bool:
    return find_spec("hydra_plugins") is not None and find_spec(f"hydra_plugins.hydra_{name}_launcher") is not None


def test_what_chooses_a_launcher_is_told_apart() -> None:
    given = ["method=full", "hydra/launcher=joblib", "keep=0.5", "hydra.launcher.n_jobs=2"]
    assert split_launcher(given) == (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["method=full", "keep=0.5"])


@pytest.mark.parametrize(("count", "device", "taken"), [(2, "auto", [0, 1, 0]), (2, "cuda:1", []), (1, "auto", [])])
def test_the_runs_of_a_sweep_take_the_gpus_in_turn(
    count: int, device: str, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for number in range(3):
        take_turns(number, device)
    assert chosen == taken


def test_a_launcher_needs_a_sweep(evaluate: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("hydra/launcher=joblib", "out=here") == 2
    assert "add -m" in capsys.readouterr().err


def test_a_launcher_that_is_not_there_is_told(
    model_folder: Path, benchmark_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"model={model_folder}", f"benchmark={benchmark_folder}", f"out={tmp_path / 'out'}"]
    assert main(["eval", "-m", "hydra/launcher=rocket", "method=full,random", *given]) == 2
    assert "pip install 'vprune[launchers]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_sweep_of_two_runs_is_the_same(
    name: str,
    model_folder: Path,
    benchmark_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package, launcher = LAUNCHERS[name]
    if not installed(name):
        pytest.skip(f"{package} is not installed: pip install 'vprune[launchers]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}", prepend=":")
    given = [f"model={model_folder}", f"benchmark={benchmark_folder}", "method=full,random", "limit=8"]
    assert main(["eval", "-m", *given, "out=here"]) == 0
    assert main(["eval", "-m", *given, "out=there", *launcher]) == 0
    assert "random" in capsys.readouterr().out
    for run in ("full-1.0", "random-0.1"):
        here, there = (tmp_path / where / run / "predictions.jsonl" for where in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()
    assert main(["eval", "-m", *given, "keep=99", "out=wrong", *launcher]) == 2
    assert "random-99: keep=99" in capsys.readouterr().err
