"""`vprune train scorer` on folders of questions: families and objectives, runs broken off and taken up, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vprune
from tests.conftest import build_model, build_processor, picture
from tests.exactness import families, processors
from vprune import VPruneError
from vprune.cli import main
from vprune.eval.benchmarks.folder import Folder
from vprune.eval.models import LoadedModel
from vprune.scoring.network import ScorerNetwork
from vprune.training import labels, questions, watching
from vprune.training.checkpoint import claim
from vprune.training.cli import configured
from vprune.training.labels import Labelled, name_of, relevance_of_images
from vprune.training.prompts import Answered, read_prompt
from vprune.training.questions import Questions, load_model
from vprune.training.scorer import _MADE, _Run

SMALL = [
    "device=cpu",
    "optimizer.minutes=null",
    "optimizer.steps=4",
    "optimizer.batch_size=3",
    "optimizer.warmup=1",
    "network.channels=[8,8,8]",
    "network.kernels=[3,3,3]",
    "network.dilations=[1,1,1]",
    "network.matches=2",
    "network.contents=4",
    "effect.keeps=[0.2,0.5]",
    "effect.how_often=[0.5,0.5]",
    "label_batch=2",
    "log_every=2",
]
ASKED = ["what is the red circle ?", "where ?", "count the blue square ?"]
SIZES = [(64, 80), (40, 40), (80, 48)]
QUESTIONS = 11  # ten to learn from, in four batches; one to measure on


@pytest.fixture(scope="module", autouse=True)
def short_answers() -> Any:
    """Random models never stop talking."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "LONGEST", 4)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven questions about pictures of three shapes."""
    made = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(QUESTIONS):
        picture(number, SIZES[number % 3]).save(made / f"{number}.png")
        row = {"id": f"q{number}", "image": f"{number}.png", "kind": "where", "answer": "left"}
        rows.append(json.dumps({**row, "question": ASKED[number % 3]}) + "\n")
    (made / "samples.jsonl").write_text("".join(rows))
    return made


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny = family == "llava"
            model = build_model() if tiny else families.build(family, torch.float32)
            model.save_pretrained(made[family])
            (build_processor() if tiny else processors.build_processor(family)).save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def command(folder: Path, model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., list[str]]:
    """The words after `vprune train scorer` of a small run into `tmp_path / out`."""

    def words(*more: str, family: str = "llava", out: str = "run") -> list[str]:
        return [f"model={model_folder(family)}", f"questions={folder}", f"out={tmp_path / out}", *SMALL, *more]

    return words


def prepared(words: list[str]) -> _Run:
    """A run before its first step."""
    config = configured("scorer", words)
    claim(Path(config.out), config, _MADE)
    run = _Run(config, Path(config.out))
    run.label()
    return run


def loaded_of(model_folder: Callable[[str], Path], family: str) -> LoadedModel:
    return load_model(str(model_folder(family)), "cpu")


@pytest.mark.parametrize("objective", ["effect", "relevance"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_any_family_learns_from_a_folder(
    command: Callable[..., list[str]],
    model_folder: Callable[[str], Path],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    objective: str,
) -> None:
    assert main(["train", "scorer", *command(f"objective={objective}", family=family)]) == 0
    said = capsys.readouterr().out
    assert "3 questions a step" in said and "10 questions to learn from, 1 to measure on" in said
    cost = (
        "labelling: 10 of 10 questions are left, in 4 batches" if objective == "relevance" else "s a step: 4 steps take"
    )
    assert cost in said and said.rstrip().endswith("scorer")
    out = tmp_path / "run"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    assert lines[-1]["step"] == 4 and set(lines[-1]["same_answers"]) == {"0.2", "0.5"}
    # A folder of questions is labelled once, however many are painted without one.
    assert len(list((out / "labels").glob("*.safetensors"))) == (4 if objective == "relevance" else 0)

    loaded = loaded_of(model_folder, family)
    inputs = Questions(loaded, str(folder), 3, tmp_path).predictor
    some = dict(inputs.prepare(inputs.benchmark.samples[:3]).inputs)
    with vprune.prune(loaded.model, method="learned", keep=0.3, checkpoint=str(out / "scorer")) as pruning:
        loaded.model.generate(**some, max_new_tokens=2)
    assert pruning.last is not None and len(pruning.last) >= 3
    for report in pruning.last:
        assert report.tokens_after < report.tokens_before and report.importance is not None
        assert bool(report.importance.isfinite().all())
    other = build_model(width=48)
    with pytest.raises(VPruneError, match=r"trained for another model: .*hidden_size=32, this one has hidden_size=48"):
        vprune.prune(other, method="learned", checkpoint=str(out / "scorer"))


def test_what_questions_need_is_learnt_behind_the_scores(
    command: Callable[..., list[str]],
    model_folder: Callable[[str], Path],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "LEAST", 8)
    assert main(["train", "scorer", *command("demand.rounds=2", "demand.levels=[0.1,0.4,1.0]")]) == 0
    out = tmp_path / "run"
    assert "answers are watched at 3 budgets" in capsys.readouterr().out
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert (
        last["watched"] == 10 and last["stays_at"]["1.0"] == 1.0
    )  # with everything kept the answer is the model's own
    first = ScorerNetwork.load(out / "scorer")
    assert first.config.levels == (0.1, 0.4, 1.0)

    words = command("objective=demand", f"start_from={out / 'scorer'}", "demand.levels=[0.1,0.3,0.5,1.0]", out="again")
    assert main(["train", "scorer", *words, "network.channels=[8,8,4]"]) != 0
    assert "its network is another (" in capsys.readouterr().err
    assert main(["train", "scorer", *words]) == 0
    again = ScorerNetwork.load(tmp_path / "again" / "scorer")
    assert again.config.levels == (0.1, 0.3, 0.5, 1.0)
    for name, value in first.state_dict().items():  # what scores tokens is as it was
        assert name.startswith("demand.") or torch.equal(value, again.state_dict()[name])
    loaded = loaded_of(model_folder, "llava")
    some = dict(Questions(loaded, str(folder), 3, tmp_path).predictor.prepare(Folder(str(folder)).samples[:3]).inputs)
    asked = {"keep": 0.35, "budget": "question", "checkpoint": str(tmp_path / "again" / "scorer")}
    if again.config.prices:
        with vprune.prune(loaded.model, method="learned", **asked) as pruning:
            loaded.model.generate(**some, max_new_tokens=2)
        assert {one.tokens_after for one in pruning.last or []} <= {3, 10, 12, 18, 36}


def test_nothing_to_learn_demand_from(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "scorer", *command("objective=demand")]) != 0
    assert "give its folder as start_from= (it is None)" in capsys.readouterr().err
    assert main(["train", "scorer", *command("objective=demand", "start_from=nowhere")]) != 0
    assert "start_from=nowhere: there is no such folder; give the folder of a scorer" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_a_label_does_not_depend_on_its_batch(
    model_folder: Callable[[str], Path], folder: Path, tmp_path: Path, family: str
) -> None:
    loaded = loaded_of(model_folder, family)
    source = Questions(loaded, str(folder), None, tmp_path)
    (whole,) = [next(source.batches(4, 0, 0))]
    heard: list[int] = []
    together = relevance_of_images(loaded.model, whole, 3, lambda asked, tokens: heard.append(asked))
    assert sum(heard) == 4 and max(heard) <= 3
    alone = [
        relevance_of_images(loaded.model, one, 1) for _, one in zip(range(4), source.batches(1, 0, 0), strict=False)
    ]
    flat = [tensor for one in alone for tensor in one.values()]
    assert len(flat) == len(together)
    for mine, theirs in zip(together.values(), flat, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert float(torch.cat(flat).std()) > 1e-3  # the control: they are not all alike


def test_batches_come_again_in_the_same_order(
    model_folder: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    source = Questions(loaded_of(model_folder, "llava"), str(folder), None, tmp_path)

    def ids(stream: Any, count: int) -> list[Any]:
        return [one.inputs["input_ids"].tolist() for one, _ in zip(stream, range(count), strict=False)]

    first = ids(source.batches(4, 3, 0), 7)
    assert [len(one) for one in first] == [4, 4, 2, 4, 4, 2, 4] and first[:3] == first[3:6]
    assert ids(source.batches(4, 3, 2), 5) == first[2:] and ids(source.batches(4, 4, 0), 2) != first[:2]
    assert [len(one) for one in source.held_out(4)] == [1] and len(source.train) == 10


class BrokenOffError(Exception):
    pass


def test_labelling_goes_on_where_it_was_broken_off(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, made = command("objective=relevance"), 0
    stop_after: int | None = 2

    def counted(model: Any, batch: Answered, *others: Any) -> dict[str, torch.Tensor]:
        nonlocal made
        if made == stop_after:
            raise BrokenOffError
        made += 1
        return relevance_of_images(model, batch, *others)

    monkeypatch.setattr(labels, "relevance_of_images", counted)
    with pytest.raises(BrokenOffError):
        prepared(words)
    shards = tmp_path / "run" / "labels"
    assert sorted(one.name for one in shards.iterdir()) == [name_of(0), name_of(1)]
    stop_after = None
    labelled = prepared(words).labels
    assert isinstance(labelled, Labelled) and labelled.batches == 4 and made == 4
    assert sum(len(load_file(one)) for one in shards.iterdir()) == 10
    told = labelled.of(1, [0])
    torch.testing.assert_close(told.sum(-1), torch.ones(1))
    # A shard in the middle that is cut short is made again, and it alone.
    whole = {one: (one.read_bytes(), one.stat().st_mtime_ns) for one in shards.iterdir()}
    broken = shards / name_of(1)
    broken.write_bytes(whole[broken][0][:-20])
    prepared(words)
    assert made == 5 and broken.read_bytes() == whole[broken][0]
    assert all(one.stat().st_mtime_ns == then for one, (_, then) in whole.items() if one != broken)
    prepared(words)
    assert made == 5


@pytest.mark.parametrize("objective", ["effect", "relevance"])
def test_a_run_taken_up_again_ends_where_an_unbroken_one_does(
    command: Callable[..., list[str]], objective: str
) -> None:
    straight = prepared(command(f"objective={objective}", out="straight"))
    straight.loop()
    stopped = prepared(command(f"objective={objective}", out="stopped"))
    stopped.loop(until=2)
    stopped.save()
    again = prepared(command(f"objective={objective}", out="stopped"))
    again.resume()
    assert again.step == 2 and again.seconds > 0
    again.loop()
    assert again.step == straight.step == 4
    for mine, theirs in (
        (again.network.state_dict(), straight.network.state_dict()),
        (again.average, straight.average),
    ):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    moved = [(again.average[key] - stopped.average[key]).abs().max() for key in again.average]
    assert float(torch.stack(moved).max()) > 0  # the control


def test_a_checkpoint_cut_short_is_told(command: Callable[..., list[str]], tmp_path: Path) -> None:
    run = prepared(command())
    run.save()
    run.resume()
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VPruneError, match=r"checkpoint.pt \(1000 bytes\) is no checkpoint of this run .*start over"):
        run.resume()
    torch.save({"step": 3}, path)
    with pytest.raises(VPruneError, match="is no checkpoint of this run"):
        run.resume()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["limits=4"], "limits=4: there is no such value (did you mean limit?)"),
        (["lr=1"], "did you mean optimizer.lr?"),
        (["objective=magic"], "objective='magic': choose one of effect, relevance"),
        (["optimizer.lr=fast"], "optimizer.lr=fast: expected a number, and not 'fast'"),
        (["optimizer.batch_size=0"], "optimizer.batch_size=0: expected an integer at least 1"),
        (["optimizer.batch_size=2.5"], "expected an integer, and not 2.5"),
        (["optimizer=3"], "optimizer is a group; give one of optimizer.lr"),
        (["effect.keeps=[0.2,1.5]"], "expected a number above 0, at most 1"),
        (["effect.keeps=0.2"], "expected a list, as effect.keeps=["),
        (["effect.how_often=[1,1,1]"], "has 2 budgets and effect.how_often=[1, 1, 1] 3 shares"),
        (["effect.temperature=[1.0]"], "effect.temperature=[1.0]: give two"),
        (["compile=maybe"], "expected auto, true or false, and not 'maybe'"),
        (["optimizer.steps=null"], "optimizer.minutes and optimizer.steps are both null"),
        (["device=tpu0"], "device=tpu0"),
        (["limit=1"], "limit=1: 1 of 11 questions, and at least 2 are needed"),
        (["questions=nowhere"], "questions=nowhere: benchmark folder nowhere does not exist"),
        (["questions=painted"], "with questions=painted: those are about the embedded model's world"),
        (["network.channels=[8,8]"], "name 2, 3 and 3 convolutions"),
        (["network.layer=7"], "layer=7: the decoder has layers 0 to 2"),
    ],
)
def test_mistakes_are_told_in_a_line(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main(["train", "scorer", *command(*words)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.splitlines()[-1].startswith("error: ") and told in said.splitlines()[-1]


def test_mistakes_about_folders(
    command: Callable[..., list[str]],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def error(*words: str, family: str = "llava") -> str:
        capsys.readouterr()
        assert main(["train", "scorer", *command(*words, family=family)]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said.splitlines()[-1]

    bare, run = tmp_path / "bare", tmp_path / "run"
    bare.mkdir()
    assert "has no samples.jsonl" in error(f"questions={bare}")
    (bare / "samples.jsonl").write_text((folder / "samples.jsonl").read_text())
    said = error(f"questions={bare}")
    assert "samples.jsonl, line 1: image" in said and "0.png does not exist" in said
    assert not run.exists()  # told before the model is loaded and the folder claimed
    # What a run has made stands for the recipe that made it: its answers, its labels, its checkpoint.
    prepared(command()).save()
    assert "holds a run with other values of optimizer.steps (4 there, 9 here): give" in error("optimizer.steps=9")
    (run / "checkpoint.pt").unlink()
    assert "holds a run with other values of model (" in error(family="qwen2_vl")
    (run / "labels").mkdir()
    wrong = "other values of optimizer.batch_size (3 there, 2 here), seed (0 there, 1 here): give another folder"
    assert wrong in error("optimizer.batch_size=2", "seed=1")
    (tmp_path / "file").touch()
    assert f"out={tmp_path / 'file'} cannot be written to" in error(f"out={tmp_path / 'file'}")
    assert "Qwen3VLModel adds features after 2 of its 3 layers" in error(f"out={tmp_path / 'new'}", family="qwen3_vl")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["questions=nodir"], "questions=nodir: benchmark folder nodir does not exist"),
        (["limit=1"], "limit=1: 1 of 11 questions, and at least 2 are needed"),
        (["model=nodir"], "model=nodir is neither a folder here nor"),
        (["questions=painted"], "with questions=painted: those are about the embedded model's world"),
    ],
)
def test_what_needs_no_model_is_told_before_one_is_loaded(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
) -> None:
    monkeypatch.setattr("vprune.training.scorer.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["train", "scorer", *command(*words)]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_placeholder_in_an_answer_ends_it(
    model_folder: Callable[[str], Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_of(model_folder, "llava")
    image, end = loaded.model.config.image_token_id, loaded.processor.tokenizer.eos_token_id
    said = torch.tensor([[7, image, 8, 9], [image, 7, 8, 9], [7, 8, 9, 10]])
    monkeypatch.setattr(
        loaded.model, "generate", lambda input_ids, **others: torch.cat([input_ids, said[: len(input_ids)]], 1)
    )
    batch = next(Questions(loaded, str(folder), None, tmp_path).batches(3, 0, 0))
    words = [row[answer].tolist() for row, answer in zip(batch.inputs["input_ids"], batch.answer, strict=True)]
    assert words == [[7], [end], [7, 8, 9, 10]]
    assert len(read_prompt(loaded.model, batch.inputs).images) == 3  # no picture is looked for in an answer


def test_answers_are_asked_for_once(
    model_folder: Callable[[str], Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_of(model_folder, "llava")
    first = next(Questions(loaded, str(folder), None, tmp_path).batches(3, 0, 0))
    file = tmp_path / "answers.jsonl"
    whole = file.read_text()
    assert len(whole.splitlines()) == 3
    file.write_text(whole[:-5])  # broken off while the last one was written
    asked: list[int] = []
    generate = loaded.model.generate

    def counted(**inputs: Any) -> Any:
        asked.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(loaded.model, "generate", counted)
    again = next(Questions(loaded, str(folder), None, tmp_path).batches(3, 0, 0))
    assert asked == [1] and torch.equal(first.inputs["input_ids"], again.inputs["input_ids"])
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())
    next(Questions(loaded, str(folder), None, tmp_path).batches(3, 0, 0))
    assert asked == [1]
