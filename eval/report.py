"""The command `vprune report`: runs in a folder -> leaderboard.md, leaderboard.json and index.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vprune.arguments import Parser
from vprune.errors import VPruneError
from vprune.eval.reporting.gather import gather
from vprune.eval.reporting.sections import Gathered

LEADERBOARD_MD, LEADERBOARD_JSON, INDEX = "leaderboard.md", "leaderboard.json", "index.html"
RETENTION_JSON = "retention.json"  # where runs of a model on several benchmarks lie in the folder
GALLERY = 12

_DESCRIPTION = f"""\
Gather the runs below DIR into {LEADERBOARD_MD}, {LEADERBOARD_JSON} and {INDEX} (one page that needs no network).

  vprune report runs/demo
  vprune report runs/demo gallery=0      # no pictures, so no model is loaded

Runs of different models, benchmarks or samples stand in sections of their own. Of a model's runs on several benchmarks
the retention, score / the full model's, is given as its mean over them, too ({RETENTION_JSON})."""


def report(folder: str | Path, gallery: int = GALLERY) -> Path:
    """Write the report of all runs in `folder` and below; returns the path of `index.html`.

    `gallery`: samples shown with pictures in each section, which the model computes again (0: none). Runs that are
    unfinished or broken are listed on the page with the reason.

    Raises:
        VPruneError: no such folder, no finished run in it, or it cannot be written to.

    Example:
        >>> report("runs/demo", gallery=0)  # doctest: +SKIP
        PosixPath('runs/demo/index.html')
    """
    return _write(gather(Path(folder)), gallery)


def main(argv: Sequence[str]) -> int:
    """Run `vprune report`; 0, or 1 if a run could not be read. VPruneError for a user's mistake."""
    parser = Parser("report", "DIR [gallery=N]", description=_DESCRIPTION)
    parser.add_argument("folder", metavar="DIR", help="what `vprune eval` wrote to with out=DIR, or the folder above")
    pictures = f"pictures of N samples a section; default {GALLERY}"
    parser.add_argument("options", nargs="*", default=[], metavar="gallery=N", help=pictures)
    arguments = parser.parse_args(list(argv))
    gallery = _gallery(arguments.options)

    from vprune.eval.reporting.terminal import show

    gathered = gather(Path(arguments.folder))
    if gallery:
        _quiet_loading()
    index = _write(gathered, gallery)
    show(gathered, index)
    return 1 if gathered.broken else 0


def _quiet_loading() -> None:
    """No bars and no advice of the library that loads the model for the pictures."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _gallery(options: Sequence[str]) -> int:
    count = GALLERY
    for option in options:
        key, equals, value = option.partition("=")
        if key != "gallery" or not equals:
            raise VPruneError(f"vprune report knows no option {option!r}; there is gallery=N (0: no pictures)")
        if not value.isdecimal() or int(value) > 1000:
            raise VPruneError(f"gallery={value}: expected a number of samples from 0 to 1000")
        count = int(value)
    return count


def _write(gathered: Gathered, gallery: int) -> Path:
    """The tables first, so that they are there should the pictures fail."""
    from vprune.eval.reporting.gallery import gallery as pictures
    from vprune.eval.reporting.leaderboard import markdown, rows
    from vprune.eval.reporting.means import comparisons, data
    from vprune.eval.reporting.page import page

    folder = gathered.folder
    _replace(folder / LEADERBOARD_MD, markdown(gathered))
    _replace(folder / LEADERBOARD_JSON, json.dumps(rows(gathered), indent=2, ensure_ascii=False) + "\n")
    if means := data(comparisons(gathered)):
        _replace(folder / RETENTION_JSON, json.dumps(means, indent=2, ensure_ascii=False) + "\n")
    else:
        (folder / RETENTION_JSON).unlink(missing_ok=True)  # of runs that are no longer here
    _replace(folder / INDEX, page(gathered, [pictures(section, gallery) for section in gathered.sections]))
    return folder / INDEX


def _replace(path: Path, text: str) -> None:
    """Write whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise VPruneError(f"{path} cannot be written ({error})") from error
