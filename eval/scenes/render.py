"""Paints batches of scenes with torch: signed-distance shapes and numbers over crops of photographs.

Everything is vectorised over the batch, so the same function fills a GPU in training and writes the test split on a
CPU. Each object is painted into a 128 x 128 window around its centre, not over the whole image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from vprune.eval.scenes.world import DARK_TEXT, MAX_OBJECTS, RGB, SHAPES, SIDE, Scene

WINDOW = 128
"""Side of the painted window in pixels: 2 x 1.28 radii of the largest object."""
EXTENT = 1.3
"""Half-width, in radii, of the table of signed distances."""
TABLE = 160
TEXT_HEIGHT = (0.46, 0.46, 0.38, 0.34, 0.34, 0.0, 0.40, 0.38)
"""Half-height of a number in radii, by shape in the order of SHAPES: what fits inside."""
TEXT_SHIFT = (0.0, 0.0, 0.22, 0.06, 0.0, 0.0, -0.08, 0.0)
OUTLINE = 2.0
"""Width of an object's outline in pixels."""
WORLD = Path(__file__).parents[2] / "assets" / "world"


@dataclass(frozen=True)
class Batch:
    """Scenes as tensors: `objects` [B, 8, 12] and `background` [B, 12], float32."""

    objects: Tensor
    background: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.objects.to(device, non_blocking=True), self.background.to(device, non_blocking=True))


# Columns of Batch.objects.
PRESENT, SHAPE, COLOUR, X, Y, RADIUS, COS, SIN, NUMBER, TONE = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9
OBJECT_FIELDS = 12
BACKGROUND_FIELDS = 12


def pack(scenes: Sequence[Scene]) -> Batch:
    """Turns scenes into the tensors that `render` takes."""
    objects = np.zeros((len(scenes), MAX_OBJECTS, OBJECT_FIELDS), dtype=np.float32)
    objects[:, :, NUMBER] = -1
    background = np.zeros((len(scenes), BACKGROUND_FIELDS), dtype=np.float32)
    for b, scene in enumerate(scenes):
        for k, o in enumerate(scene.objects):
            number = -1 if o.number is None else o.number
            cos, sin = math.cos(o.angle), math.sin(o.angle)
            objects[b, k] = (1, o.shape, o.colour, o.x, o.y, o.radius, cos, sin, number, *o.tone)
        g = scene.background
        background[b] = (
            *(g.photograph, *g.centre, g.zoom, math.cos(g.turn), math.sin(g.turn), -1 if g.mirror else 1),
            *(*g.gain, g.bias, g.mixed_with + min(g.mix, 0.999)),
        )
    return Batch(torch.from_numpy(objects), torch.from_numpy(background))


class Painter:
    """Renders packed scenes over one set of photographs on one device.

    Args:
        photographs: `train` or `test`: the set of photographs under the world's assets. No photograph is in both.
        device: where to paint.
        compiled: fuse the painting with torch.compile, for training on a GPU.
    """

    def __init__(self, photographs: str, device: torch.device | str = "cpu", compiled: bool = False) -> None:
        self.device = torch.device(device)
        self.photographs = load_photographs(photographs).to(self.device)
        self.shapes = shape_distances().to(self.device)
        self.numbers = number_masks().to(self.device)
        self.rgb = torch.tensor(RGB, dtype=torch.float32, device=self.device)
        self.ink = torch.tensor([20.0 if c in DARK_TEXT else 250.0 for c in range(len(RGB))], device=self.device)
        self.text_height = torch.tensor(TEXT_HEIGHT, device=self.device)
        self.text_shift = torch.tensor(TEXT_SHIFT, device=self.device)
        self.paint = torch.compile(self._paint, dynamic=False) if compiled else self._paint

    def render(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Paints the scenes.

        Returns:
            images uint8 [B, 3, 384, 384] and, for every pixel, the index of the object seen there or -1: int8
            [B, 384, 384].
        """
        batch = batch.to(self.device)
        half = WINDOW // 2
        size = len(batch.objects)
        padded = SIDE + 2 * half
        canvas = pad(self._backgrounds(batch.background), (half, half, half, half)).permute(0, 2, 3, 1).contiguous()
        seen = torch.full((size, padded, padded), -1, dtype=torch.int8, device=self.device)
        offsets = torch.arange(WINDOW, device=self.device)
        rows = torch.arange(size, device=self.device)[:, None, None]
        for k in range(MAX_OBJECTS):
            o = batch.objects[:, k]
            top = o[:, Y].long()
            left = o[:, X].long()
            ys = (top[:, None] + offsets)[:, :, None]
            xs = (left[:, None] + offsets)[:, None, :]
            colour, alpha = self.paint(o, ys - half, xs - half)
            under = canvas[rows, ys, xs]
            canvas[rows, ys, xs] = torch.lerp(under, colour, alpha[..., None])
            seen[rows, ys, xs] = torch.where(
                alpha > 0.5, torch.tensor(k, dtype=torch.int8, device=self.device), seen[rows, ys, xs]
            )
        inner = slice(half, half + SIDE)
        images = canvas[:, inner, inner].permute(0, 3, 1, 2)
        return images.round().clamp(0, 255).to(torch.uint8), seen[:, inner, inner]

    def _paint(self, o: Tensor, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        """Colour [B, W, W, 3] and coverage [B, W, W] of one object a scene, on the pixels (ys, xs)."""
        column = o[:, :, None, None]
        dx = xs + 0.5 - column[:, X]
        dy = ys + 0.5 - column[:, Y]
        u = (column[:, COS] * dx + column[:, SIN] * dy) / column[:, RADIUS].clamp(min=1)
        v = (column[:, COS] * dy - column[:, SIN] * dx) / column[:, RADIUS].clamp(min=1)
        shape, colour = o[:, SHAPE].long(), o[:, COLOUR].long()
        distance = _look_up(self.shapes, shape, u / EXTENT, v / EXTENT) * column[:, RADIUS]
        alpha = (0.5 - distance).clamp(0, 1) * column[:, PRESENT]
        base = (self.rgb[colour] + o[:, TONE : TONE + 3])[:, None, None, :]
        fill = base * (1 - 0.07 * u - 0.11 * v)[..., None]
        edge = torch.where(base.mean(-1, keepdim=True) < 60, base + 110, base * 0.5)
        border = (distance + OUTLINE + 0.5).clamp(0, 1)[..., None]
        fill = torch.lerp(fill, edge.expand_as(fill), border)
        height = self.text_height[shape][:, None, None].clamp(min=0.1)
        shift = self.text_shift[shape][:, None, None]
        number = o[:, NUMBER].long()
        ink = _look_up(self.numbers, number.clamp(min=0), u / (height * 4 / 3), (v - shift) / height, outside=0.0)
        ink = ink * (number >= 0)[:, None, None]
        return torch.lerp(fill, self.ink[colour][:, None, None, None].expand_as(fill), ink[..., None]), alpha

    def _backgrounds(self, g: Tensor) -> Tensor:
        """Crops of photographs, turned, mirrored and recoloured: float32 [B, 3, 384, 384] in 0..255."""
        half = g[:, 3] / 2
        centre = 2 * (half[:, None] + (1 - 2 * half[:, None]) * g[:, 1:3]) - 1
        line = (torch.arange(SIDE, device=g.device) + 0.5) * (2 / SIDE) - 1
        y, x = torch.meshgrid(line, line, indexing="ij")
        cos, sin, scale, mirror = (t[:, None, None] for t in (g[:, 4], g[:, 5], g[:, 3], g[:, 6]))
        grid = torch.stack((scale * mirror * (cos * x - sin * y), scale * (sin * x + cos * y)), dim=-1)
        grid = grid + centre[:, None, None, :]
        mixed, mix = g[:, 11].long(), g[:, 11].frac()[:, None, None, None]
        crops = self._crop(g[:, 0].long(), grid)
        if bool((mix > 0).any()):
            crops = torch.lerp(crops, self._crop(mixed, -grid), mix)
        return crops * g[:, 7:10, None, None] + g[:, 10, None, None, None]

    def _crop(self, index: Tensor, grid: Tensor) -> Tensor:
        out = torch.empty(len(index), 3, SIDE, SIDE, device=grid.device)
        for i in range(0, len(index), 64):  # 64 photographs at a time: 200 MB as float32
            part = slice(i, i + 64)
            photographs = self.photographs[index[part]].float()
            out[part] = grid_sample(photographs, grid[part], padding_mode="reflection", align_corners=False)
        return out


def _look_up(tables: Tensor, index: Tensor, u: Tensor, v: Tensor, outside: float | None = None) -> Tensor:
    """Bilinear look-up at (u, v) in -1..1 of table `index` [B] of [T, H, W]; beyond it the border or `outside`."""
    height, width = tables.shape[1:]
    x = ((u + 1) * (width / 2) - 0.5).clamp(0, width - 1.001)
    y = ((v + 1) * (height / 2) - 0.5).clamp(0, height - 1.001)
    x0, y0 = x.long(), y.long()
    fx, fy = x - x0, y - y0
    flat = tables.flatten()
    at = (index[:, None, None] * height + y0) * width + x0
    top = torch.lerp(flat[at], flat[at + 1], fx)
    bottom = torch.lerp(flat[at + width], flat[at + width + 1], fx)
    value = torch.lerp(top, bottom, fy)
    if outside is None:
        return value
    return torch.where((u.abs() < 1) & (v.abs() < 1), value, outside)


def load_photographs(split: str) -> Tensor:
    """The photographs of `train` or `test` as uint8 [P, 3, 512, 512], in the order of their names."""
    files = sorted((WORLD / "photographs" / split).glob("*.webp"))
    arrays = [np.asarray(Image.open(f).convert("RGB")) for f in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def photograph_names(split: str) -> list[str]:
    """Names of the photographs of `train` or `test`."""
    return [f.stem for f in sorted((WORLD / "photographs" / split).glob("*.webp"))]


@functools.cache
def shape_distances() -> Tensor:
    """Signed distance to each shape's outline in radii, negative inside, on a grid of -1.3..1.3: [8, 160, 160]."""
    line = ((torch.arange(TABLE, dtype=torch.float64) + 0.5) * (2 / TABLE) - 1) * EXTENT
    v, u = torch.meshgrid(line, line, indexing="ij")
    radius = torch.hypot(u, v)
    tables = {
        "circle": radius - 0.94,
        "square": _box(u, v, 0.82, 0.82),
        "triangle": _polygon(u, v, _regular(3, 1.08, 1.08)),
        "star": _polygon(u, v, _regular(5, 1.1, 0.46)),
        "cross": torch.minimum(_box(u, v, 0.98, 0.34), _box(u, v, 0.34, 0.98)),
        "ring": (radius - 0.7).abs() - 0.26,
        "heart": _polygon(u, v, _heart()),
        "diamond": _polygon(u, v, [(0, -1.1), (0.78, 0), (0, 1.1), (-0.78, 0)]),
    }
    return torch.stack([tables[name] for name in SHAPES]).float()


def _box(u: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    x, y = u.abs() - a, v.abs() - b
    return torch.hypot(x.clamp(min=0), y.clamp(min=0)) + torch.maximum(x, y).clamp(max=0)


def _regular(points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    """A regular polygon (inner = outer) or star, first point up."""
    count = points if inner == outer else 2 * points
    radii = [outer if i % 2 == 0 or inner == outer else inner for i in range(count)]
    return [
        (r * math.sin(2 * math.pi * i / count), -r * math.cos(2 * math.pi * i / count)) for i, r in enumerate(radii)
    ]


def _heart() -> list[tuple[float, float]]:
    ts = [2 * math.pi * i / 48 for i in range(48)]
    x = [16 * math.sin(t) ** 3 / 16.5 for t in ts]
    y = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5 - 0.12 for t in ts]
    return list(zip(x, y, strict=True))


def _polygon(u: Tensor, v: Tensor, corners: Sequence[tuple[float, float]]) -> Tensor:
    nearest = torch.full_like(u, torch.inf)
    inside = torch.zeros_like(u, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        t = (((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, torch.hypot(u - ax - t * ex, v - ay - t * ey))
        if ey != 0:
            inside ^= ((ay > v) != (by > v)) & (u < ax + (v - ay) * ex / ey)
    return torch.where(inside, -nearest, nearest)


@functools.cache
def number_masks() -> Tensor:
    """Coverage of the numbers 0..99, one or two digits centred in a 4:3 box: float32 [100, 48, 64] in 0..1."""
    sheet = np.asarray(Image.open(WORLD / "digits.png").convert("L"), dtype=np.float32) / 255
    digits = np.split(sheet, 10, axis=1)
    height = len(sheet)
    masks = np.zeros((100, 48, 64), dtype=np.float32)
    for n in range(100):
        text = np.concatenate([digits[int(d)] for d in str(n)], axis=1)
        top, left = (48 - height) // 2, (64 - text.shape[1]) // 2
        masks[n, top : top + height, left : left + text.shape[1]] = text
    return torch.from_numpy(masks)
