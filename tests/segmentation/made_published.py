"""Small copies of LVIS, COCO, CODA and RefCOCO, made of scenes."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tests.segmentation.made import scene
from vprune.segmentation.coco import Coco


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    """A mask in compressed run lengths, as JSON holds them."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


@cache
def photograph(number: int) -> bytes:
    """A scene as a JPEG file."""
    written = io.BytesIO()
    scene(number)[0].save(written, format="JPEG")
    return written.getvalue()


def instances(images: Sequence[int] = (0,)) -> dict[str, Any]:
    """Scenes with their objects in COCO's format, ids of images from 10."""
    content: dict[str, Any] = json.loads(_instances(tuple(images)))
    return content


@cache
def _instances(images: tuple[int, ...]) -> str:
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    ids: dict[str, int] = {}
    for number in images:
        picture, masks, names, _ = scene(number)
        name = f"{number:012d}.jpg"
        own = {"id": 10 + number, "file_name": name, "width": picture.width, "height": picture.height}
        content["images"].append(own)
        for mask, said in zip(masks, names, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 + number,
                    "category_id": ids.setdefault(said, len(ids) + 3),
                    "segmentation": rle_of(mask),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    content["categories"] = [{"id": number, "name": name.replace(" ", "_")} for name, number in ids.items()]
    return json.dumps(content)


def save(folder: Path, images: Sequence[int] = (0,)) -> None:
    """Write scenes as JPEG files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in images:
        (folder / f"{number:012d}.jpg").write_bytes(photograph(number))


def made_coco(root: Path, images: Sequence[int] = (0,)) -> Path:
    save(root / "val2017", images)
    (root / "annotations").mkdir()
    (root / "annotations/instances_val2017.json").write_text(json.dumps(instances(images)))
    return root


def made_lvis(root: Path, images: Sequence[int] = (0,)) -> Path:
    save(root / "val2017", images)
    content = instances(images)
    for one in content["images"]:
        one["coco_url"] = f"http://images.cocodataset.org/val2017/{one.pop('file_name')}"
        one |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    for number, one in enumerate(content["categories"]):
        one["frequency"] = "rcf"[number % 3]
    (root / "lvis_v1_val.json").write_text(json.dumps(content))
    return root


def made_coda(root: Path, images: Sequence[int] = (0,)) -> Path:
    save(root / "images", images)
    content = instances(images)
    for one in content["annotations"]:
        del one["segmentation"]
        one["corner_case"] = one["id"] == 1
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def made_refs(root: Path, dataset: str = "refcoco", split_by: str = "unc") -> Path:
    save(root / "train2014")
    (root / dataset).mkdir()
    content = instances()
    (root / dataset / "instances.json").write_text(json.dumps(content))
    names = scene(0)[2]
    refs = []
    for number, one in enumerate(content["annotations"][:2]):
        said = [{"tokens": names[number].split(), "raw": names[number], "sent": names[number], "sent_id": 100 + number}]
        own = {"ref_id": number, "ann_id": one["id"], "image_id": 10, "category_id": one["category_id"]}
        refs.append({**own, "split": ("val", "testA")[number], "sentences": said, "sent_ids": [100 + number]})
    (root / dataset / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    return root


MADE: dict[str, Callable[[Path], Path]] = {
    "coco": made_coco,
    "lvis": made_lvis,
    "coda": made_coda,
    "refcoco": made_refs,
}


def perfect(benchmark: Coco) -> list[dict[str, Any]]:
    """COCO's results that repeat the annotations."""
    results = []
    for own in benchmark.instances.annotations.values():
        where = {"bbox": own["bbox"]} if benchmark.iou == "bbox" else {"segmentation": own["segmentation"]}
        results.append({"image_id": own["image_id"], "category_id": own["category_id"], "score": 0.9, **where})
    return results


def segmented(benchmark: Coco) -> dict[str, Any]:
    """What `vprune segment` would write had it found everything; its ids are its own."""
    ids = list(benchmark.instances.categories)
    kinds = [
        {"id": n, "name": benchmark.instances.categories[one]["name"].replace("_", " ")} for n, one in enumerate(ids)
    ]
    images = [{"id": 1, "file_name": "000000000000.jpg", "width": 384, "height": 384}]
    names = ("segmentation", "bbox", "area", "iscrowd")
    masks = [
        {"id": n, "image_id": 1, "category_id": ids.index(own["category_id"]), "score": 0.5}
        | {name: own[name] for name in names}
        for n, own in enumerate(instances()["annotations"])
    ]
    return {"images": images, "annotations": masks, "categories": kinds}
