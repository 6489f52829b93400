"""Makes `assets/world`: the photographs that scenes are composited on and the digits that objects carry.

Run once, with scikit-image and matplotlib installed: `python assets/make_world.py`. The results are committed, so
nobody who uses vprune needs to run this. Sources and licences: `assets/world/CREDITS.md`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent / "world"
SIDE = 512
DIGIT = (32, 46)
"""Width and height of a digit's cell in pixels."""
SKIMAGE = Path(skimage.__file__).parent / "data"
MATPLOTLIB = Path(matplotlib.get_data_path())
TRAIN = (
    *(SKIMAGE / name for name in ("astronaut.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "moon.png")),
    *(SKIMAGE / name for name in ("brick.png", "grass.png", "gravel.png", "coins.png")),
)
TEST = (
    *(SKIMAGE / name for name in ("chelsea.png", "rocket.jpg", "camera.png")),
    MATPLOTLIB / "sample_data" / "grace_hopper.jpg",
)

# Both show the stars of a flag, and a star is one of the shapes that questions ask about.
CROPS = {"astronaut": (160, 0, 512, 352), "grace_hopper": (165, 90, 425, 350)}


def _middle(image: Image.Image) -> tuple[int, int, int, int]:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def main() -> None:
    """Writes the photographs and the sheet of digits."""
    for split, files in (("train", TRAIN), ("test", TEST)):
        folder = HERE / "photographs" / split
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            image = Image.open(file).convert("RGB")
            square = image.crop(CROPS.get(file.stem) or _middle(image)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            square.save(folder / f"{file.stem}.webp", quality=88, method=6)
    font = ImageFont.truetype(str(MATPLOTLIB / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), 54)
    width, height = DIGIT
    sheet = Image.new("L", (10 * width, height))
    for d in range(10):
        box = font.getbbox(str(d))
        glyph = Image.new("L", (int(box[2] - box[0]), int(box[3] - box[1])))
        ImageDraw.Draw(glyph).text((-box[0], -box[1]), str(d), fill=255, font=font)
        glyph = (
            glyph.resize((width - 4, height - 4), Image.Resampling.LANCZOS)
            if d != 1
            else glyph.resize((width - 12, height - 4), Image.Resampling.LANCZOS)
        )
        sheet.paste(glyph, (d * width + (width - glyph.width) // 2, 2))
    sheet.save(HERE / "digits.png", optimize=True)
    print(
        {f.relative_to(HERE).as_posix(): f.stat().st_size for f in sorted(HERE.rglob("*.*"))}, np.asarray(sheet).shape
    )


if __name__ == "__main__":
    main()
