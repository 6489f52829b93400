"""What the documentation shows is run: its blocks, its commands, its links, its figures."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vprune
import vprune.scoring
from tests.docs.pages import DOCS, PAGES, ROOT, blocks, commands_of, read, walk_through
from tests.exactness.families import batch, build
from vprune.cli import main

SOURCES = ("README.md", "docs/LOG.md", "docs/serving.md", "docs/compatibility.md")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder in which `assets/` is as in the project's, and modules of one's own are found."""
    (tmp_path / "assets").symlink_to(ROOT / "assets", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_quick_start_runs(folder: Path) -> None:
    walk_through("quickstart")
    assert {"kept.png", "masks.png"} <= {path.name for path in folder.iterdir()}
    runs = folder / "runs"
    assert {path.name for path in (runs / "first").glob("leaderboard.*")} == {"leaderboard.md", "leaderboard.json"}
    assert (runs / "first" / "index.html").stat().st_size and (runs / "segment-first" / "annotations.json").is_file()


def test_a_method_is_added_in_two_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        walk_through("add_a_method")
    finally:
        sys.modules.pop("centre", None)
    told = json.loads((folder / "runs" / "centre" / "leaderboard.json").read_text(encoding="utf-8"))
    assert {entry["method"] for entry in told} == {"centre", "random"}
    # Moved into the tree as the last section says: the class as a neighbour of the scorers.
    monkeypatch.setattr(vprune.scoring, "__path__", [*vprune.scoring.__path__, str(folder)])
    moved = folder / "moved.yaml"
    text = (folder / "centre.yaml").read_text(encoding="utf-8")
    moved.write_text(text.replace("centre.Centre", "vprune.scoring.centre.Centre"), encoding="utf-8")
    try:
        scorer: Any = vprune.load_method(str(moved), keep=0.2, width=0.4).scorer
        assert (type(scorer).__module__, scorer.width) == ("vprune.scoring.centre", 0.4)
    finally:
        sys.modules.pop("vprune.scoring.centre", None)


@pytest.mark.parametrize("page", ["choose_a_budget", "faq"])
def test_single_snippets_run(page: str, tiny_vlm: Any) -> None:
    names: dict[str, Any] = {"model": tiny_vlm()}
    for block in blocks(page):
        if block.language == "python":
            exec(block.text, names)


def test_the_notebook_runs(folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in notebook()["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"quickstart.ipynb, {cell['id']}", "exec"), names)
    assert names["full"] == names["pruned"] and names["report"].tokens_after == 57


def notebook() -> dict[str, Any]:
    read_back: dict[str, Any] = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    return read_back


def test_the_notebook_is_valid_and_without_outputs() -> None:
    book = notebook()
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert set(book) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    identifiers = [cell["id"] for cell in book["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in identifiers)
    for cell in book["cells"]:
        own = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | own
        assert not own or (cell["execution_count"] is None and cell["outputs"] == [])
        assert all(isinstance(line, str) for line in cell["source"])
    try:
        import nbformat
    except ImportError:
        return  # what its schema asks for is asked for above
    nbformat.validate(nbformat.from_dict(book))


EVALUATIONS = [
    pytest.param(arguments, id=f"{page}-{number}")
    for page in PAGES
    for number, arguments in enumerate(commands_of(page))
    if arguments[0] == "eval" and "centre.yaml" not in " ".join(arguments)
]
READERS_OWN = {
    "model=ID": "model=some/model",
    "benchmark=FOLDER": "benchmark=mine",
    "benchmark=my/folder": "benchmark=mine",
}


@pytest.mark.parametrize("arguments", EVALUATIONS)
def test_every_evaluation_composes(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "samples.jsonl").write_text("")
    (folder / "models" / "qwen2-vl").mkdir(parents=True)
    assert main([*(READERS_OWN.get(word, word) for word in arguments), "--cfg"]) == 0
    runs = re.findall(r"^# \S+/", capsys.readouterr().out, re.M)
    table = "out=runs/table" in arguments and "method=learned" not in arguments
    assert len(runs) == 60 if table else runs


@pytest.mark.parametrize("page", PAGES)
def test_options_of_other_verbs_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`train` and `bench` are too dear to run here: the names of their options are looked up."""
    for verb, what, *options in (words for words in commands_of(page) if words[0] in ("train", "bench")):
        assert main([verb, what, "--help"] if verb == "train" else [verb, "--help"]) == 0
        known = capsys.readouterr().out
        for option in options:
            name = option.partition("=")[0]
            assert re.search(rf"^ *{name}[:=]", known, re.M), f"vprune {verb} {what} has no option {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)", read(page)):
        path = DOCS / target if target else DOCS / f"{page}.md"
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", ["choose_a_budget", "faq"])
def test_figures_are_those_of_the_log_and_the_readme(page: str) -> None:
    """A decimal on these pages has been measured, and stands where its set-up is told."""
    sources = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in SOURCES)
    prose = re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)
    prose = re.sub(r"`[^`]*`", "", prose)
    found = set(re.findall(r"(?<![\w.])\d*\.\d+(?![\w.]*\d)", prose))
    missing = sorted(one for one in found if not re.search(rf"(?<![\d.]){re.escape(one)}(?!\d)", sources))
    assert not missing, f"docs/{page}.md has figures that stand in none of {', '.join(SOURCES)}: {missing}"


def test_methods_named_exist() -> None:
    known = {*vprune.method_names(), "centre"}
    for page in PAGES:
        for name in re.findall(r"method=\"?(\w+)\"?(?![.\w/])", read(page)):
            assert name in known, (page, name)


def test_what_qwen2_vl_refuses_is_named() -> None:
    model, inputs = build("qwen2_vl", torch.float32), batch("qwen2_vl", "single", torch.float32)
    refused = set()
    for method in {*vprune.method_names()} - {"full", "learned", "relevance"}:
        try:
            with vprune.prune(model, method, keep=0.5), torch.no_grad():
                model(**inputs)
        except vprune.VPruneError:
            refused.add(method)
    told = " ".join(read("reproduce_a_table").split()).split("are refused there", 1)[1].split("Compare those", 1)[0]
    assert set(re.findall(r"`(\w+)`", told)) == refused
