"""Where a vision-language model keeps its parts, and which places of a prompt are visual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vprune.errors import VPruneError
from vprune.records import Grid, TowerImage, VisualTokens

_TOWER_NAMES = ("vision_tower", "visual", "vision_model")
_ATTENTION_NAMES = ("self_attn", "attn", "attention")
_PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model instance that pruning touches.

    `base` merges image and text, `decoder` reads the result, `tower` sees the pixels; `token_ids` are the placeholders
    of visual tokens in `input_ids`.
    """

    base: nn.Module
    decoder: nn.Module
    tower: nn.Module | None
    token_ids: tuple[int, ...]

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder's layers, first to last."""
        layers: Sequence[nn.Module] = self.decoder.layers  # type: ignore[assignment]
        return layers

    @property
    def backend(self) -> str:
        """The decoder's attention implementation, e.g. `sdpa`."""
        return str(getattr(self.decoder.config, "_attn_implementation", None) or "eager")

    def tower_attentions(self) -> list[nn.Module]:
        """The attention modules of the vision tower's layers, first to last.

        Raises:
            VPruneError: the tower has no list of layers with an attention module each.
        """
        stacks = [
            [
                getattr(layer, name)
                for layer in module
                for name in _ATTENTION_NAMES
                if isinstance(getattr(layer, name, None), nn.Module)
            ]
            for module in (self.tower.modules() if self.tower is not None else ())
            if isinstance(module, nn.ModuleList)
        ]
        longest = max(stacks, key=len, default=[])
        if not longest:
            raise VPruneError(
                f"{type(self.tower).__name__} has no layers with attention that could be watched; choose another method"
            )
        return longest


def dissect(model: Any) -> Anatomy:
    """Find the parts of a vision-language model.

    Raises:
        VPruneError: the model has no placeholder token for images, or no decoder of its own.
    """
    config = getattr(model, "config", None)
    ids = tuple(
        token for name in ("image_token_id", "video_token_id") if isinstance(token := getattr(config, name, None), int)
    )
    if not isinstance(model, nn.Module) or not ids or not hasattr(model, "get_decoder"):
        raise VPruneError(
            f"{type(model).__name__} is no vision-language model that can be pruned: "
            "its config names no image_token_id; load one with AutoModelForImageTextToText"
        )
    find_decoder: Any = model.get_decoder
    decoder: nn.Module = find_decoder()
    # Whatever wraps the model (an adapter, say), the module that merges image and text is the one that holds the
    # decoder.
    base = next((part for part in model.modules() if any(child is decoder for child in part.children())), None)
    if base is None or not hasattr(decoder, "layers"):
        raise VPruneError(f"{type(model).__name__}: found no text decoder with layers of its own inside it")
    tower = next((part for name in _TOWER_NAMES if isinstance(part := getattr(base, name, None), nn.Module)), None)
    return Anatomy(base, decoder, tower, ids)


def carries_images(kwargs: Mapping[str, Any]) -> bool:
    """True when this forward brings images: a generated placeholder token alone is not visual."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    brought = [kwargs.get(name) for name in _PIXELS] + list(encoded.values())
    return any(one is not None for one in brought)


def visual_places(anatomy: Anatomy, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Mark the places of visual tokens, bool [B, L], from placeholders (or their embeddings)."""
    if input_ids is not None:
        return torch.isin(input_ids, torch.tensor(anatomy.token_ids, device=input_ids.device))
    assert inputs_embeds is not None
    ids = torch.tensor(anatomy.token_ids, device=inputs_embeds.device)
    decoder: Any = anatomy.decoder
    table: Tensor = decoder.get_input_embeddings()(ids)
    return (inputs_embeds[:, :, None] == table).all(-1).any(-1)


def count_visual_tokens(model: Any, input_ids: Tensor) -> list[int]:
    """Count the visual tokens of every row of `input_ids` [B, L], without running the model.

    Raises:
        VPruneError: `model` is no vision-language model.
    """
    counts: list[int] = visual_places(dissect(model), input_ids, None).sum(-1).tolist()
    return counts


def visual_layout(anatomy: Anatomy, visual: Tensor, tower: Sequence[TowerImage]) -> list[VisualTokens]:
    """Group the visual tokens of a batch into images, flat over rows and their images, in order.

    `visual` bool [B, L] on the CPU; `tower` what the vision tower saw. Beams repeat each row (its images with it) after
    the tower has run, so the tower may have seen a whole fraction of the images that stand in the prompt.

    Raises:
        VPruneError: the visual tokens of a row are not a whole number of images, as in chunked prefill.
    """
    counts = [int(count) for count in visual.sum(-1)]
    total = sum(counts)
    # Images encoded but never read (an interrupted call) come first: only the last ones can belong to this prompt.
    seen = list(tower)
    while seen and total % sum(map(tokens_of, seen)):
        seen.pop(0)
    dropped = len(tower) - len(seen)
    if seen:
        repeats = total // sum(map(tokens_of, seen))
        if len(counts) % repeats:
            raise _no_whole_images(counts, seen[0])
    elif tower and total:
        raise _no_whole_images(counts, tower[-1])
    else:
        repeats, seen = 1, _untracked(anatomy, counts)
    layout, start = [], 0
    for first in range(0, len(counts), repeats):
        taken, end = 0, start
        while taken < counts[first]:
            taken, end = taken + tokens_of(seen[end]), end + 1
        if taken != counts[first]:
            raise _no_whole_images(counts, seen[0])
        for row in range(first, first + repeats):
            columns, offset = visual[row].nonzero().squeeze(-1), 0
            for number, image in enumerate(seen[start:end]):
                size = tokens_of(image)
                origin = start + number + dropped if tower and seen[0] in tower else -1
                layout.append(VisualTokens(row, number, columns[offset : offset + size], grid_of(image), origin))
                offset += size
        start = end
    return layout


def tokens_of(image: TowerImage) -> int:
    """The number of visual tokens an image gives the decoder."""
    return image.grid[0] * image.grid[1]


def grid_of(image: TowerImage) -> Grid:
    """The image's grid of visual tokens, (t, h, w)."""
    return (1, *image.grid)


def _untracked(anatomy: Anatomy, counts: Sequence[int]) -> list[TowerImage]:
    """Images of the config's own size, for features that were computed before the hooks were in place."""
    config = getattr(anatomy.tower, "config", None)
    side = int(getattr(config, "image_size", 0) or 0) // int(getattr(config, "patch_size", 1) or 1)
    if side and all(count % (side * side) == 0 for count in counts):
        return [TowerImage((side, side)) for count in counts for _ in range(count // (side * side))]
    return [TowerImage((1, count)) for count in counts if count]


def _no_whole_images(counts: Sequence[int], image: TowerImage) -> VPruneError:
    h, w = image.grid
    return VPruneError(
        f"visual tokens per sample {list(counts)} are no whole images of {h * w} tokens ({h} x {w}): "
        "pass whole images in one prefill (prefill_chunk_size=None)"
    )
