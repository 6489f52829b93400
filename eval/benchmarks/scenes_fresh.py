"""A scenes split drawn anew: the distribution of the shipped one, images nobody has seen."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from vprune.errors import VPruneError
from vprune.eval.benchmarks.folder import SAMPLES_FILE
from vprune.eval.benchmarks.scenes import Scenes


class ScenesFresh(Scenes):
    """A split of `images` scenes drawn from `seed`, written below `cache` once and read from there afterwards.

    `photographs` names the backgrounds: "test" (those of the shipped split) or "train".
    Raises VPruneError for a negative seed, no images, or other photographs.
    """

    def __init__(
        self,
        cache: str | Path,
        seed: int = 0,
        images: int = 512,
        photographs: str = "test",
        template: str = "{question}",
    ) -> None:
        for key, value, least in (("images", images, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < least:
                raise VPruneError(f"benchmark.{key}={value}: expected an integer >= {least}")
        if photographs not in ("test", "train"):
            raise VPruneError(f"benchmark.photographs={photographs} is unknown; there is test, train")
        folder = Path(cache) / f"scenes-{photographs}-{images}-seed_{seed}"
        if not (folder / SAMPLES_FILE).is_file():
            _draw(folder, seed, images, photographs)
        super().__init__(folder, name="scenes_fresh", template=template)


def _draw(folder: Path, seed: int, images: int, photographs: str) -> None:
    """Write the split beside its place and move it there whole, so that a kill leaves no half of one."""
    from vprune.eval.scenes.split import write_split

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_split(draft, images=images, seed=seed, photographs=photographs)
        draft.chmod(0o755)
        try:
            draft.replace(folder)
        except OSError:
            if not (folder / SAMPLES_FILE).is_file():  # otherwise another run was faster; its split is the same
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
