"""The scenes that ship with vprune: objects composited on photographs, questions of every kind, exact masks."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from vprune.errors import VPruneError
from vprune.eval.benchmarks.folder import Folder
from vprune.eval.scenes.world import KINDS


class Scenes(Folder):
    """A scenes split: the shipped one, or the one in `path`."""

    def __init__(self, path: str | Path | None = None, name: str = "scenes", template: str = "{question}") -> None:
        folder = Path(path) if path is not None else shipped()
        super().__init__(folder, name=name, template=template, kinds=KINDS)


def shipped() -> Path:
    """The folder of the split inside the package; VPruneError if this installation lacks it."""
    folder = Path(str(files("vprune") / "assets" / "scenes"))
    if not folder.is_dir():
        raise VPruneError(
            f"the scenes split is missing from this installation ({folder}); install vprune with its assets"
        )
    return folder
