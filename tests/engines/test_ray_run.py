"""`vprune eval engine=ray`: the bytes of engine=local, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.eval.conftest import Eval, read_predictions
from vprune.eval.results import load_run

ROOT = Path(__file__).resolve().parents[2]
RAY = ("engine=ray", "engine.workers=2", "engine.gpus=0", "engine.threads=1")

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_the_same_bytes_and_a_run_that_goes_on(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ("method=attention", "keep=0.25", "batch_size=4")
    assert evaluate(*told, "out=local") == 0
    whole = (tmp_path / "local/predictions.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "ray").mkdir()
    for name in ("config.yaml", "environment.json"):
        (tmp_path / "ray" / name).write_bytes((tmp_path / "local" / name).read_bytes())
    (tmp_path / "ray/predictions.jsonl").write_bytes(b"".join(lines[:7]))  # engine=local was killed in its second batch
    capsys.readouterr()
    assert evaluate(*told, *RAY, "out=ray") == 0
    assert "6 of 24 samples are there already" in capsys.readouterr().out
    assert (tmp_path / "ray/predictions.jsonl").read_bytes() == whole
    local, spread = (load_run(tmp_path / name).metrics for name in ("local", "ray"))
    assert {**local, "seconds": 0, "seconds_split": 0} == {**spread, "seconds": 0, "seconds_split": 0}
    facts = json.loads((tmp_path / "ray/environment.json").read_text())
    assert facts["workers"]["workers"] == 2
    assert facts["versions"]["ray"]
    assert "default_worker" not in facts["command"]


def test_a_mistake_that_shows_only_at_the_model_is_told_in_a_line(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("method=random", "keep=99", *RAY, "out=here") == 2
    assert "keep=99" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


@pytest.mark.slow
def test_a_thousand_samples_survive_a_killed_worker(tmp_path: Path) -> None:
    """The embedded model on the shipped scenes; one of two workers is killed half-way."""
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, "-m", "vprune.cli", "eval", "method=learned", "keep=0.1", "limit=1000"]
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "out=local"], cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    predictions = tmp_path / "ray/predictions.jsonl"
    with subprocess.Popen([*command, *RAY, "out=ray"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None and not (predictions.is_file() and predictions.read_bytes().count(b"\n") >= 500):
            time.sleep(0.2)
        workers = [one for one in psutil.Process(run.pid).children(recursive=True) if "MapWorker" in str(one.cmdline())]
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        assert run.wait() == 0
    assert predictions.read_bytes() == (tmp_path / "local/predictions.jsonl").read_bytes()
    ids = [row["id"] for row in read_predictions(tmp_path / "ray")]
    assert len(ids) == len(set(ids)) == 1000
