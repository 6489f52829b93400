from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vprune import VPruneError
from vprune.eval.benchmarks.images import ImageCache, check_image, load_image


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def test_an_honest_image_is_read(tmp_path: Path) -> None:
    pixels = noise(5, 7, 3)
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    assert check_image(path) == (7, 5)
    assert np.array_equal(np.asarray(load_image(path)), pixels)


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    path = save(Image.fromarray(noise(5, 7, 3)), tmp_path / "a.jpg", exif=exif)
    assert load_image(path).size == (5, 7)


def test_greyscale_is_spread_and_transparency_lies_on_white(tmp_path: Path) -> None:
    grey = load_image(save(Image.fromarray(noise(4, 4)), tmp_path / "grey.png"))
    assert grey.mode == "RGB"
    clear = load_image(save(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), tmp_path / "clear.png"))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0])
    assert load_image(save(palette, tmp_path / "p.png", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_shades(tmp_path: Path) -> None:
    ramp = np.array([[0, 32768, 65535]], dtype=np.uint16)
    image = load_image(save(Image.fromarray(ramp), tmp_path / "deep.png"))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (127, 127, 127), (255, 255, 255)]


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(VPruneError, match=r"gone\.png does not exist"):
        load_image(tmp_path / "gone.png")


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(VPruneError, match=r"a\.png is not an image; readable are PNG"):
        check_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str) -> None:
    path = save(Image.fromarray(noise(64, 64, 3)), tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VPruneError, match=f"a.{suffix}.*corrupt"):
        load_image(path)


def test_flipped_bytes_are_refused_or_read_but_never_crash(tmp_path: Path) -> None:
    whole = save(Image.fromarray(noise(32, 32, 3)), tmp_path / "whole.png").read_bytes()
    random = np.random.default_rng(1)
    for i in range(40):
        broken = bytearray(whole)
        for place in random.integers(0, len(whole), 8):
            broken[place] = int(random.integers(0, 255))
        path = tmp_path / f"{i}.png"
        path.write_bytes(broken)
        try:
            assert load_image(path).mode == "RGB"
        except VPruneError as error:
            assert f"{i}.png" in str(error)


@pytest.mark.parametrize("size", [(12_000, 10_000), (20_000, 20_000)])
def test_too_many_pixels_are_refused_from_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(Image.new("1", size), tmp_path / "huge.png")
    with pytest.raises(VPruneError, match=r"huge\.png has .* megapixels, the limit is 100"):
        check_image(path)


def test_the_cache_stays_within_its_bytes(tmp_path: Path) -> None:
    paths = [save(Image.fromarray(noise(10, 10, 3)), tmp_path / f"{i}.png") for i in range(3)]
    cache = ImageCache(max_bytes=600)
    first = cache.load(paths[0])
    assert cache.load(paths[0]) is first
    cache.load(paths[1])
    cache.load(paths[2])
    assert cache.load(paths[0]) is not first
