"""Batches of any layout for the families of the tests, and Hypothesis strategies that draw layouts."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.exactness.families import LINED, VIDEOS, Layout, batch, lined_batch
from tests.exactness.more_families import made

SIDES = (8, 16, 24, 32, 40, 48)  # multiples of what Qwen merges into one token
TILED = (*SIDES, 64)  # InternVL cuts at 32


def made_batch(
    family: str, layout: Layout, dtype: torch.dtype = torch.float64, video: bool = False
) -> dict[str, Tensor]:
    """A batch of this layout in the shape that the family's processor makes."""
    if family in LINED:
        return lined_batch(layout, dtype, video, made(family, dtype))
    return batch(family, layout, dtype, video)


def pictures_in(layout: Layout) -> int:
    """The number of pictures (or videos) in all rows."""
    return sum(map(len, layout.sizes))


@st.composite
def layouts(draw: Any, family: str, video: bool = False) -> Layout:
    """One to four rows, each of up to three pictures and some words, and padding that all rows share."""
    sides = st.sampled_from(TILED if family == "internvl" else SIDES)
    rows = draw(st.integers(1, 4))
    sizes = [draw(st.lists(st.tuples(sides, sides), max_size=2 if video else 3)) for _ in range(rows)]
    if not any(sizes) and draw(st.integers(0, 4)):  # batches of words alone are drawn less often
        sizes[0] = [draw(st.tuples(sides, sides))]
    words = st.lists(st.integers(0, 8), min_size=rows, max_size=rows)
    return Layout(
        sizes=tuple(map(tuple, sizes)),
        before=tuple(draw(words)),
        after=tuple(draw(words)),
        padding=draw(st.sampled_from([0, 0, 1, 5])),
        frames=draw(st.integers(1, 3)) if video else 0,
    )


def videos_of(family: str) -> st.SearchStrategy[bool]:
    """Whether the pictures are videos, where the family has any."""
    return st.booleans() if family in VIDEOS else st.just(False)
