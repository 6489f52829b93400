"""Pages of the documentation: their blocks, and how each is carried out."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vprune.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = ("quickstart", "add_a_method", "choose_a_budget", "reproduce_a_table", "faq", "leaderboard", "ablation")

_BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block, the file that it is to be written to, and its first line on the page."""

    language: str
    text: str
    file: str | None
    line: int


def read(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    whole = read(page)
    return [
        Block(found["language"], found["text"], found["file"], whole.count("\n", 0, found.start("text")))
        for found in _BLOCK.finditer(whole)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `vprune ...` of a bash block; lines that end in a backslash go on in the next."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["PYTHONPATH=."]:
            words = words[1:]
        if words[:1] == ["vprune"]:
            yield words[1:]


def commands_of(page: str) -> list[list[str]]:
    """The arguments of every `vprune ...` of a page."""
    return [arguments for block in blocks(page) if block.language == "bash" for arguments in commands(block.text)]


def said(block: Block, page: str, names: dict[str, Any]) -> str:
    """Run a Python block; what it prints."""
    printed = io.StringIO()
    # Padded, so that an error names the line of the page.
    code = compile("\n" * block.line + block.text, f"docs/{page}.md", "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def walk_through(page: str) -> None:
    """Carry out a page from top to bottom in the working folder; a `text` block is what the block before it prints."""
    names: dict[str, Any] = {"__name__": "page"}
    checker, printed = doctest.OutputChecker(), ""
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            printed = said(block, page, names)
        elif block.language == "text":
            told = f"docs/{page}.md:{block.line}: said {printed!r}, the page says {block.text!r}"
            assert checker.check_output(block.text, printed, doctest.ELLIPSIS), told
        elif block.language == "bash":
            for arguments in commands(block.text):
                if "my/folder" not in " ".join(arguments):  # the reader's own questions
                    assert main(arguments) == 0, arguments
