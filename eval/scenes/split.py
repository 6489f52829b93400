"""Writes a split of the scenes benchmark: images, `samples.jsonl`, and every object's mask, box and caption."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from vprune.eval.scenes import layout, questions
from vprune.eval.scenes.render import Painter, pack, photograph_names
from vprune.eval.scenes.world import COLOURS, KINDS, SHAPES, SIDE, SIZES, Question, Scene

TEST_SEED = 2026
"""Seed of the split that ships in `assets/scenes`."""
LEAST_VISIBLE = 40
"""Pixels of an object that must be seen; a scene that hides one further is drawn again."""


def write_split(
    folder: Path | str,
    images: int = 512,
    seed: int = TEST_SEED,
    photographs: str = "test",
    questions_per_image: int = 8,
    quality: int = 78,
) -> Path:
    """Draws a split and writes it as ordinary files.

    Args:
        folder: where to write `samples.jsonl`, `objects.json` and `images/NNNNNN.webp`.
        images: number of scenes.
        seed: the same seed gives the same scenes, questions and answers on every machine.
        photographs: the set of backgrounds, `test` or `train`.
        questions_per_image: questions about every scene, all kinds about equally often.
        quality: WebP quality of the images.

    Returns:
        the folder.

    Example:
        >>> import tempfile
        >>> folder = write_split(tempfile.mkdtemp(), images=2, seed=7)
        >>> len((folder / "samples.jsonl").read_text().splitlines())
        16
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    painter = Painter(photographs)
    backgrounds = len(photograph_names(photographs))
    asked: Counter[str] = Counter()
    samples: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(images):
        rng = layout.stream(seed, number)
        scene, picture, seen = _draw(rng, painter, backgrounds)
        file = f"images/{number:06d}.webp"
        picture.save(folder / file, quality=quality, method=4)
        records.append({"id": number, "file_name": file, "width": SIDE, "height": SIDE})
        first = len(annotations) + 1
        annotations += [_annotation(first + k, number, scene, k, seen) for k in range(len(scene.objects))]
        for q, question in enumerate(_questions(scene, rng, asked, questions_per_image)):
            sample: dict[str, Any] = {
                "id": f"{number:06d}-{q}",
                "image": file,
                "kind": question.kind,
                "question": question.question,
                "answer": question.answer,
                "evidence": [first + k for k in question.evidence],
            }
            if question.target is not None:
                x, y, w, h = annotations[first + question.target - 1]["bbox"]
                sample["box"] = [x, y, x + w, y + h]
            samples.append(sample)
    with (folder / "samples.jsonl").open("w") as lines:
        lines.writelines(json.dumps(sample) + "\n" for sample in samples)
    categories = [{"id": s + 1, "name": name} for s, name in enumerate(SHAPES)]
    info = {"description": "vprune scenes", "seed": seed, "photographs": photographs}
    objects = {"info": info, "images": records, "categories": categories, "annotations": annotations}
    (folder / "objects.json").write_text(json.dumps(objects, separators=(",", ":")))
    return folder


def _draw(rng: random.Random, painter: Painter, backgrounds: int) -> tuple[Scene, Image.Image, np.ndarray[Any, Any]]:
    while True:
        scene = layout.sample_scene(rng, backgrounds)
        images, seen = painter.render(pack([scene]))
        ids = seen[0].numpy()
        if all((ids == k).sum() >= LEAST_VISIBLE for k in range(len(scene.objects))):
            return scene, Image.fromarray(images[0].permute(1, 2, 0).numpy()), ids


def _questions(scene: Scene, rng: random.Random, asked: Counter[str], count: int) -> list[Question]:
    """`count` different questions, the kinds asked least so far first; a kind comes twice where others do not fit."""
    chosen: dict[str, Question] = {}
    while len(chosen) < count:
        for kind in sorted(KINDS, key=lambda k: (asked[k], rng.random())):
            for _ in range(8):
                question = questions.ask(kind, scene, rng)
                if question is not None and question.question not in chosen and len(chosen) < count:
                    chosen[question.question] = question
                    asked[kind] += 1
                    break
    return list(chosen.values())


def _annotation(number: int, image: int, scene: Scene, k: int, seen: np.ndarray[Any, Any]) -> dict[str, Any]:
    o = scene.objects[k]
    mask = seen == k
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    x, y, w, h = (float(v) for v in coco_mask.toBbox(rle))
    return {
        "id": number,
        "image_id": image,
        "category_id": o.shape + 1,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [x, y, w, h],
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
        "caption": o.caption,
        "name": o.name,
        "colour": COLOURS[o.colour],
        "size": SIZES[o.size],
        "number": o.number,
    }
