"""Where a model will put the learned rows that end its lines of visual tokens, foretold by its own code from sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from vprune.models.anatomy import Anatomy, own_size, tokens_of
from vprune.models.aside import fetched

_NEEDED = ("image_sizes", "batch_num_images", "vision_aspect_ratio", "vision_feature_select_strategy")
_UNEXPECTED = (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def breaks_to_come(anatomy: Anatomy, kwargs: Mapping[str, Any]) -> Callable[[Tensor], Tensor | None]:
    """What will tell the places of line breaks, bool [B, L], or None if that cannot be told from sizes.

    `kwargs` of the model's forward. Sizes leave the device here; what is returned is told the places of pictures and of
    videos, bool [kinds, B, L] on the CPU, and asks it for nothing else.
    """
    if not isinstance(getattr(anatomy.base, "image_newline", None), Tensor):
        return lambda kinds: None
    frames = kwargs.get("pixel_values_videos")
    told = {name: kwargs.get(name) for name in _NEEDED}
    tensors = {name: one for name, one in told.items() if isinstance(one, Tensor)}
    on_host = fetched(list(tensors.values()))

    def tell(kinds: Tensor) -> Tensor | None:
        pictures, *videos = kinds
        found = []
        if bool(pictures.any()):
            found.append(_packed(anatomy, {**told, **dict(zip(tensors, on_host(), strict=True))}, pictures))
        if videos and bool(videos[0].any()):
            found.append(_behind_videos(anatomy, frames, videos[0]))
        breaks = torch.zeros_like(pictures)
        for one in found:
            if one is None:
                return None
            breaks = breaks | one
        return breaks

    return tell


def _behind_videos(anatomy: Anatomy, frames: Any, places: Tensor) -> Tensor | None:
    """One behind each of the videos [V, F, ...] of as many frames, which are halved in both directions."""
    whole, count = own_size(anatomy), int(places.sum())
    if whole is None or not isinstance(frames, Tensor) or frames.ndim != 5:
        return None
    _, h, w = whole.grid
    run = frames.shape[1] * -(-h // 2) * -(-w // 2) + 1
    if count != len(frames) * run:
        return None  # this model ends videos in no such way
    flags = (torch.arange(count) + 1) % run == 0
    return torch.zeros_like(places).masked_scatter(places, flags)


def _packed(anatomy: Anatomy, told: Mapping[str, Any], places: Tensor) -> Tensor | None:
    """Have the model pack features of one number each: 0 everywhere, and 1 in the place of a line break."""
    base: Any = anatomy.base
    count_tiles = getattr(sys.modules[type(base).__module__], "image_size_to_num_patches", None)
    whole, config = own_size(anatomy), base.config
    if whole is None or count_tiles is None:
        return None
    try:  # (also where sizes are missing)
        sizes = torch.as_tensor(told["image_sizes"])
        numbers = told["batch_num_images"]
        cut = [True] * len(sizes) if numbers is None else [int(n) == 1 for n in numbers for _ in range(int(n))]
        tile = config.vision_config.image_size
        tiles = [
            count_tiles(size, config.image_grid_pinpoints, tile) if own else 1
            for size, own in zip(sizes, cut, strict=False)  # (as the model: so many as there are)
        ]
        given: dict[str, Any] = {
            name: told[name] if told[name] is not None else getattr(config, name, None)
            for name in _NEEDED[2:]
            if name in signature(base.pack_image_features).parameters
        }
        features = [torch.zeros(count, tokens_of(whole), 1, device="cpu") for count in tiles]
        packed, _ = base.pack_image_features(features, sizes, image_newline=torch.ones(1, device="cpu"), **given)
        flags = torch.cat(list(packed)).squeeze(-1) == 1
    except _UNEXPECTED:
        return None  # the model will say so itself, or packs in another way: then its features are looked at
    if flags.numel() != int(places.sum()):
        return None
    return torch.zeros_like(places).masked_scatter(places, flags)
