"""A small benchmark folder, made up on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

SIDE = 48
QUESTIONS = {
    "exists": ("is the circle red ?", "yes"),
    "colour": ("what is the number of the square ?", "blue"),
    "list": ("count the square", "red circle, blue square"),
    "refer": ("where is the circle ?", "x00 y01"),
}


def sample_rows(count: int = 12, images: int = 4) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        kind = list(QUESTIONS)[i % 4]
        question, answer = QUESTIONS[kind]
        row: dict[str, Any] = {"id": f"s{i}", "image": f"images/{i % images}.png", "kind": kind}
        row |= {"question": question, "answer": answer}
        row |= {"box": [0, 16, 16, 32]} if kind == "refer" else {}
        row |= {"evidence": [i % images]} if i % 3 else {}
        rows.append(row)
    return rows


def write_samples(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_benchmark(folder: Path, rows: list[dict[str, Any]], images: int = 4) -> Path:
    """The folder with `images` noise images, one annotated rectangle on each, and these samples."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    annotations = []
    for i in range(images):
        pixels = random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
        mask[:8, 8 : 16 + i] = 1
        rle = coco_mask.encode(mask)
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        annotations.append({"id": i, "image_id": i, "category_id": 1, "segmentation": segmentation})
    listed = [{"id": i, "file_name": f"images/{i}.png", "height": SIDE, "width": SIDE} for i in range(images)]
    objects = {"images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "objects.json").write_text(json.dumps(objects))
    write_samples(folder, rows)
    return folder
