"""The nouns: what a prefill shows to a method, what a method decides, and what is reported of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.models.aside import sent

if TYPE_CHECKING:
    from PIL import Image

    from vprune.models.anatomy import Anatomy
    from vprune.models.cache import StoredRows

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image's visual tokens, (t, h, w); t * h * w tokens in raster order."""


@dataclass(frozen=True)
class Selection:
    """Which rows stand for an image's N visual tokens after pruning.

    `kept` LongTensor [K] ascending: the original indices at which the K remaining rows stand; `tokens`: N; `joined`
    LongTensor [N]: for every token the row (0..K-1) that now stands for it, -1 = dropped, None when those kept stand
    for themselves alone; `shares` [N]: its share in that row, one in total per row, None when every row is the token
    that stands there, untouched; `counted` LongTensor [K]: how many tokens each row stands for, None = one; `mass`
    float [K], at least 1: what each counts where sizes do in attention, None = its size; `whole`: no token is dropped,
    as the host knows. All on one device; images alike may share one selection, [I, K] and [I, N].
    """

    kept: Tensor
    tokens: int
    joined: Tensor | None = None
    shares: Tensor | None = None
    counted: Tensor | None = None
    mass: Tensor | None = None
    whole: bool = False
    _piece: ClassVar[tuple[Selection | None, int]] = (None, 0)
    """The selection of images alike that it was unbound from, and its place there: it need not be stacked again."""

    @property
    def is_identity(self) -> bool:
        """True when every token stays as it is."""
        return self.kept.shape[-1] == self.tokens

    @cached_property
    def source(self) -> Tensor:
        """The row that stands for every token, LongTensor [N], -1 = dropped."""
        if self.joined is not None:
            return self.joined
        rows = torch.arange(self.kept.shape[-1], device=self.kept.device).expand_as(self.kept)
        return self.kept.new_full((*self.kept.shape[:-1], self.tokens), -1).scatter_(-1, self.kept, rows)

    @cached_property
    def sizes(self) -> Tensor:
        """How many tokens each row stands for, LongTensor [K]."""
        return torch.ones_like(self.kept) if self.counted is None else self.counted

    @property
    def weights(self) -> Tensor:
        """The share [N] of every token in its row."""
        if self.shares is not None:
            return self.shares
        rows = torch.arange(self.source.shape[-1], device=self.source.device)
        own = self.kept.gather(-1, self.source.clamp(min=0)) == rows
        return (own & (self.source >= 0)).to(torch.float64)

    @classmethod
    def pure(cls, kept: Tensor, tokens: int, sizes: Tensor | None = None) -> Selection:
        """The selection that keeps `kept` (LongTensor [K], ascending) of `tokens` untouched and drops the rest.

        `sizes` LongTensor [N]: how many tokens each of them stands for already, None = itself.
        """
        return cls(kept, tokens, counted=None if sizes is None else sizes.gather(-1, kept))

    @classmethod
    def grouped(
        cls,
        kept: Tensor,
        source: Tensor,
        sizes: Tensor | None = None,
        shares: Tensor | None = None,
        whole: bool = False,
    ) -> Selection:
        """The selection whose row r, standing at `kept[r]`, is the mean of the tokens with `source == r`.

        `sizes` LongTensor [N]: how many tokens each of them stands for already, None = itself. `shares` [N]: what each
        token counts in its mean beside its size, None = the same; negative and not-a-number count nothing, and where
        all of a row do, they count the same. `whole`: no source is below 0.
        """
        own = torch.ones_like(source) if sizes is None else sizes
        row = source if whole else source.clamp(min=0)
        own = own if whole else torch.where(source >= 0, own, 0)
        total = torch.zeros_like(kept).scatter_add_(-1, row, own)
        weights = total.to(torch.float64).reciprocal().gather(-1, row)
        weights = weights if whole and sizes is None else own * weights
        if shares is not None:
            counted = own * shares.to(torch.float64).nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)
            sums = torch.zeros_like(kept, dtype=torch.float64).scatter_add_(-1, row, counted).gather(-1, row)
            weights = torch.where(sums > 0, counted / sums.clamp(min=1e-300), weights)
        return cls(kept, source.shape[-1], source, weights, total, whole=whole)

    def then(self, later: Selection) -> Selection:
        """Follow this selection by another one of the rows that it left."""
        later = later.to(self.kept.device)
        row = self.source.clamp(min=0)
        source = torch.where(self.source >= 0, later.source[row], -1)
        shares = None
        if self.shares is not None or later.shares is not None:
            shares = torch.where(source >= 0, self.weights * later.weights[row], 0.0)
        # What is dropped is counted in a row of its own behind the last one, which is cut off again.
        rows = torch.where(later.source >= 0, later.source, later.kept.shape[0])
        sizes = self.sizes.new_zeros(later.kept.shape[0] + 1).index_add_(0, rows, self.sizes)[:-1]
        return Selection(self.kept[later.kept], self.tokens, source, shares, sizes, later.mass)

    def to(self, device: torch.device) -> Selection:
        """The same on another device; the host does not wait for it on its way to a GPU."""
        if self.kept.device == device:
            return self
        return self._each(lambda part: sent(part, device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Selection:
        joined, shares, counted, mass = (
            None if part is None else change(part) for part in (self.joined, self.shares, self.counted, self.mass)
        )
        return Selection(change(self.kept), self.tokens, joined, shares, counted, mass, self.whole)

    @classmethod
    def stacked(cls, selections: Sequence[Selection]) -> Selection:
        """Selections of images alike as one, [I, K] and [I, N]."""
        whole = selections[0]._piece[0]
        numbers = [one._piece[1] if one._piece[0] is whole else -1 for one in selections]
        if whole is not None and numbers == list(range(whole.kept.shape[0])):
            return whole
        if len(selections) == 1:
            return selections[0]._each(lambda part: part[None])
        kept, source, sizes = (
            torch.stack(part) for part in zip(*((one.kept, one.source, one.sizes) for one in selections), strict=True)
        )
        shares, mass = (
            torch.stack(parts) if len(parts) == len(kept) else None
            for parts in (
                [one.shares for one in selections if one.shares is not None],
                [one.mass for one in selections if one.mass is not None],
            )
        )
        return cls(kept, source.shape[-1], source, shares, sizes, mass, all(one.whole for one in selections))

    def unbind(self) -> list[Selection]:
        """The selections of the single images of [I, K] and [I, N]."""
        pieces = [self._each(itemgetter(number)) for number in range(self.kept.shape[0])]
        for number, piece in enumerate(pieces):
            vars(piece)["_piece"] = (self, number)
        return pieces


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image in one row of the batch.

    `columns` holds their places in that row (LongTensor [N], ascending), `origin` the image's place among the images
    the vision tower encoded (beams repeat an image, the tower sees it once), -1 where the tower was not watched.
    `picture` is the same for the tiles of one picture. `standing` tells what earlier stages left of the image (columns
    are then [K]), None = all of it. `after` counts the tokens of its row behind the last one of it; `start` is the
    first of its columns where they lie side by side, -1 where they do not, or the host does not know.
    """

    sample: int
    image: int
    columns: Tensor
    grid: Grid
    origin: int = -1
    picture: int = -1
    standing: Selection | None = None
    after: int = 0
    start: int = -1

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
    `stored` rows of earlier turns, of which `past` is known, of `seen` tokens. Visual features are added after each of
    the first `deepstack` layers, too. `start` is the prefill as it was before the first layer, None there. `tower`
    lists the images that the vision tower saw, `evidence` what `Pruning.evidence` was.

    What the host knows without asking the device: `counts`, how many columns of each row are no padding, and
    `instruction`, which hold the text after the last visual token, (LongTensor [B, R], bool [B, R]: the second False
    beyond a row's own number), on the CPU; `instruction_sent` is a copy that was sent to the device early, and
    `instruction_tail` is R where it is the last R columns of every row, else 0.
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
    seen: int = 0
    counts: tuple[int, ...] = ()
    instruction: tuple[Tensor, Tensor] | None = None
    instruction_sent: tuple[Tensor, Tensor] | None = None
    instruction_tail: int = 0

    @property
    def instruction_on_device(self) -> tuple[Tensor, Tensor]:
        """`instruction` beside the hidden rows."""
        rows, valid = self.instruction_sent or self.instruction or instruction_rows(self.valid, self.visual)
        return sent(rows, self.hidden.device), sent(valid, self.hidden.device)

    def of_images(self, per_column: Tensor) -> list[Tensor]:
        """What belongs to the tokens of each image, [N, ...], of what belongs to columns, [B, L, ...]."""
        return [per_column[image.sample, image.columns.to(per_column.device)] for image in self.images]


def instruction_rows(valid: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of the text after the last visual token of each row of a batch, up to the end of the prompt.

    `valid`, `visual` bool [B, L]. Returns (LongTensor [B, R], bool [B, R]), the second False beyond a row's own number.
    """
    columns = torch.arange(valid.shape[1], device=valid.device)
    last_visual = torch.where(visual, columns, -1).amax(-1, keepdim=True)
    last_valid = torch.where(valid, columns, -1).amax(-1, keepdim=True)
    text = valid & (columns > last_visual)
    text = text | ((columns == last_valid) & ~text.any(-1, keepdim=True))
    counts = text.sum(-1)
    order = text.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, : int(counts.max())]
    return order, columns[: order.shape[1]] < counts[:, None]


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
    selecting, recycling and shortening of the whole prefill, shared by its images. `stages`: what each stage decided,
    first to last; all else is what they come to together (`importance`: of the first stage that has one). `layers`: how
    many the decoder has.
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
    repeat every sample in the prefill, and the report holds every repetition as a sample of its own. What a GPU knows
    is fetched when somebody first reads it.

    Raises:
        VPruneError: an image's attribute is asked of a report of several images (or of none): use `report[i]`.
    """

    def __init__(self, count: int, read: Callable[[], tuple[Sequence[ImageReport], float]]) -> None:
        self._count, self._read = count, read

    @cached_property
    def _told(self) -> tuple[Sequence[ImageReport], float]:
        told = self._read()
        del self._read  # and the tensors on the device with it
        return told

    @property
    def _images(self) -> Sequence[ImageReport]:
        return self._told[0]

    @property
    def seconds(self) -> float:
        """What scoring, selecting, recycling and shortening took, as the device counts it."""
        return self._told[1]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ImageReport]:
        return iter(self._images)

    def __getitem__(self, index: Any) -> Any:
        return self._images[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not (name in ImageReport.__dataclass_fields__ or name == "mean_tokens"):
            raise AttributeError(f"'PruneReport' has no attribute {name!r}")
        return getattr(self._only(name), name)

    def __repr__(self) -> str:
        return f"PruneReport({self.describe()!r})"

    def _only(self, what: str) -> ImageReport:
        if self._count != 1:
            raise VPruneError(
                f"{what} of a report of {self._count} images: choose one, as report[i].{what} "
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
