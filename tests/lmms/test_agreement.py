"""lmms-eval with the model `vprune` answers as `vprune eval` does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.eval.conftest import read_predictions
from tests.lmms.made import TASK, write_pope
from vprune.cli import main

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = 12
# So little is kept that some answers are wrong: agreeing on right ones alone would say less.
MODEL = {"method": "random", "keep": 0.02, "recycle": "none"}

pytestmark = [
    pytest.mark.lmms,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: pip install 'vprune[lmms]'"
    ),
]


def write_entry_points(folder: Path) -> Path:
    """What installing vprune writes for others to find, from pyproject.toml: the one in use may be an older one."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    metadata = folder / "vprune-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vprune\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in group.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))
    return folder


def test_lmms_eval_agrees_with_vprune_eval_on_a_local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pope(tmp_path / "pope", QUESTIONS)
    monkeypatch.chdir(tmp_path)
    told = [f"{key}={value}" for key, value in MODEL.items()]
    benchmark = ["benchmark=pope", f"benchmark.path={folder}", "benchmark.template='{question}'"]
    assert main(["eval", *told, *benchmark, "batch_size=4", "max_new_tokens=16", "out=own"]) == 0
    own = read_predictions(tmp_path / "own")

    paths = [
        write_entry_points(tmp_path / "installed"),
        ROOT,
        *filter(None, os.environ.get("PYTHONPATH", "").split(":")),
    ]
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "vprune",
        "--model_args",
        ",".join(["pretrained=embedded", *told]),
    ]
    command += ["--tasks", TASK, "--include_path", str(folder), "--batch_size", "4", "--device", "cpu"]
    run = subprocess.run(
        [*command, "--output_path", "theirs", "--log_samples"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": ":".join(map(str, paths)),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (samples,) = tmp_path.glob("theirs/*/*_samples_*.jsonl")
    theirs = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["input"] for row in theirs] == [row["question"] for row in own]
    assert [row["filtered_resps"] for row in theirs] == [row["prediction"] for row in own]
    assert [row["pope_accuracy"] for row in theirs] == [row["correct"] for row in own]
    assert len({row["pope_accuracy"] for row in theirs}) == 2
    # The prompt's text is a few words; all 576 visual tokens of the image are in neither count.
    counts = [row["token_counts"][0] for row in theirs]
    assert all(row["tokens_after"] < one["input_tokens"] < 60 for one, row in zip(counts, own, strict=True))
    assert all(one["output_tokens"] >= 1 for one in counts)
    assert f"read {11 * QUESTIONS} of {576 * QUESTIONS} visual tokens" in run.stdout


def test_requests_that_cannot_be_answered_are_refused() -> None:
    from lmms_eval.api.instance import Instance

    from vprune import VPruneError
    from vprune.lmms.chat import VPrune

    with pytest.raises(VPruneError, match="batch_size=auto"):
        VPrune(batch_size="auto")
    with pytest.raises(VPruneError, match="metod"):
        VPrune(method="random", metod="x")
    model = VPrune(method="full", device="cpu")
    model.task_dict = {"clips": {"test": [{}]}}

    def clip(doc: object) -> list[dict[str, object]]:
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "what?"}]}]

    metadata = {"task": "clips", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until", ("", clip, {}, 0, "clips", "test"), 0, metadata)
    with pytest.raises(VPruneError, match="task clips brings video"):
        model.generate_until([request])
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([request])
    model.clean()
