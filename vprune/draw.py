"""Reports as pictures and as words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vprune.errors import VPruneError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vprune.records import ImageReport, PruneReport

_LONG_SIDE = 448  # panels are at least so large, in pixels
_GAP, _CAPTION = 12, 26
_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_HEAT = np.array([(13, 8, 60), (84, 15, 109), (187, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64)
_PLACES = (("top left", "top", "top right"), ("left", "centre", "right"), ("bottom left", "bottom", "bottom right"))


def draw_image(report: ImageReport, image: Image.Image | None = None) -> Image.Image:
    """Two panels: the importance as a heat map over the image (where there is one), and what the model still sees.

    Kept tokens show their pixels, merged ones the mean colour of their row (a dot where the row stands), pruned ones
    are greyed. `image` is stretched over the grid, as most processors do; None draws on plain grey. Frames stand one
    below the other.

    Raises:
        VPruneError: `image` is no picture.
    """
    _refuse_strangers([] if image is None else [image])
    t, h, w = report.grid
    canvas = _canvas(image, h, w)
    strips = []
    for frame in range(t):
        panels = [("what the model still sees", _kept_panel(report, canvas, frame))]
        if report.importance is not None:
            panels.insert(0, ("importance", _heat_panel(report, canvas, frame)))
        strips.append(_beside(panels))
    return _below(strips, title=_title(report))


def draw_report(report: PruneReport, image: Image.Image | Sequence[Image.Image] | None = None) -> Image.Image:
    """The reports of all images, one below the other.

    Raises:
        VPruneError: what is given is no picture, or the pictures are neither one nor one per image of the report.
    """
    if image is not None and not isinstance(image, Image.Image):
        alone: object = image  # told by the type hint to be none, and what mistakes are made of
        _refuse_strangers([alone] if isinstance(alone, str) or not isinstance(alone, Sequence) else alone)
    pictures = [image] * len(report) if image is None or isinstance(image, Image.Image) else list(image)
    if len(pictures) != len(report) or not pictures:
        raise VPruneError(f"draw: {len(pictures)} pictures for a report of {len(report)} images; give one, or one each")
    return _below([draw_image(part, picture) for part, picture in zip(report, pictures, strict=True)])


def _refuse_strangers(pictures: Sequence[object]) -> None:
    for one in pictures:
        if one is not None and not isinstance(one, Image.Image):
            got = " ".join(repr(one).split())[:60]
            raise VPruneError(
                f"draw takes the picture that was pruned, a PIL.Image (PIL.Image.open of its path), and got {got}; it "
                "returns another one: draw(picture).save('kept.png') writes a file"
            )


def describe_image(report: ImageReport) -> str:
    """One sentence on the budget, one on where the importance lies."""
    share = report.tokens_after / report.tokens_before
    merged = int((report.sizes > 1).sum())
    dropped = int((report.source < 0).sum())
    t, h, w = report.grid
    shape = f"{t} x {h} x {w}" if t > 1 else f"{h} x {w}"
    words = [
        f"sample {report.sample}, image {report.image}: {report.tokens_after} of {report.tokens_before} visual tokens "
        f"({shape}) stay ({share:.1%})"
    ]
    if merged:
        words.append(f"{merged} of them stand for {int(report.sizes[report.sizes > 1].sum())} merged tokens")
    words.append(f"{dropped} are dropped" if dropped else "none is dropped")
    text = ", ".join(words) + "."
    if report.importance is not None and float(report.importance.sum()) > 0:
        place, held = _densest_ninth(report)
        kept = float(report.importance.flatten()[report.kept].sum() / report.importance.sum())
        text += f" The {place} ninth holds {held:.0%} of the importance; the tokens that stay hold {kept:.0%}."
    return text


def _densest_ninth(report: ImageReport) -> tuple[str, float]:
    """The ninth of the picture with most importance, in words, and its share."""
    assert report.importance is not None
    _, h, w = report.grid
    values = report.importance.sum(0)
    rows = [min(2, 3 * y // h) for y in range(h)]
    columns = [min(2, 3 * x // w) for x in range(w)]
    shares = np.zeros((3, 3))
    for y in range(h):
        for x in range(w):
            shares[rows[y], columns[x]] += float(values[y, x])
    best = int(shares.argmax())
    return _PLACES[best // 3][best % 3], float(shares.max() / shares.sum())


def _canvas(image: Image.Image | None, h: int, w: int) -> NDArray[np.float64]:
    """The picture stretched to whole patches, [H, W, 3] in 0..255."""
    width, height = image.size if image is not None else (w, h)
    scale = max(1.0, _LONG_SIDE / max(width, height))
    size = (max(1, round(width * scale / w)) * w, max(1, round(height * scale / h)) * h)
    if image is None:
        return np.full((size[1], size[0], 3), 205.0)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)


def _per_pixel(values: NDArray[np.float64], canvas: NDArray[np.float64]) -> NDArray[np.float64]:
    """One value per patch [h, w, ...] repeated over the patch's pixels."""
    y, x = canvas.shape[0] // values.shape[0], canvas.shape[1] // values.shape[1]
    return values.repeat(y, 0).repeat(x, 1)


def _heat_panel(report: ImageReport, canvas: NDArray[np.float64], frame: int) -> Image.Image:
    assert report.importance is not None
    values = report.importance[frame].double().numpy()
    whole = report.importance.double().numpy()
    # A few sinks can outshine everything: the scale ends at the 99th percentile.
    low, high = float(whole.min()), float(np.quantile(whole, 0.99))
    level = np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0) if high > low else np.zeros_like(values)
    steps = np.linspace(0.0, 1.0, len(_HEAT))
    colours = np.stack([np.interp(level, steps, _HEAT[:, channel]) for channel in range(3)], -1)
    grey = canvas.mean(-1, keepdims=True)
    return _picture(0.4 * grey + 0.6 * _per_pixel(colours, canvas))


def _kept_panel(report: ImageReport, canvas: NDArray[np.float64], frame: int) -> Image.Image:
    _, h, w = report.grid
    y, x = canvas.shape[0] // h, canvas.shape[1] // w
    source = report.source.numpy().reshape(report.grid)[frame]
    sizes = report.sizes.numpy()
    dropped, merged = source < 0, (source >= 0) & (sizes[source.clip(min=0)] > 1)
    means = canvas.reshape(h, y, w, x, 3).mean((1, 3))
    mosaic = means.copy()
    for row in np.unique(source[merged]):
        mosaic[source == row] = means[source == row].mean(0)
    pale = 0.25 * canvas.mean(-1, keepdims=True) + 0.75 * 225.0
    picture = np.where(_per_pixel(dropped[..., None], canvas), pale, canvas)
    picture = np.where(_per_pixel(merged[..., None], canvas), _per_pixel(mosaic, canvas), picture)
    drawn = _picture(picture)
    pen = ImageDraw.Draw(drawn)
    for place, size in zip(report.kept.tolist(), sizes.tolist(), strict=True):
        at_frame, inside = divmod(place, h * w)
        if at_frame != frame:
            continue
        top, left = inside // w * y, inside % w * x
        if size > 1:
            middle, radius = (left + x / 2, top + y / 2), max(2.0, min(x, y) / 5)
            box = (middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius)
            pen.ellipse(box, fill=_PAPER, outline=_INK)
        elif dropped.any() or merged.any():
            pen.rectangle((left, top, left + x - 1, top + y - 1), outline=(230, 60, 30))
    return drawn


def _picture(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def _title(report: ImageReport) -> str:
    budget = f"{report.tokens_after} of {report.tokens_before} visual tokens"
    return f"{report.method}: {budget}" if report.method else budget


def _beside(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    width = sum(panel.width for _, panel in panels) + _GAP * (len(panels) - 1)
    sheet = Image.new("RGB", (width, panels[0][1].height + _CAPTION), _PAPER)
    left = 0
    for caption, panel in panels:
        _write(sheet, (left, 4), caption)
        sheet.paste(panel, (left, _CAPTION))
        left += panel.width + _GAP
    return sheet


def _below(strips: Sequence[Image.Image], title: str = "") -> Image.Image:
    head = _CAPTION if title else 0
    height = head + sum(strip.height for strip in strips) + _GAP * (len(strips) - 1)
    sheet = Image.new("RGB", (max(strip.width for strip in strips), height), _PAPER)
    if title:
        _write(sheet, (0, 4), title)
    top = head
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + _GAP
    return sheet


def _write(sheet: Image.Image, place: tuple[int, int], text: str) -> None:
    ImageDraw.Draw(sheet).text(place, text, fill=_INK, font=ImageFont.load_default(size=15))
