"""What happens in the vision tower: its images are watched, and made smaller where a method asks for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.hooks import RemovableHandle

from vprune import kernels
from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy
from vprune.models.merging import merge_side, merged_grid
from vprune.models.probe import Captured, capture
from vprune.records import TowerImage
from vprune.selection import cell_of_token

SmallGrid = Callable[[tuple[int, int]], tuple[int, int]]
Attention = Callable[[Captured, int], Tensor]
Entropy = Callable[[Tensor, int, str], Tensor]


@dataclass
class TowerWatch:
    """Hooks on one vision tower; `images` fills up as the tower runs, in the order in which it sees them.

    `fingerprints`: checksum the pixels. `attention_layer`: measure the attention that patches receive at that layer, as
        `attention` does from its queries and keys and the number of patches (None: the mean over heads, of the class
        token's or of all patches'). `entropy`: measure the pixels of every token, [images, 3, H, W], squares of so many
        pixels, for that type of tower.
    `keys`: keep that layer's keys of the patches, the mean over those that become one visual token.
    `small_grid`: resize the pixels so that the tower sees that grid (h', w') of patches instead of (h, w), and spread
        its output back over (h, w).
    """

    anatomy: Anatomy
    fingerprints: bool = False
    attention_layer: int | None = None
    attention: Attention | None = None
    entropy: Entropy | None = None
    keys: bool = False
    small_grid: SmallGrid | None = None
    images: list[TowerImage] = field(default_factory=list)
    _fresh: list[TowerImage] = field(default_factory=list)
    _side: int = 1  # patches along the side of a visual token

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks; the handles remove them.

        Raises:
            VPruneError: the tower lacks what the method needs of it.
        """
        tower = self.anatomy.tower
        if tower is None:
            if self.attention_layer is not None or self.small_grid is not None:
                raise VPruneError(f"{type(self.anatomy.base).__name__} has no vision tower that this method can use")
            return []
        watched = self._able(tower)  # refuse before the first hook is on
        handles = [tower.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.small_grid is not None:
            handles.append(tower.register_forward_hook(self._after))
        if watched is not None:
            handles.append(watched.register_forward_pre_hook(self._before_attention, with_kwargs=True))
        return handles

    def _able(self, tower: nn.Module) -> nn.Module | None:
        """The attention module to be watched, None if none is; refuses a tower that cannot do what is asked for."""
        tiled = isinstance(getattr(self.anatomy.base, "image_newline", None), Tensor)
        if tiled and self.attention_layer is not None:
            raise VPruneError(
                f"{type(self.anatomy.base).__name__} cuts pictures into tiles, whose attention cannot be put together "
                "on the grid that they make yet: choose another method, such as attention_max"
            )
        if self.small_grid is not None:
            if tiled:
                raise VPruneError(
                    f"{type(self.anatomy.base).__name__} cuts pictures into tiles: choose pool, not resize"
                )
            if "interpolate_pos_encoding" not in signature(tower.forward).parameters:
                raise VPruneError(
                    f"{type(tower).__name__} cannot interpolate its position encodings: choose pool instead of resize"
                )
        if self.attention_layer is None:
            return None
        attentions = self.anatomy.tower_attentions()
        if not -len(attentions) <= self.attention_layer < len(attentions):
            raise VPruneError(f"tower_layer={self.attention_layer}: the tower has layers 0 to {len(attentions) - 1}")
        return attentions[self.attention_layer]

    def forget(self) -> None:
        """Forget all images seen."""
        self.images.clear()
        self._fresh.clear()

    def keep_for_later(self) -> None:
        """What the tower has seen so far was seen before the forward that reads it."""
        for image in self.images:
            image.early = True

    def _before(self, tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        pixels: Tensor = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        self._fresh = self._packed(pixels, kwargs) if pixels.ndim == 2 else self._whole(tower, pixels, kwargs)
        self.images.extend(self._fresh)
        if self.small_grid is None:
            return None
        patch = patch_side(tower)
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        if pixels.ndim == 2 or self._fresh[0].grid[1:] != grid:
            raise VPruneError(f"{type(tower).__name__} merges its patches into larger tokens: choose pool, not resize")
        if (small := self.small_grid(grid)) == grid:
            return None
        for image in self._fresh:
            image.small_grid = small
        size = (small[0] * patch, small[1] * patch)
        # Interpolation of half-precision pixels is not implemented everywhere; a float32 copy of the pixels is cheap.
        smaller = interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False).to(
            pixels.dtype
        )
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
        if "pixel_values" in kwargs:
            return args, {**kwargs, "pixel_values": smaller}
        return (smaller, *args[1:]), kwargs

    def _whole(self, tower: nn.Module, pixels: Tensor, kwargs: dict[str, Any]) -> list[TowerImage]:
        """Pictures [images, channels, height, width], all of one size unless the tower is told sizes of their own.

        A tile of a larger picture is one as well.
        """
        if pixels.ndim != 4:
            raise VPruneError(
                f"{type(tower).__name__} takes pixels of shape {tuple(pixels.shape)}, "
                "not [images, channels, height, width]: this family of models is not supported yet"
            )
        patch = patch_side(tower)
        prints = fingerprints(pixels) if self.fingerprints else [0] * len(pixels)
        if kwargs.get("image_sizes") is not None:
            return self._padded(tower, torch.as_tensor(kwargs["image_sizes"]) // patch, prints)
        h, w = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        self._side = side = merge_side(self.anatomy.config, h * w)
        measured: Sequence[Tensor | None] = [None] * len(pixels)
        if self.entropy is not None:
            kind: Any = tower.config
            measured = list(self.entropy(pixels, patch * side, str(kind.model_type)))
        grid, call = (1, *merged_grid(self.anatomy.config, h, w)), self._next_call()
        return [
            TowerImage(grid, fingerprint, entropy=entropy, call=call)
            for fingerprint, entropy in zip(prints, measured, strict=True)
        ]

    def _padded(self, tower: nn.Module, sizes: Tensor, prints: Sequence[int]) -> list[TowerImage]:
        """Pictures of `sizes` (h, w) in patches, [images, 2], padded to one size: Pixtral sees all patches in a row."""
        if self.attention_layer is not None or self.small_grid is not None or self.entropy is not None:
            raise VPruneError(
                f"{type(tower).__name__} reads pictures of unequal sizes in one row, whose attention cannot be "
                "watched and whose pixels cannot be resized yet: choose another method, such as attention_max or pool"
            )
        call, config = self._next_call(), self.anatomy.config
        grids = [merged_grid(config, h, w) for h, w in sizes.tolist()]
        return [TowerImage((1, *grid), one, call=call) for grid, one in zip(grids, prints, strict=True)]

    def _packed(self, pixels: Tensor, kwargs: dict[str, Any]) -> list[TowerImage]:
        """Pictures and videos of any size as one row per patch, [patches, values], their grids beside them."""
        grids: Tensor | None = kwargs.get("grid_thw")
        if grids is None or self.attention_layer is not None:
            raise VPruneError(
                f"{type(self.anatomy.tower).__name__} reads packed patches {tuple(pixels.shape)}, "
                "whose attention cannot be watched yet: choose another method, such as attention_max"
            )
        sizes: list[tuple[int, int, int]] = [tuple(row) for row in grids.tolist()]
        side = merge_side(self.anatomy.config, 0)
        parts = torch.split(pixels, [math.prod(size) for size in sizes])
        prints = [fingerprints(part[None])[0] if self.fingerprints else 0 for part in parts]
        call = self._next_call()
        return [
            TowerImage((t, h // side, w // side), fingerprint, call=call)
            for (t, h, w), fingerprint in zip(sizes, prints, strict=True)
        ]

    def _next_call(self) -> int:
        return self.images[-1].call + 1 if self.images else 0

    def _after(self, tower: nn.Module, args: Any, output: Any) -> None:
        if not self._fresh or (small := self._fresh[0].small_grid) is None:
            return
        source = cell_of_token(self._fresh[0].grid, (1, *small))
        for name in ("last_hidden_state", "hidden_states"):
            value = output.get(name)
            if isinstance(value, tuple):
                output[name] = tuple(None if part is None else spread(part, source, small) for part in value)
            elif value is not None:
                output[name] = spread(value, source, small)

    def _before_attention(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._fresh and self._fresh[0].received is not None:
            return  # the capture below calls the module itself, and its hooks with it
        for image in self._fresh:
            image.received = torch.empty(0)
        caught = capture(attention, *args, **kwargs)
        if caught.key.shape[0] != len(self._fresh):
            raise VPruneError(
                f"{type(self.anatomy.tower).__name__} reads {len(self._fresh)} pictures in {caught.key.shape[0]} rows, "
                "whose attention cannot be told apart yet: choose another method, such as attention_max"
            )
        _, h, w = self._fresh[0].grid
        side = self._side
        patches = h * w * side * side
        measure = received_by_patches if self.attention is None else self.attention
        received = measure(caught, patches).float()
        tokens = received.view(-1, h, side, w, side).mean((2, 4)).flatten(1)
        for image, row in zip(self._fresh, tokens, strict=True):
            image.received = row
        if self.keys:
            squares = caught.key[:, :, -patches:].reshape(*caught.key.shape[:2], h, side, w, side, -1).mean((3, 5))
            for image, keys in zip(self._fresh, squares.flatten(2, 3).transpose(1, 2), strict=True):
                image.keys = keys


def received_by_patches(caught: Captured, patches: int) -> Tensor:
    """Attention that the patches receive, [images, patches]: from the class token if there is one, else from all."""
    # A class token stands before the patches; its own view of them is then the tower's opinion.
    has_class = caught.key.shape[2] > patches
    query = caught.query[:, :, :1] if has_class else caught.query
    return kernels.column_mass(query, caught.key, scale=caught.scale)[:, -patches:]


def patch_side(tower: nn.Module) -> int:
    """The side of a patch in pixels."""
    config: Any = tower.config
    size = config.patch_size
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def fingerprints(pixels: Tensor) -> list[int]:
    """A checksum of every image's pixel bits, the same whatever the batch."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[pixels.element_size()]
    sums: list[int] = pixels.detach().contiguous().view(kind).flatten(1).sum(1, dtype=torch.int64).tolist()
    return sums


def spread(hidden: Tensor, source: Tensor, small: Sequence[int]) -> Tensor:
    """Spread the rows of a small grid over the whole one; rows before the patches (a class token) stay."""
    before = hidden.shape[1] - small[0] * small[1]
    index = torch.cat([torch.arange(before), source + before])
    return hidden[:, index.to(hidden.device)]
