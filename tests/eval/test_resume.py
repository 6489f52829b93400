from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.eval.conftest import Eval
from vprune.eval.results import load_run

ROOT = Path(__file__).resolve().parents[2]


def test_a_killed_run_goes_on_to_the_same_bytes(
    evaluate: Eval, tmp_path: Path, model_folder: Path, benchmark_folder: Path
) -> None:
    shared = ["method=attention", "keep=0.25", "batch_size=1", "max_new_tokens=30"]
    command = [sys.executable, "-m", "vprune.cli", "eval", f"model={model_folder}", f"benchmark={benchmark_folder}"]
    process = subprocess.Popen(
        [*command, *shared, "out=killed"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    predictions = tmp_path / "killed/predictions.jsonl"
    while process.poll() is None and (not predictions.is_file() or predictions.stat().st_size < 600):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/metrics.json").exists()
    written = predictions.read_bytes()
    assert written.count(b"\n") < 24

    assert evaluate(*shared, "out=killed") == 0
    assert evaluate(*shared, "out=whole") == 0
    assert predictions.read_bytes() == (tmp_path / "whole/predictions.jsonl").read_bytes()
    assert predictions.read_bytes().startswith(written)


@pytest.mark.parametrize("cut", [1, 300, -1, -200])
def test_partial_lines_and_batches_are_done_again(evaluate: Eval, tmp_path: Path, cut: int) -> None:
    assert evaluate("method=random", "out=here") == 0
    file = tmp_path / "here/predictions.jsonl"
    whole = file.read_bytes()
    (tmp_path / "here/metrics.json").unlink()
    file.write_bytes(whole[:cut])
    assert evaluate("method=random", "out=here") == 0
    assert file.read_bytes() == whole
    assert load_run(tmp_path / "here").metrics["samples"] == 24


def test_whole_batches_are_not_done_again(evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("method=random", "out=here") == 0
    file = tmp_path / "here/predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    (tmp_path / "here/metrics.json").unlink()
    file.write_text("".join(lines[:9]))  # batches of 4, 2 (a kind has six samples): the ninth line begins another batch
    capsys.readouterr()
    assert evaluate("method=random", "out=here") == 0
    assert "6 of 24 samples are there already" in capsys.readouterr().out
    assert file.read_text() == "".join(lines)


def test_a_kill_before_the_first_batch_leaves_nothing_in_the_way(evaluate: Eval, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/predictions.jsonl").touch()
    assert evaluate("method=random", "out=here") == 0


def test_a_run_goes_on_only_in_the_same_precision(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("method=random", "out=here") == 0
    (tmp_path / "here/metrics.json").unlink()
    file = tmp_path / "here/predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:9]))
    environment = json.loads((tmp_path / "here/environment.json").read_text())
    (tmp_path / "here/environment.json").write_text(json.dumps({**environment, "dtype": "bfloat16"}))
    assert evaluate("method=random", "out=here") == 2
    assert "was begun with dtype=bfloat16 and would go on with float32" in capsys.readouterr().err


def test_the_number_of_threads_is_no_other_configuration(evaluate: Eval) -> None:
    assert evaluate("method=random", "out=here", "engine.workers=2") == 0
    assert evaluate("method=random", "out=here", "engine.workers=1") == 0


def test_a_foreign_line_is_never_overwritten(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("method=random", "out=here") == 0
    file = tmp_path / "here/predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    (tmp_path / "here/metrics.json").unlink()
    file.write_text("".join(lines[4:]))
    before = file.read_bytes()
    assert evaluate("method=random", "out=here") == 2
    assert "is not this run's" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_two_runs_never_write_to_one_folder(evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    (tmp_path / "here").mkdir()
    with (tmp_path / "here/predictions.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert evaluate("method=random", "out=here", "overwrite=true") == 2
    assert "another vprune eval is writing" in capsys.readouterr().err
