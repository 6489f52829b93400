"""Masks drawn over their image, and the map that they come from beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vprune.errors import VPruneError
from vprune.segmentation.masks import colour_of

if TYPE_CHECKING:
    from vprune.segmentation.masks import Masks

_LONG_SIDE = (448, 1600)  # an overlay is at least and at most so large, in pixels
_GAP = 8
_HEAT = np.array([(13, 8, 60), (84, 15, 109), (187, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64)


def draw_masks(masks: Masks, image: Image.Image, points: bool = True) -> Image.Image:
    """The image with its masks; to its right the mean attention, where the masks carry one.

    Raises:
        VPruneError: the image is of another size than the one that was segmented.
    """
    if image.size != (masks.size[1], masks.size[0]):
        raise VPruneError(f"overlay: masks of {masks.size[1]} x {masks.size[0]} pixels on an image of {image.size}")
    longest = max(image.size)
    scale = min(max(1.0, _LONG_SIDE[0] / longest), _LONG_SIDE[1] / longest)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)
    painted = canvas.copy()
    for row, mask in reversed(list(enumerate(masks.array))):
        shown = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
        inside = np.asarray(shown) > 127
        inner = inside & np.roll(inside, 2, 0) & np.roll(inside, -2, 0) & np.roll(inside, 2, 1) & np.roll(inside, -2, 1)
        colour = np.array(colour_of(row), dtype=np.float64)
        painted[inside] = 0.55 * painted[inside] + 0.45 * colour
        painted[inside & ~inner] = colour
    sheet = Image.fromarray(painted.round().astype(np.uint8))
    _label(sheet, masks, scale, points)
    if masks.heat is None:
        return sheet
    both = Image.new("RGB", (2 * size[0] + _GAP, size[1]), (255, 255, 255))
    both.paste(sheet, (0, 0))
    both.paste(_heat(masks.heat, canvas), (size[0] + _GAP, 0))
    return both


def _label(sheet: Image.Image, masks: Masks, scale: float, points: bool) -> None:
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for row in range(len(masks)):
        if points and masks.points:
            for (x, y), sign in zip(masks.points[row] * scale, masks.signs[row], strict=True):
                fill = (40, 220, 60) if sign > 0 else (230, 40, 40)
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=fill, outline=(255, 255, 255))
        text = f"{masks.names[row]} {masks.scores[row]:.2f}"
        x, y = (float(v) for v in masks.boxes[row][:2] * scale)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        x = max(0.0, min(x, sheet.width - (right - left) - 4))
        y = max(0.0, y - (bottom - top) - 6)
        pen.rectangle((x, y, x + right - left + 4, y + bottom - top + 5), fill=colour_of(row))
        pen.text((x + 2, y + 2 - top), text, fill=(255, 255, 255), font=font)


def _heat(heat: NDArray[np.float32], canvas: NDArray[np.float64]) -> Image.Image:
    low, high = float(heat.min()), float(np.quantile(heat, 0.995))
    level = np.clip((heat - low) / max(high - low, 1e-12), 0, 1)
    size = (canvas.shape[1], canvas.shape[0])
    smooth = Image.fromarray(level.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(smooth, dtype=np.float64), 0, 1)
    steps = np.linspace(0.0, 1.0, len(_HEAT))
    colours = np.stack([np.interp(values, steps, _HEAT[:, channel]) for channel in range(3)], -1)
    mixed = 0.4 * canvas.mean(-1, keepdims=True) + 0.6 * colours
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
