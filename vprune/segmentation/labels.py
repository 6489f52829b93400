"""Names that a model says -> the categories of a list, by the likeness of their texts to open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vprune.errors import VPruneError


class Labeller:
    """Puts names to the nearest category: argmax of the cosine of CLIP's texts "a {name}" (VL-SAM, arXiv 2410.05963).

    Args:
        categories: what there is.
        clip: "embedded", an open_clip model and tag as NAME/TAG, or local-dir:FOLDER.
        device: where it runs.

    Raises:
        VPruneError: no categories, or a model that cannot be had.
    """

    def __init__(self, categories: Sequence[str], clip: str = "embedded", device: torch.device | str = "cpu") -> None:
        if not categories:
            raise VPruneError("categories= names nothing: give at least one")
        self.categories = tuple(categories)
        self.model, self.tokenizer = load_clip(clip, device)
        self.device = torch.device(device)
        self._features = self._encode(self.categories)

    def __call__(self, names: Sequence[str]) -> list[str]:
        """The nearest category of each name."""
        if not names:
            return []
        nearest = (self._encode(names) @ self._features.T).argmax(-1)
        return [self.categories[int(one)] for one in nearest]

    @torch.no_grad()
    def _encode(self, names: Sequence[str]) -> Tensor:
        tokens = self.tokenizer([f"a {name}" for name in names]).to(self.device)
        return normalize(self.model.encode_text(tokens).float(), dim=-1)


def load_clip(name: str, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """An open_clip model and its tokenizer.

    Raises:
        VPruneError: it cannot be had.
    """
    import open_clip

    pretrained = None
    if name == "embedded":
        folder = Path(str(files("vprune") / "assets" / "models" / "clip"))
        if not (folder / "open_clip_config.json").is_file():
            raise VPruneError(
                f"the embedded CLIP is missing from this installation ({folder}); name another with clip="
            )
        name = f"local-dir:{folder}"
    elif ":" not in name:
        name, _, tag = name.partition("/")
        pretrained = tag or None
    try:
        model = open_clip.create_model(name, pretrained=pretrained, device=device)
        return model.eval(), open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise VPruneError(f"clip={name} cannot be loaded: {' '.join(str(error).split())[:200]}") from error


def read_categories(given: Any) -> list[str] | None:
    """The categories of a configuration: a list, or the path of a text file with one a line; None: no list.

    Raises:
        VPruneError: the file cannot be read.
    """
    if given is None:
        return None
    if isinstance(given, str):
        try:
            lines = Path(given).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise VPruneError(f"categories={given} is neither a list, as in [cat,dog], nor a file ({error})") from error
        return [line.strip() for line in lines if line.strip()]
    return [str(one) for one in given]
