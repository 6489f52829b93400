"""What a model's config tells before its weights are read: how many layers and visual tokens there will be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vprune.budgets import count_of
from vprune.errors import VPruneError
from vprune.pruner import Pruner

_ONE_GRID = ("llava", "vipllava")  # families whose every picture becomes the grid of patches that the config names
# Towers and what LLaVA selects of them: the patches, without the class token that CLIP's has.
_PATCHES = {"clip_vision_model": "default", "siglip_vision_model": "full"}


@dataclass(frozen=True)
class Foreseen:
    """The number of decoder `layers` and the patches along the `side` of every picture; None: the config is silent."""

    layers: int | None = None
    side: int | None = None

    def refuse(self, pruner: Pruner) -> None:
        """Refuse a method that cannot be right for the model, long before the model itself would.

        Raises:
            VPruneError: a layer that the decoder does not have, or more tokens than every picture has.
        """
        layers = [pruner.layer, getattr(pruner.scorer, "layer", None), *(layer for layer, _ in pruner.schedule)]
        if self.layers is not None:
            refuse_layers(layers, self.layers)
        if self.side is not None and pruner.budget == "image":
            for _, keep in pruner.schedule:
                count_of(keep, self.side**2, [(1, self.side, self.side)])


def refuse_layers(layers: list[int | None], count: int) -> None:
    """Refuse layers, from the end where negative, of a decoder that has `count`; None is none.

    Raises:
        VPruneError: one that it does not have.
    """
    for layer in layers:
        if layer is not None and not -count <= layer < count:
            raise VPruneError(f"layer={layer}: the decoder has layers 0 to {count - 1}")


def foresee(path: str, revision: str | None = None) -> Foreseen:
    """What the config of a local model, or of a hub's in the cache, tells; never asks the network."""
    config = _config(path, revision)
    text, vision = (config.get(part) or {} for part in ("text_config", "vision_config"))
    pixels, patch, side = vision.get("image_size"), vision.get("patch_size"), None
    patches = _PATCHES.get(str(vision.get("model_type"))) == config.get("vision_feature_select_strategy", "default")
    if config.get("model_type") in _ONE_GRID and patches and isinstance(pixels, int) and isinstance(patch, int):
        side = pixels // patch
    layers = text.get("num_hidden_layers")
    return Foreseen(layers if isinstance(layers, int) else None, side)


def _config(path: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    file: Any = Path(path) / "config.json"
    try:
        if not file.parent.is_dir():
            file = try_to_load_from_cache(path, "config.json", revision=revision)
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return {}  # not at hand, or broken: whoever loads the model says so
    return config if isinstance(config, dict) else {}
