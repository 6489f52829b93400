"""Where a vision-language model keeps its parts, and which places of a prompt are visual."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vprune.errors import VPruneError
from vprune.models.merging import known_side, merged_grid
from vprune.records import Grid, TowerImage, VisualTokens

_TOWER_NAMES = ("vision_tower", "visual", "vision_model")
_ATTENTION_NAMES = ("self_attn", "attn", "attention")
_PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model instance that pruning touches.

    `base` merges image and text, `decoder` reads the result, `tower` sees the pixels; `token_ids` are the placeholders
    of pictures and of videos in `input_ids`; `config` is the whole model's. `head` turns hidden states into logits, and
    `ends` are the tokens that end an answer.
    """

    base: nn.Module
    decoder: nn.Module
    tower: nn.Module | None
    token_ids: tuple[int, ...]
    config: Any
    head: Any
    ends: tuple[int, ...] = ()

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder's layers, first to last."""
        layers: Sequence[nn.Module] = self.decoder.layers  # type: ignore[assignment]
        return layers

    @property
    def backend(self) -> str:
        """The decoder's attention implementation, e.g. `sdpa`."""
        return str(getattr(self.decoder.config, "_attn_implementation", None) or "eager")

    def kind_of(self, layer: int) -> str:
        """What the decoder's config calls a layer: `full_attention`, `sliding_attention` ..."""
        kinds = getattr(self.decoder.config, "layer_types", None)
        return str(kinds[layer]) if kinds else "full_attention"

    def window_of(self, layer: int) -> int | None:
        """How many columns a layer looks back, None if all."""
        config: Any = self.decoder.config
        return int(config.sliding_window) if self.kind_of(layer) == "sliding_attention" else None

    @property
    def has_windows(self) -> bool:
        """True when some layers look back a limited way."""
        return "sliding_attention" in (getattr(self.decoder.config, "layer_types", None) or ())

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
    ids = _placeholders(config)
    if not isinstance(model, nn.Module) or not ids or not hasattr(model, "get_decoder"):
        raise VPruneError(
            f"{type(model).__name__} is no vision-language model that can be pruned: {_what_to_pass(model)}"
        )
    find_decoder: Any = model.get_decoder
    decoder: nn.Module = find_decoder()
    # Whatever wraps the model (an adapter, say), the module that merges image and text is the one that holds the
    # decoder.
    base = next((part for part in model.modules() if any(child is decoder for child in part.children())), None)
    if base is None or not hasattr(decoder, "layers"):
        raise VPruneError(f"{type(model).__name__}: found no text decoder with layers of its own inside it")
    tower = next((part for name in _TOWER_NAMES if isinstance(part := getattr(base, name, None), nn.Module)), None)
    find_head: Any = model.get_output_embeddings
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (int(ends),)
    return Anatomy(base, decoder, tower, ids, config, find_head(), ends)


def _placeholders(config: Any) -> tuple[int, ...]:
    """The ids of the tokens that stand for pictures and videos."""
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(token for token in ids if isinstance(token, int))


def _what_to_pass(model: Any) -> str:
    """What to do about a model that is none, or that hides one."""
    for path, part in model.named_modules() if isinstance(model, nn.Module) else ():
        # (Its own config: a wrapper may pass on the names of what it wraps, and is not what is looked for.)
        if path and _placeholders(vars(part).get("config")) and hasattr(part, "get_decoder"):
            return f"it wraps one; prune and call what it holds as .{path} ({type(part).__name__})"
    return "its config names no image_token_id; load one with AutoModelForImageTextToText"


def refuse_compiled(model: Any) -> None:
    """Refuse a model whose forward was compiled as a whole: its graph would go on without the hooks put on now.

    Raises:
        VPruneError: it was.
    """
    parts = model.modules() if isinstance(model, nn.Module) else ()
    for part in parts:
        compiled_forward = hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable")
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None or compiled_forward:
            raise VPruneError(
                f"{type(part).__name__} was compiled as a whole, and its graph would not see pruning: prune the model "
                "as it was, and let generate(cache_implementation='static') compile the decoding steps"
            )


def carries_images(kwargs: Mapping[str, Any]) -> bool:
    """True when this forward brings images: a generated placeholder token alone is not visual."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    brought = [kwargs.get(name) for name in _PIXELS] + list(encoded.values())
    return any(one is not None for one in brought)


def visual_kinds(anatomy: Anatomy, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Mark the places of visual tokens, bool [kinds, B, L], from placeholders (or their embeddings)."""
    if input_ids is not None:
        return torch.stack([input_ids == token for token in anatomy.token_ids])
    assert inputs_embeds is not None
    decoder: Any = anatomy.decoder
    table: Tensor = decoder.get_input_embeddings()(torch.tensor(anatomy.token_ids).to(inputs_embeds.device))
    return torch.stack([(inputs_embeds == row).all(-1) for row in table])


def count_visual_tokens(model: Any, input_ids: Tensor) -> list[int]:
    """Count the visual tokens of every row of `input_ids` [B, L], without running the model.

    Raises:
        VPruneError: `model` is no vision-language model.
    """
    counts: list[int] = visual_kinds(dissect(model), input_ids, None).any(0).sum(-1).tolist()
    return counts


def newline_places(anatomy: Anatomy, hidden: Tensor) -> Tensor | None:
    """Where the decoder's inputs [B, L, D] hold a learned line break, bool [B, L]; None if the model has none."""
    newline = getattr(anatomy.base, "image_newline", None)
    return (hidden == newline.to(hidden)).all(-1) if isinstance(newline, Tensor) else None


def visual_layout(
    anatomy: Anatomy, kinds: Sequence[Tensor], tower: Sequence[TowerImage], newlines: Tensor | None = None
) -> list[VisualTokens]:
    """Group the visual tokens of a batch into images, flat over rows and their images, in order.

    `kinds` holds the places of pictures and of videos, bool [B, L] each on the CPU; `tower` what the vision tower saw,
    pictures in a run before the videos; `newlines` bool [B, L] the line breaks among them, which belong to no image.

    Raises:
        VPruneError: the visual tokens of a row are not a whole number of images, as in chunked prefill.
    """
    if newlines is not None:
        return _lined(anatomy, kinds, tower, newlines)
    present = [places for places in kinds if bool(places.any())]
    calls = sorted({image.call for image in tower})
    if len(present) <= 1 or len(calls) < len(present):
        joined = torch.stack(list(kinds)).any(0)
        return _grouped(anatomy, joined, tower, 0)
    layout: list[VisualTokens] = []
    for places, call in zip(present, calls[-len(present) :], strict=True):
        first = next(number for number, image in enumerate(tower) if image.call == call)
        layout += _grouped(anatomy, places, [image for image in tower if image.call == call], first)
    layout.sort(key=lambda image: (image.sample, int(image.columns[0])))
    numbered, counts = [], dict.fromkeys(range(kinds[0].shape[0]), 0)
    for image in layout:
        numbered.append(replace(image, image=counts[image.sample]))
        counts[image.sample] += 1
    return numbered


def _lined(
    anatomy: Anatomy, kinds: Sequence[Tensor], tower: Sequence[TowerImage], newlines: Tensor
) -> list[VisualTokens]:
    """Images of models that end lines with a learned row: an overview, then lines of a finer grid; frames of a video.

    Overview and finer grid count as an image each: both are rectangles.
    """
    whole = tower[-1] if tower else own_size(anatomy)
    if whole is None:
        raise VPruneError(f"{type(anatomy.base).__name__}: its config does not say how large a tile is")
    layout: list[VisualTokens] = []
    for row in range(newlines.shape[0]):
        blocks: list[tuple[Tensor, Grid, int]] = []
        for number, places in enumerate(kinds):
            # In numpy: torch would wake all cores for each of these, and the device has nothing to do meanwhile.
            own = np.flatnonzero(places[row].numpy())
            ends: list[int] = np.flatnonzero(newlines[row].numpy()[own]).tolist()
            columns = torch.from_numpy(own)
            if (ends[-1] + 1 if ends else 0) != columns.numel():
                raise _no_whole_images(anatomy, [columns.numel()], whole)
            start = 0
            while ends:
                if number == 1:
                    found, start, ends = _frames(anatomy, columns, start, ends, whole)
                else:
                    found, start, ends = _overview_and_lines(anatomy, columns, start, ends, whole)
                blocks += [(part, grid, int(found[0][0][0])) for part, grid in found]
        blocks.sort(key=lambda block: int(block[0][0]))
        layout += [
            VisualTokens(row, number, columns, grid, picture=picture)
            for number, (columns, grid, picture) in enumerate(blocks)
        ]
    return layout


_Blocks = tuple[list[tuple[Tensor, Grid]], int, list[int]]  # rectangles found, where to go on, line breaks left


def _frames(anatomy: Anatomy, columns: Tensor, start: int, ends: list[int], whole: TowerImage) -> _Blocks:
    """One video: frames halved in both directions, one line break at its end."""
    h, w = (-(-side // 2) for side in whole.grid[1:])
    size = ends[0] - start
    if not size or size % (h * w):
        raise _no_whole_images(anatomy, [size], TowerImage((1, h, w)))
    return [(columns[start : ends[0]], (size // (h * w), h, w))], ends[0] + 1, ends[1:]


def _overview_and_lines(anatomy: Anatomy, columns: Tensor, start: int, ends: list[int], whole: TowerImage) -> _Blocks:
    """One picture: the overview, and, unless it was small, lines of equal width with a break at the end of each."""
    size = tokens_of(whole)
    width = ends[0] - start - size
    if width < 0:
        raise _no_whole_images(anatomy, [ends[0] - start], whole)
    overview = (columns[start : start + size], whole.grid)
    if width == 0:
        return [overview], ends[0] + 1, ends[1:]
    lines = 1
    while lines < len(ends) and ends[lines] == ends[0] + lines * (width + 1):
        lines += 1
    after = start + size + lines * (width + 1)
    finer = columns[start + size : after].view(lines, width + 1)[:, :width].flatten()
    return [overview, (finer, (1, lines, width))], after, ends[lines:]


def _grouped(anatomy: Anatomy, visual: Tensor, tower: Sequence[TowerImage], first_origin: int) -> list[VisualTokens]:
    """The images of one kind, whose places are `visual`; the first of `tower` is the `first_origin`-th of all seen.

    Beams repeat each row (its images with it) after the tower has run, so the tower may have seen a whole fraction of
    the images that stand in the prompt.
    """
    counts: list[int] = visual.sum(-1).tolist()
    total = sum(counts)
    # Features made before this forward: pictures encoded but never read (an interrupted call) come first, and rows may
    # have been repeated since. Whole runs of the tower go or stay: part of one would mean that the sizes are wrong.
    seen = list(tower)
    while seen and seen[0].early and total % sum(map(tokens_of, seen)):
        seen = [image for image in seen if image.call != seen[0].call]
    dropped = len(tower) - len(seen)
    if seen:
        repeats, rest = divmod(total, sum(map(tokens_of, seen)))
        if rest or not repeats or (repeats > 1 and not (seen[0].early and _copies(visual, repeats))):
            raise _no_whole_images(anatomy, counts, seen[0])
    elif tower and total:
        raise _no_whole_images(anatomy, counts, tower[-1])
    else:
        repeats, seen = 1, _untracked(anatomy, counts)
    tiled = isinstance(getattr(anatomy.config, "downsample_ratio", None), float)  # InternVL
    placed: list[tuple[int, int, int]] = []  # row, number in it, number in `seen`
    start = 0
    for first in range(0, len(counts), repeats):
        taken, end = 0, start
        while taken < counts[first]:
            taken, end = taken + tokens_of(seen[end]), end + 1
        if taken != counts[first]:
            raise _no_whole_images(anatomy, counts, seen[0])
        for row in range(first, first + repeats):
            placed += [(row, number, start + number) for number in range(end - start)]
        start = end
    # One look at all columns: batches of hundreds of images are read in training.
    columns = visual.nonzero()[:, 1]
    sizes = [tokens_of(seen[index]) for _, _, index in placed]
    ends = torch.tensor(sizes, dtype=torch.long).cumsum(0)
    firsts, lasts = columns[ends - torch.tensor(sizes, dtype=torch.long)].tolist(), columns[ends - 1].tolist()
    layout: list[VisualTokens] = []
    for place, ((row, number, index), own) in enumerate(zip(placed, torch.split(columns, sizes), strict=True)):
        picture = firsts[place]
        if tiled and number and picture == lasts[place - 1] + 1:
            picture = layout[-1].picture  # tiles of one picture follow each other without a gap
        origin = index + dropped + first_origin if tower else -1
        layout.append(VisualTokens(row, number, own, seen[index].grid, origin, picture=picture))
    return layout


def _copies(visual: Tensor, repeats: int) -> bool:
    """True if every row of `visual` [B, L] stands there `repeats` times in a row."""
    if visual.shape[0] % repeats:
        return False
    groups = visual.view(-1, repeats, visual.shape[1])
    return bool((groups == groups[:, :1]).all())


def tokens_of(image: TowerImage) -> int:
    """The number of visual tokens an image gives the decoder."""
    return math.prod(image.grid)


def own_size(anatomy: Anatomy) -> TowerImage | None:
    """An image of the config's own size, None if the config does not tell."""
    config = getattr(anatomy.tower, "config", None)
    pixels, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(pixels, int) or not isinstance(patch, int):
        return None
    return TowerImage((1, *merged_grid(anatomy.config, pixels // patch, pixels // patch)))


def _untracked(anatomy: Anatomy, counts: Sequence[int]) -> list[TowerImage]:
    """Images of the config's own size, for features that were computed before the hooks were in place."""
    own = own_size(anatomy)
    if own is not None and all(count % tokens_of(own) == 0 for count in counts):
        return [own] * (sum(counts) // tokens_of(own))
    return [TowerImage((1, 1, count)) for count in counts if count]


def _no_whole_images(anatomy: Anatomy, counts: Sequence[int], image: TowerImage) -> VPruneError:
    shape = " x ".join(map(str, image.grid if image.grid[0] > 1 else image.grid[1:]))
    # A config that names no merging means that there is none, or that it is of a kind that nobody has met.
    unnamed = known_side(anatomy.config, tokens_of(image)) is None
    return VPruneError(
        f"visual tokens per sample {list(counts)} are no whole images of {tokens_of(image)} tokens ({shape}): "
        "pass whole images in one prefill (prefill_chunk_size=None)"
        + "; a model that merges patches in a way that its config does not name cannot be pruned yet"
        * unnamed
    )
