"""The nouns: what a prefill shows to a method, what a method decides, and what is reported of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vprune.errors import VPruneError

if TYPE_CHECKING:
    from PIL import Image

    from vprune.models.anatomy import Anatomy
    from vprune.models.cache import StoredRows

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image's visual tokens, (t, h, w); t * h * w tokens in raster order."""


@dataclass(frozen=True)
class Selection:
    """Which rows stand for an image's N visual tokens after pruning.

    `kept` LongTensor [K] ascending: the original indices at which the K remaining rows stand; `source` LongTensor [N]:
    for every token the row (0..K-1) that now stands for it, -1 = dropped; `weights` [N]: its share in that row, one in
    total per row; `sizes` LongTensor [K]: how many tokens each row stands for; `mass` float [K], at least 1: what each
    counts where sizes do in attention, None = its size. All on the CPU.
    """

    kept: Tensor
    source: Tensor
    weights: Tensor
    sizes: Tensor
    mass: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.kept.numel() == self.sizes.numel() and self.source.numel() == self.weights.numel()

    @property
    def is_identity(self) -> bool:
        """True when every token stays as it is."""
        return self.kept.numel() == self.source.numel()

    @classmethod
    def pure(cls, kept: Tensor, tokens: int) -> Selection:
        """The selection that keeps `kept` (LongTensor [K], ascending) of `tokens` untouched and drops the rest."""
        source = torch.full((tokens,), -1, dtype=torch.long)
        source[kept] = torch.arange(kept.numel())
        return cls(kept, source, (source >= 0).to(torch.float64), torch.ones_like(kept))

    @classmethod
    def grouped(
        cls, kept: Tensor, source: Tensor, sizes: Tensor | None = None, shares: Tensor | None = None
    ) -> Selection:
        """The selection whose row r, standing at `kept[r]`, is the mean of the tokens with `source == r`.

        `sizes` LongTensor [N]: how many tokens each of them stands for already, None = itself. `shares` [N]: what each
        token counts in its mean beside its size, None = the same; negative and not-a-number count nothing, and where
        all of a row do, they count the same.
        """
        own = torch.ones_like(source) if sizes is None else sizes
        stays, row = source >= 0, source.clamp(min=0)
        own = torch.where(stays, own, 0)
        total = torch.zeros_like(kept).index_add(0, row, own)
        weights = own.to(torch.float64) / total[row]
        if shares is not None:
            counted = own * shares.to(torch.float64).nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)
            sums = torch.zeros(kept.numel(), dtype=torch.float64).index_add(0, row, counted)[row]
            weights = torch.where(sums > 0, counted / sums.clamp(min=1e-300), weights)
        return cls(kept, source, weights, total)

    def then(self, later: Selection) -> Selection:
        """Follow this selection by another one of the rows that it left."""
        row = self.source.clamp(min=0)
        stays = self.source >= 0
        source = torch.where(stays, later.source[row], -1)
        weights = torch.where(source >= 0, self.weights * later.weights[row], 0.0)
        sizes = torch.zeros_like(later.kept).index_add(
            0, later.source[later.source >= 0], self.sizes[later.source >= 0]
        )
        return Selection(self.kept[later.kept], source, weights, sizes, later.mass)


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image in one row of the batch.

    `columns` holds their places in that row (LongTensor [N] on the CPU, ascending), `origin` the image's place among
    the images the vision tower encoded (beams repeat an image, the tower sees it once), -1 where the tower was not
    watched. `picture` is the same for the tiles of one picture. `standing` tells what earlier stages left of the image
    (columns are then [K]), None = all of it.
    """

    sample: int
    image: int
    columns: Tensor
    grid: Grid
    origin: int = -1
    picture: int = -1
    standing: Selection | None = None

    def __len__(self) -> int:
        return int(self.columns.numel())


@dataclass
class TowerImage:
    """What was seen of one image on its way through the vision tower.

    `grid` is the grid (t, h, w) of the visual tokens that it becomes; `fingerprint` a checksum of the pixels,
    `received` the attention its tokens' patches receive, `entropy` that of their pixels (both float32 [t * h * w]),
    `keys` those of the patches in the same layer ([t * h * w, heads, d] on the tower's device) and `small_grid` the
    grid (h', w') it was resized to, each only when the method asked for it. `call` numbers the runs of
    the tower: pictures and videos are read in runs of their own. `early` tells that it ran before the forward that
    reads what it made, as `generate` does it.
    """

    grid: Grid
    fingerprint: int = 0
    received: Tensor | None = None
    entropy: Tensor | None = None
    keys: Tensor | None = None
    small_grid: tuple[int, int] | None = None
    call: int = 0
    early: bool = False


@dataclass
class Prefill:
    """All that a scorer may look at, just before a decoder layer: the first one, or that of a later stage.

    `hidden` [B, L, D] is what decoder layer `layer` is about to read, `positions` its position ids ([B, L] or [rows, B,
    L]), `valid` and `visual` bool [B, L] mark what is no padding and what is a visual token. The cache already stores
    `stored` rows of earlier turns, of which `past` is known. Visual features are added after each of the first
    `deepstack` layers, too. `start` is the prefill as it was before the first layer, None there. `tower` lists the
    images that the vision tower saw, `evidence` what `Pruning.evidence` was.
    """

    anatomy: Anatomy
    hidden: Tensor
    positions: Tensor
    valid: Tensor
    visual: Tensor
    images: Sequence[VisualTokens]
    tower: Sequence[TowerImage]
    evidence: Sequence[Any] | None
    cache: Any
    stored: int
    past: StoredRows
    deepstack: int = 0
    layer: int = 0
    start: Prefill | None = None


@dataclass(frozen=True)
class StageReport:
    """What an image has become after one stage, before decoder layer `layer`; names as in `ImageReport`.

    `importance` float32 [t, h, w], NaN where nothing stood any more.
    """

    layer: int
    importance: Tensor | None
    kept: Tensor
    source: Tensor
    sizes: Tensor
    tokens_after: int


@dataclass(frozen=True)
class ImageReport:
    """What a prefill did to one image.

    `sample`, `image`: the row of the batch and the image's number in it. `grid` (t, h, w). `importance` float32 [t, h,
    w], None for methods without one. `kept` LongTensor [tokens_after], ascending indices among the image's visual
    tokens of the rows that remain (a merged row counts where it stands). `source` LongTensor [tokens_before]: the index
    of the row that now stands for the token, -1 = dropped. `sizes` LongTensor [tokens_after]. `seconds`: scoring,
    selecting and recycling of the whole prefill, shared by its images. `stages`: what each stage decided, first to
    last; all else is what they come to together (`importance`: of the first stage that has one). `layers`: how many the
    decoder has.
    """

    sample: int
    image: int
    grid: Grid
    importance: Tensor | None
    kept: Tensor
    source: Tensor
    sizes: Tensor
    tokens_before: int
    tokens_after: int
    seconds: float
    method: str = ""
    stages: tuple[StageReport, ...] = ()
    layers: int = 1

    @property
    def mean_tokens(self) -> float:
        """How many rows of the image a layer reads, in the mean over all layers; `tokens_after` if all read as many."""
        ends = [*(stage.layer for stage in self.stages), self.layers]
        rows = [self.tokens_before, *(stage.tokens_after for stage in self.stages)]
        starts = [0, *ends[:-1]]
        return sum(row * (end - start) for row, start, end in zip(rows, starts, ends, strict=True)) / self.layers

    def draw(self, image: Image.Image | None = None) -> Image.Image:
        """Draw the heat map over the image and, beside it, the tokens that stay (the pruned ones greyed)."""
        from vprune.draw import draw_image

        return draw_image(self, image)

    def describe(self) -> str:
        """Say in words what was kept and where the importance lies."""
        from vprune.draw import describe_image

        return describe_image(self)


class PruneReport(Sequence[ImageReport]):
    """The report of one prefill: a sequence of `ImageReport`, flat over samples and their images.

    With exactly one image its attributes are reachable directly (`report.kept`). Beams and several return sequences
    repeat every sample in the prefill, and the report holds every repetition as a sample of its own.

    Raises:
        VPruneError: an image's attribute is asked of a report of several images (or of none): use `report[i]`.
    """

    def __init__(self, images: Sequence[ImageReport], seconds: float) -> None:
        self._images = tuple(images)
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[ImageReport]:
        return iter(self._images)

    def __getitem__(self, index: Any) -> Any:
        return self._images[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in ImageReport.__dataclass_fields__:
            raise AttributeError(f"'PruneReport' has no attribute {name!r}")
        return getattr(self._only(name), name)

    def __repr__(self) -> str:
        return f"PruneReport({self.describe()!r})"

    def _only(self, what: str) -> ImageReport:
        if len(self._images) != 1:
            raise VPruneError(
                f"{what} of a report of {len(self._images)} images: choose one, as report[i].{what} "
                "(or iterate over the report)"
            )
        return self._images[0]

    def draw(self, image: Image.Image | Sequence[Image.Image] | None = None) -> Image.Image:
        """Draw every image's report, one below the other; `image`: one picture, or one per image of the report."""
        from vprune.draw import draw_report

        return draw_report(self, image)

    def describe(self) -> str:
        """Say in words what was kept, one line per image."""
        return "\n".join(report.describe() for report in self._images) or "no visual tokens in the last prefill"
