"""Small copies of published benchmarks: the true files and fields, a few rows each."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = (20, 10)  # width, height


def picture(seed: int = 0, size: tuple[int, int] = SIDE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def pope_rows() -> list[dict[str, Any]]:
    name = "COCO_val2014_000000000001.jpg"
    return [
        {"question_id": 1, "image": name, "text": "Is there a dog in the image?", "label": "yes"},
        {"question_id": 2, "image": name, "text": "Is there a cat in the image?", "label": "no"},
    ]


def pope(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    for subset in ("random", "popular", "adversarial"):
        write_lines(folder / f"coco_pope_{subset}.json", pope_rows() if rows is None else rows)
    save(folder / "val2014/COCO_val2014_000000000001.jpg")
    return folder


def gqa(folder: Path) -> Path:
    def row(question: str, answer: str, structural: str) -> dict[str, Any]:
        types = {"structural": structural, "semantic": "rel", "detailed": "relO"}
        told = {"question": question, "imageId": "n161313", "answer": answer, "fullAnswer": f"It is {answer}."}
        return told | {"isBalanced": True, "types": types, "groups": {"global": None, "local": None}, "semantic": []}

    rows = {"201307251": row("What is it?", "dog", "query"), "201640614": row("Is it red?", "yes", "verify")}
    write_json(folder / "testdev_balanced_questions.json", rows)
    save(folder / "images/n161313.jpg")
    return folder


def mme(folder: Path) -> Path:
    root = folder / "MME_Benchmark_release_version"
    for name in ("000000006040", "000000006041"):
        save(root / f"existence/{name}.jpg")
        text = "Is there a boat in this image? Please answer yes or no.\tYes\n"
        text += "Is there a car in this image? Please answer yes or no.\tNo\n"
        (root / f"existence/{name}.txt").write_text(text, encoding="utf-8")
    save(root / "celebrity/images/tt0032138.png")
    texts = root / "celebrity/questions_answers_YN"
    texts.mkdir(parents=True)
    (texts / "tt0032138.txt").write_text("Is it he? Please answer yes or no.\tYes\nIs it she?\tNo", encoding="utf-8")
    return folder


def mmbench_rows() -> list[dict[str, Any]]:
    image = base64.b64encode(encoded()).decode()
    common = {"category": "identity_reasoning", "source": "made", "l2-category": "attribute_reasoning", "split": "dev"}
    return [
        {
            "index": 241,
            "question": "Who?",
            "hint": "A text.",
            "A": "cat",
            "B": "dog",
            "C": "cow",
            "D": "",
            "answer": "B",
        }
        | {"image": image}
        | common,
        {"index": 252, "question": "What?", "hint": "", "A": "red", "B": "blue", "C": "", "D": "", "answer": "A"}
        | {"image": image}
        | common,
    ]


def vqa_answers(*counted: tuple[str, int]) -> list[dict[str, Any]]:
    words = [word for word, count in counted for _ in range(count)]
    return [{"answer": word, "answer_confidence": "yes", "answer_id": i} for i, word in enumerate(words, start=1)]


def vqav2(folder: Path) -> Path:
    asked = [
        {"image_id": 42, "question": "Is it raining?", "question_id": 42000},
        {"image_id": 42, "question": "How many dogs?", "question_id": 42001},
    ]
    answered = [
        {"question_type": "how many", "multiple_choice_answer": "2", "answers": vqa_answers(("2", 7), ("two dogs", 3))}
        | {"image_id": 42, "answer_type": "number", "question_id": 42001},
        {"question_type": "is it", "multiple_choice_answer": "yes", "answers": vqa_answers(("yes", 10))}
        | {"image_id": 42, "answer_type": "yes/no", "question_id": 42000},
    ]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": asked})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": answered})
    save(folder / "val2014/COCO_val2014_000000000042.jpg")
    return folder


def textvqa(folder: Path) -> Path:
    row = {"question": "what brand?", "image_id": "003a8ae2ef43b901", "question_id": 34602, "set_name": "val"}
    row |= {"answers": ["nous les gosses"] * 4 + ["dakota"] * 6, "flickr_original_url": "https://example.org/o.jpg"}
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_version": "0.5.1", "data": [row]})
    save(folder / "train_images/003a8ae2ef43b901.jpg")
    return folder


def scienceqa(folder: Path) -> Path:
    def problem(image: str | None, split: str, hint: str) -> dict[str, Any]:
        told = {"question": "Which is it?", "choices": ["a rock", "a plant"], "answer": 1, "hint": hint, "image": image}
        return told | {"task": "closed choice", "grade": "grade2", "subject": "natural science", "split": split}

    problems = {
        "4": problem("image.png", "test", "Look at the picture."),
        "5": problem(None, "test", ""),
        "6": problem("image.png", "train", ""),
    }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": ["6"], "test": ["4", "5"]})
    save(folder / "images/test/4/image.png")
    return folder


def vizwiz(folder: Path, masks: bool = True) -> Path:
    corners = [{"x": 0, "y": 0}, {"x": 9, "y": 0}, {"x": 9, "y": 9}, {"x": 0, "y": 9}]  # the left half
    row = {"question": "What is this?", "answers": ["soup"] * 9 + ["can"], "most_common_answer": "soup"}
    row |= {"answer_grounding": corners, "height": SIDE[1], "width": SIDE[0]}
    write_json(folder / "val_grounding.json", {"VizWiz_val_00000001.jpg": row})
    save(folder / "val/VizWiz_val_00000001.jpg")
    if masks:
        mask = np.zeros((SIDE[1], SIDE[0]), dtype=np.uint8)
        mask[:, :10] = 255
        (folder / "binary_masks_png/val").mkdir(parents=True)
        Image.fromarray(mask).save(folder / "binary_masks_png/val/VizWiz_val_00000001.png")
    return folder


def videomme_rows() -> list[dict[str, Any]]:
    common = {
        "video_id": "001",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "task_type": "OCR Problems",
    }
    common |= {"url": "https://www.example.org/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8"}
    options = ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are of the same number."]
    return [
        {
            **common,
            "question_id": f"001-{n}",
            "duration": duration,
            "question": "Which?",
            "options": options,
            "answer": "C",
        }
        for n, duration in enumerate(("short", "long"), start=1)
    ]


def videomme(folder: Path, frames: int = 6) -> Path:
    write_lines(folder / "videomme.jsonl", videomme_rows())
    for number in range(frames):
        save(folder / f"data/fFjv93ACGo8/{number:03d}.png", seed=number)
    return folder


def chair(folder: Path) -> Path:
    image = {"id": 391895, "file_name": "COCO_val2014_000000391895.jpg", "height": 10, "width": 20}
    names = [{"id": 1, "name": "person"}, {"id": 4, "name": "motorcycle"}, {"id": 6, "name": "bus"}]
    objects = [{"id": 1, "image_id": 391895, "category_id": 1}, {"id": 2, "image_id": 391895, "category_id": 4}]
    write_json(
        folder / "annotations/instances_val2014.json",
        {"images": [image], "annotations": objects, "categories": names},
    )
    said = [{"id": 1, "image_id": 391895, "caption": "A man on a motor bike by a dining table."}]
    write_json(folder / "annotations/captions_val2014.json", {"images": [image], "annotations": said})
    save(folder / "val2014/COCO_val2014_000000391895.jpg")
    (folder / "synonyms.txt").write_text(SYNONYMS, encoding="utf-8")
    return folder


SYNONYMS = """\
person, girl, boy, man, woman, kid, child
motorcycle, motor bike, bike
bus, minibus
train, locomotive
dog, puppy
hot dog
elephant
tie
dining table, table, desk
knife
"""
