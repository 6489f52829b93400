"""Boxes in answers: read from text, and compared with masks."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

SCALES = ("unit", "thousand", "pixels")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_FOUR = re.compile(rf"{_NUMBER}\D{{1,4}}?{_NUMBER}\D{{1,4}}?{_NUMBER}\D{{1,4}}?{_NUMBER}")


def read_box(prediction: str, scale: str, width: int, height: int) -> tuple[float, float, float, float] | None:
    """The first four numbers of a prediction as `(x0, y0, x1, y1)` in pixels of an image, None where there are none.

    `scale` says what the model writes: "unit" 0 to 1, "thousand" 0 to 1000, "pixels" of the image. Corners in the wrong
    order are turned round.

    >>> read_box("[0.1, 0.2, 0.5, 0.4]", "unit", 100, 50)
    (10.0, 10.0, 50.0, 20.0)
    """
    found = _FOUR.search(prediction)
    if found is None:
        return None
    x0, y0, x1, y1 = (float(number) for number in found.groups())
    if scale != "pixels":
        whole = 1000.0 if scale == "thousand" else 1.0
        x0, y0, x1, y1 = x0 / whole * width, y0 / whole * height, x1 / whole * width, y1 / whole * height
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def box_mask(box: tuple[float, float, float, float], width: int, height: int) -> NDArray[np.bool_]:
    """The pixels whose centres lie in a box, bool `[height, width]`."""
    x0, y0, x1, y1 = box
    across, down = np.arange(width) + 0.5, np.arange(height) + 0.5
    return ((down >= y0) & (down <= y1))[:, None] & ((across >= x0) & (across <= x1))[None, :]


def mask_iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of the same size; 1.0 for two empty ones."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0
