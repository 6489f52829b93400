from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vprune import __version__
from vprune.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("eval", "report", "train", "bench", "segment", "tune"))


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vprune {__version__}\n"


@pytest.mark.parametrize("verb", ["eval", "report", "bench", "segment", "tune", "train"])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"vprune {verb}" in capsys.readouterr().out


def test_eval_help_names_groups_options_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("attention", "scenes_fresh", "embedded", "keep=", "limit=", "blank=", "overwrite=", "exit codes"):
        assert word in out


@pytest.mark.parametrize("arguments", [["evl"], ["train", "vml"], ["eval", "--nothing"], [], ["train"]])
def test_a_wrong_word_is_a_mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err or captured.out


def test_a_near_miss_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evl"]) == 2
    assert "did you mean eval?" in capsys.readouterr().err


def test_the_configuration_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--cfg", "method=random", "keep=0.5"]) == 0
    out = capsys.readouterr().out
    assert "keep: 0.5" in out
    assert "runs/embedded-scenes/random-0.5" in out


def test_a_mistake_on_the_command_line_leaves_one_line_and_no_litter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vprune.cli", "eval", "method=attentoin"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "method=attentoin is unknown (did you mean attention?)" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_is_quick() -> None:
    started = time.monotonic()
    code = "import sys, vprune.cli; vprune.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert time.monotonic() - started < 5
