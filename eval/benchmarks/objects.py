"""The annotated objects of a benchmark: COCO's JSON with run-length masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from vprune.errors import VPruneError


class Objects:
    """Masks by annotation id, read from a COCO file.

    Raises VPruneError if the file is no COCO annotation with RLE masks.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self._sizes = {str(i["file_name"]): (int(i["height"]), int(i["width"])) for i in content["images"]}
            self._rles = {int(a["id"]): _rle(a["segmentation"]) for a in content["annotations"]}
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise VPruneError(f"{path} is not a COCO annotation file with RLE masks ({reason})") from error

    @property
    def ids(self) -> set[int]:
        """Every annotation id."""
        return set(self._rles)

    def mask(self, ids: Sequence[int], file_name: str) -> NDArray[np.bool_] | None:
        """Union of the masks of `ids`, bool `[H, W]`, all False for no ids; None for an image that is not listed."""
        if ids:
            return coco_mask.decode(coco_mask.merge([self._rles[i] for i in ids])).astype(bool)  # type: ignore[no-any-return]
        size = self._sizes.get(file_name)
        return None if size is None else np.zeros(size, dtype=bool)


def _rle(segmentation: dict[str, Any]) -> dict[str, Any]:
    height, width = (int(n) for n in segmentation["size"])
    counts = segmentation["counts"]
    if isinstance(counts, list):  # the uncompressed form
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)  # type: ignore[no-any-return]
    return {"size": [height, width], "counts": counts.encode("ascii") if isinstance(counts, str) else counts}
