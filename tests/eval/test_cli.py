from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vprune import VPruneError, __version__
from vprune.amounts import BUDGETS, RECYCLERS
from vprune.cli import main
from vprune.eval.models import DTYPES
from vprune.eval.options import entries, options_of
from vprune.eval.overrides import compose_all

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "vprune report needs DIR (what `vprune eval` wrote to with out=DIR, or the folder above): vprune"),
        (["report", "--gallery=0"], "vprune report needs DIR (what "),
        (["report", "runs", "--gallery=0"], "vprune report knows no --gallery=0; use it as vprune report DIR [gallery"),
        (["segment"], "vprune segment needs IMAGE_OR_DIR (a picture, or a folder of them): vprune segment IMAGE_OR"),
        (
            ["eval", "--nothing"],
            "vprune eval knows no --nothing; use it as vprune eval [-m] [key=value ...]. Try vprune",
        ),
        (["tune", "-x"], "vprune tune knows no -x; use it as vprune tune [key=value ...]. Try vprune tune --help"),
        (["eval", "--cfg=x"], "vprune eval: argument --cfg: ignored explicit argument 'x'. Try vprune eval --help"),
    ],
)
def test_words_that_do_not_fit_are_told_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("verb", ["eval", "tune", "segment"])
def test_the_help_lists_what_the_errors_list(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    groups, options = capsys.readouterr().out.partition("groups (group=entry):\n")[2].split("\n\n")[:2]
    entries = dict(re.findall(r"^  (\w+) +(.+(?:\n {13}.+)*)", groups, re.MULTILINE))
    names = [*entries, *re.findall(r"^  ([\w.]+)=", options, re.MULTILINE)]
    for group, listed in entries.items():
        with pytest.raises(VPruneError) as said:
            compose_all([f"{group}=nonsense"], primary=verb)
        assert str(said.value).endswith(f"; there is {' '.join(listed.split())}")
    for stranger in ("nonsense=1", "+nonsense=1"):
        with pytest.raises(VPruneError) as said:
            compose_all([stranger], primary=verb)
        assert str(said.value) == f"there is no option 'nonsense'; there is {', '.join(names)}"


@pytest.mark.parametrize("verb", ["eval", "tune", "segment"])
def test_the_help_tells_every_choice(verb: str) -> None:
    told = {option.name: option.meaning for option in options_of(verb)}
    assert all(told.values())
    for key, known in {"recycle": RECYCLERS, "budget": BUDGETS, "dtype": DTYPES}.items():
        words = re.sub(r" \(.*?\)", "", told.get(key, " | ".join(known)))
        assert " | ".join(known) in words


def test_the_help_of_train_lists_its_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    recipes = re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(recipes) == entries("train")
    assert main(["train", "nonsense"]) == 2
    assert f"there is {', '.join(recipes)}. Try" in capsys.readouterr().err


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
