"""`vprune bench kernels` on a CPU: what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from vprune import VPruneError, kernels
from vprune.bench.app import OPERATIONS, Options, main, read_options
from vprune.bench.kernels import SIZES, Maker

SMALL = ["device=cpu", "repeats=1"]


def test_it_writes_a_table_with_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *SMALL, "ops=compact,select", "commit=abc", f"out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "no CUDA device is used: this times the torch backend on the CPU, at tiny sizes" in printed
    with (tmp_path / "bench.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    content = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [row["op"] for row in table] == [row["op"] for row in content["rows"]] == ["compact", "select", "select"]
    for row in content["rows"]:
        assert row["backend"] == "torch" and row["problem"] is None
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] and row["bytes"] > 0
        assert row["to_torch"] == pytest.approx(row["p50_us"] / row["torch_us"])
        # What is printed tells how many times faster the operation is, as the README does.
        assert f"{row['copy_us'] / row['p50_us']:.2f}x the copy, " in printed
        assert f", {row['torch_us'] / row['p50_us']:.2f}x torch ({row['torch']}, {row['torch_us']:.1f} us)" in printed
    assert "above 1x the operation is the faster one\ncompact " in printed
    surroundings = content["environment"]
    assert (
        surroundings["versions"]["torch"] and surroundings["git_commit"] and surroundings["options"]["size"] == "tiny"
    )


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_expression_computes_the_same(op: str) -> None:
    for case in Maker(SIZES["tiny"], torch.device("cpu"), torch.float32, "torch").cases(op):
        assert case.problem() is None
        mine = case.wanted(*case.sets[0])
        for name, expression in case.expressions.items():
            torch.testing.assert_close(expression(*case.sets[0]), mine, rtol=1e-4, atol=1e-5, msg=name)


def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = kernels.compact
    monkeypatch.setattr(kernels, "compact", lambda tokens, index, backend: plain(tokens, index) + 1)
    assert main(["kernels", *SMALL, "ops=compact", f"out={tmp_path}"]) == 1
    assert "NOT TIMED: result 0 differs from the reference" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert row["p50_us"] is None and row["problem"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "opz=compact"], "did you mean ops"),
        (["kernels", "ops=copy"], "there is no 'copy'"),
        (["kernels", "size=huge"], "choose one of full, tiny"),
        (["kernels", "repeats=0"], "at least 1"),
        (["kernels", *SMALL, "ops=compact", "backend=triton"], "backend='triton'"),
        (["kernel"], "there is kernels"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(VPruneError, match=message):
        main([*words, *([f"out={tmp_path}"] if len(words) > 1 else [])])


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and main(["kernels", "-h"]) == 0 and main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"{key}=" in printed for key in ("out", "ops", "device", "backend", "repeats"))
    assert read_options([]) == Options()
