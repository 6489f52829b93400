"""`vprune bench model` on a CPU: what it writes, what its oracle is, what it refuses."""

from __future__ import annotations

import csv
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import vprune
from vprune import VPruneError
from vprune.bench.app import main
from vprune.bench.architectures import ARCHITECTURES, Prompt, as_short, build, bytes_of_row, make_prompt, visual_rows
from vprune.bench.cell import CheckError, Fits
from vprune.bench.model import MEANINGS, Options, read_options
from vprune.bench.model_rows import SIDES, Cell, Row, measured
from vprune.bench.passes import Side
from vprune.bench.timing import Clock
from vprune.cli import main as vprune_main
from vprune.pruner import load_method
from vprune.scoring import learned

CPU = torch.device("cpu")


def made(model: str = "onevision-7b", kind: str = "image", tokens: int = 640, batch: int = 2) -> tuple[Any, Prompt]:
    architecture = ARCHITECTURES[model]
    built = build(architecture.config(True), CPU, torch.float32)
    return built, make_prompt(built, architecture, kind, tokens, batch)


def test_it_writes_every_measure_of_every_cell(measured_folder: Path) -> None:
    content = json.loads((measured_folder / "bench.json").read_text(encoding="utf-8"))
    with (measured_folder / "bench.csv").open(encoding="utf-8") as file:
        table = csv.DictReader(file)
        assert table.fieldnames == [field.name for field in fields(Row)]
        assert [row["measure"] for row in table] == [row["measure"] for row in content["rows"]]
    seen = {(row["batch"], row["tokens"], row["measure"], row["new_tokens"]) for row in content["rows"]}
    names = [("prefill", None), ("plan", None), ("kv_visual", None), ("first_token", None), ("decode_token", None)]
    for measure, count in [*names, ("end_to_end", 3)]:
        assert {(2, tokens, measure, count) for tokens in (64, 640)} <= seen
    surroundings = content["environment"]
    assert surroundings["git_commit"] and surroundings["versions"]["torch"] and surroundings["not_measured"] == []


def test_ratios_are_those_of_the_medians(measured_folder: Path) -> None:
    for row in json.loads((measured_folder / "bench.json").read_text(encoding="utf-8"))["rows"]:
        assert row["problem"] is None and row["repeats"] >= 1
        for side in SIDES:
            assert 0 < row[f"{side}_p25"] <= row[side] <= row[f"{side}_p75"]
        assert row["pruned_speedup"] == pytest.approx(row["unpruned"] / row["pruned"])
        assert row["quotient"] == pytest.approx(row["pruned_speedup"] / row["oracle_speedup"])
        assert row["pruned_length"] == row["oracle_length"] < row["unpruned_length"]
        if row["measure"] == "kv_visual":
            assert row["pruned"] == row["oracle"] and row["share"] <= 0.1 and row["met"]
            kept = (int(0.1 * 64) + int(0.1 * 576)) if row["tokens"] == 640 else 6
            assert row["pruned"] == row["batch"] * kept * 2 * 3 * 2 * 16 * 4


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("model", ["onevision-7b", "qwen2vl-2b"])
def test_the_oracle_has_as_many_tokens_as_pruning_leaves(model: str, kind: str) -> None:
    built, prompt = made(model, kind)
    pruned, oracle = (Side(name, built, Clock(CPU)) for name in ("pruned", "oracle"))
    with vprune.prune(pruned.model, "attention_max", keep=0.25) as pruning:
        left = pruned.prefill(prompt)
    oracle.length = round(left.stored)
    short = oracle.prefill(prompt)
    kept = sum(one.tokens_after for one in pruning.last or []) // 2
    assert short.stored == short.most == left.stored == prompt.others + kept
    assert short.cache == left.cache == 2 * oracle.length * bytes_of_row(built.config, torch.float32)
    inputs = as_short(built, prompt, oracle.length)
    text = built.get_input_embeddings()(prompt.inputs["input_ids"])
    assert torch.equal(inputs["inputs_embeds"][:, 16:-48], visual_rows(built, prompt)[:, : oracle.length - 64])
    assert torch.equal(inputs["inputs_embeds"][:, -48:], text[:, -48:])


def test_sides_share_their_weights_and_nothing_else() -> None:
    built, prompt = made()
    first, second = (Side(name, built, Clock(CPU)) for name in SIDES[:2])
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(one is other for one, other in pairs) and first.model is not second.model

    def hooks() -> list[int]:
        return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in second.model.modules()]

    first.prefill(prompt), second.prefill(prompt)  # (the library puts hooks of its own on at the first call)
    before = hooks()
    with vprune.prune(second.model, "uniform", keep=0.1):
        assert first.prefill(prompt).stored == prompt.shape[1] > second.prefill(prompt).stored
    assert hooks() == before


def test_compiled_steps_run_on_a_cache_of_just_the_size(tmp_path: Path) -> None:
    words = ["device=cpu", "dtype=float32", "tokens=64", "batch=1", "keep=0.1", "new=1,3", "repeats=1"]
    assert main(["model", *words, "measure=answer", "decode=compiled", f"out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert [row["measure"] for row in rows] == ["first_token", "end_to_end", "decode_token"]
    assert all(row["decode"] == "compiled" and row["problem"] is None for row in rows)


def test_an_untrained_scorer_stands_in(tmp_path: Path) -> None:
    words = ["model", "device=cpu", "dtype=float32", "tokens=64", "batch=1", "keep=0.1", "measure=prefill", "repeats=1"]
    assert main([*words, "method=learned", "scorer=random", f"out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert {row["method"] for row in rows} == {"learned (random scorer)"}


def test_planning_with_graphs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model", "device=cpu", "dtype=float32", "tokens=64", "batch=1", "keep=0.1", "measure=prefill", "repeats=1"]
    assert main([*words, "graphs=true", f"out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert {row["method"] for row in rows} == {"attention_max (graphs)"}
    with pytest.raises(VPruneError, match="graphs=True: the plans of method=random"):
        main([*words, "method=random", "graphs=true", f"out={tmp_path}"])


def test_what_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Side.prefill

    def small(self: Side, prompt: Prompt) -> Any:
        if self.name == "unpruned":
            raise torch.OutOfMemoryError
        return plain(self, prompt)

    monkeypatch.setattr(Side, "prefill", small)
    words = ["model", "device=cpu", "dtype=float32", "tokens=64", "batch=1", "keep=0.1", "measure=prefill", "repeats=1"]
    assert main([*words, f"out={tmp_path}"]) == 0
    for row in json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]:
        assert row["unpruned"] is None and row["pruned_speedup"] is None and row["quotient"] > 0
        assert row["problem"] == "does not fit into the memory of this device: unpruned"


def test_a_side_that_fails_its_check_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Side.prefill

    def infinite(self: Side, prompt: Prompt) -> Any:
        found = plain(self, prompt)
        object.__setattr__(found, "finite", self.name != "pruned")
        return found

    monkeypatch.setattr(Side, "prefill", infinite)
    words = ["model", "device=cpu", "dtype=float32", "tokens=64", "batch=1", "keep=0.1", "measure=answer", "repeats=1"]
    assert main([*words, f"out={tmp_path}"]) == 1
    (row,) = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert row["problem"] == "logits are not finite" and row["pruned"] is None


def test_a_budget_that_is_not_kept_is_refused() -> None:
    built, prompt = made(tokens=64, batch=1)
    sides = {name: Side(name, built, Clock(CPU)) for name in SIDES}
    refused = pytest.raises(CheckError, match="32 of 64 visual tokens were kept, more than 10%")
    with vprune.prune(sides["pruned"].model, load_method("uniform", keep=0.5)) as pruning, refused:
        Fits(Cell("image", 64, 1, 0.1), prompt, sides, pruning, {}, 0.0)


def test_bounds_are_checked_where_they_hold() -> None:
    head = {"model": "m", "method": "x", "decode": "eager", "kind": "image", "tokens": 7290, "layout": "", "batch": 1}
    times = {"unpruned": [70.0, 72.0], "pruned": [10.4, 10.5], "oracle": [10.0, 10.1]}
    row = measured({**head, "keep": 0.1}, Cell("image", 7290, 1, 0.1), "prefill", "ms", times)
    assert row.bound == "quotient >= 0.97" and row.met is False and row.quotient == pytest.approx(10.05 / 10.45)
    other = measured({**head, "keep": 0.5}, Cell("image", 7290, 1, 0.5), "prefill", "ms", times)
    assert other.bound is None and other.met is None


def test_what_matters_most_is_measured_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["device=cpu", "dtype=float32", "tokens=64", "batch=1", "keep=0.5,0.1", "repeats=1", "new=1"]
    assert main(["model", *words, "minutes=0.000001", f"out={tmp_path}"]) == 0
    left = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["environment"]["not_measured"]
    assert left[0] == "1 x 64 (image) at 10%: prefill" and len(left) == 4
    said = capsys.readouterr().out
    assert "out of time after 1e-06 minutes" in said
    assert "above 1x the other is faster (or smaller)" in said.splitlines()[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=llava"], "choose one of onevision-7b"),
        (["kepe=0.1"], "did you mean keep"),
        (["keep=1.5"], "give shares above 0, 1 at most"),
        (["tokens=many"], "tokens=many: give numbers above 0"),
        (["batch=1.5"], "batch=1.5: give numbers above 0"),
        (["new=0"], "new=0: give numbers above 0"),
        (["repeats=0"], "at least 1"),
        (["decode=fast"], "choose one of eager, compiled, graph"),
        (["measure=all"], "choose prefill, answer, or both"),
        (["scorer=random"], "belongs to method=learned"),
        (["method=lerned"], "method='lerned' is unknown"),
        (["minutes=soon"], "minutes=soon: give numbers above 0"),
        (["layer=first"], "give the number of a decoder layer"),
        (["tokens=1"], "the smallest image of this model has 64 visual tokens"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(VPruneError, match=message):
        main(["model", "device=cpu", "dtype=float32", *words, f"out={tmp_path}"])


def test_a_method_without_its_scorer_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "_shipped_for", lambda own, drops: None)
    with pytest.raises(VPruneError, match="no scorer ships for LlavaOnevisionModel"):
        main(["model", "device=cpu", "dtype=float32", "method=learned", f"out={tmp_path}"])
    assert not (tmp_path / "bench.csv").exists()


def test_a_mistake_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert vprune_main(["bench", "model", "keep=2"]) == 2
    assert capsys.readouterr().err.startswith("error: keep=2: give shares")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{field.name}=" in printed and field.name in MEANINGS for field in fields(Options))
    assert read_options([]) == Options()
