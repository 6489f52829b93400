"""Image files, read safely: what cannot be an honest photograph is refused with its name and the limits."""

from __future__ import annotations

import io
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vprune.errors import VPruneError

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoders that run no other program
CACHE_BYTES = 512 * 2**20
_READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, MemoryError, Image.DecompressionBombError)


class ImageSource(Protocol):
    """An encoded image that lies inside another file: a table's cell, a data set's row."""

    def read(self) -> bytes:
        """The encoded bytes; `str()` of the source says where they lie."""


def check_image(path: Path) -> tuple[int, int]:
    """Size `(width, height)` of an image file, from its header alone.

    Raises VPruneError if the file is missing, is no image, or has more than 100 megapixels.
    """
    with _opened(path) as image:
        return image.size


def load_image(path: Path | ImageSource) -> Image.Image:
    """An image as upright RGB: EXIF orientation applied, transparency laid on white, greyscale spread.

    `path` is a file, or a source inside one. Raises VPruneError if it is missing, is no image, is cut short or has more
    than 100 megapixels.
    """
    with _opened(path) as image:
        try:
            image.load()
            return as_rgb(ImageOps.exif_transpose(image))
        except _READ_ERRORS as error:
            raise VPruneError(
                f"image {path} cannot be decoded ({_reason(error)}): it is corrupt or cut short; replace the file"
            ) from error


@contextmanager
def _opened(path: Path | ImageSource) -> Iterator[Image.Image]:
    if isinstance(path, Path) and not path.is_file():
        raise VPruneError(f"image {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            image = Image.open(path if isinstance(path, Path) else io.BytesIO(path.read()), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise VPruneError(_too_large(path, "more than 178")) from error
    except UnidentifiedImageError as error:
        raise VPruneError(f"{path} is not an image; readable are {', '.join(FORMATS)}") from error
    except _READ_ERRORS as error:
        raise VPruneError(
            f"image {path} cannot be opened ({_reason(error)}): it is corrupt; replace the file"
        ) from error
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise VPruneError(_too_large(path, f"{width} x {height} = {width * height / 1e6:.0f}"))
        yield image


def _too_large(path: Path | ImageSource, megapixels: str) -> str:
    return f"image {path} has {megapixels} megapixels, the limit is {MAX_PIXELS // 10**6}; scale it down first"


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: transparency laid on white, greyscale spread, 16 bits a pixel scaled to 8."""
    if image.mode in ("I", "F") or image.mode.startswith(
        "I;16"
    ):  # 16 bits or more a pixel; convert("RGB") would clip them
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class ImageCache:
    """Decoded images of a benchmark, the ones used longest ago dropped first; safe to use from several threads."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._images: OrderedDict[Path | ImageSource, Image.Image] = OrderedDict()
        self._bytes = 0
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def load(self, path: Path | ImageSource) -> Image.Image:
        """`load_image(path)`, decoded once while the cache has room."""
        with self._lock:
            cached = self._images.get(path)
            if cached is not None:
                self._images.move_to_end(path)
                return cached
        image = load_image(path)
        with self._lock:
            if path not in self._images:
                self._images[path] = image
                self._bytes += _bytes_of(image)
            while self._bytes > self._max_bytes:
                _, dropped = self._images.popitem(last=False)
                self._bytes -= _bytes_of(dropped)
        return image


def _bytes_of(image: Image.Image) -> int:
    return 3 * image.width * image.height
