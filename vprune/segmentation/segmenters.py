"""Models that draw masks from prompts: the embedded SAM, segment-anything's checkpoints, transformers' SAM (2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from vprune.errors import VPruneError
from vprune.segmentation.sam import Prompts, decode, load_sam

NAMES = ("embedded", "sam_vit_h", "sam_vit_l", "sam_vit_b", "hf")


@dataclass(frozen=True)
class Encoded:
    """Views that were encoded once: `embeddings`, one entry a view, and `sizes` (width, height) in pixels."""

    embeddings: Any
    sizes: tuple[tuple[int, int], ...]


class Segmenter(Protocol):
    """What draws masks."""

    @property
    def feedback(self) -> bool:
        """Whether masks can be prompts."""

    def encode(self, views: Sequence[Image.Image]) -> Encoded:
        """Encode each view once."""

    def predict(self, encoded: Encoded, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Four masks of each prompt, logits [P, 4, h, w] of the whole input frame, and their predicted IoU [P, 4].

        Points and boxes are in pixels of their views. The first mask is meant for prompts without doubt.
        """

    def coverage(self, encoded: Encoded, view: Tensor, logits: Tensor, grid: tuple[int, int]) -> Tensor:
        """Share of every cell of a `grid` over the view that the masks [P, M, h, w] cover: float32 [P, M, *grid]."""

    def masks(self, encoded: Encoded, view: Tensor, logits: Tensor) -> list[Tensor]:
        """Bool [H, W] of logits [P, h, w], each in pixels of its view."""


class SamSegmenter:
    """A `segment_anything` Sam; prompts of all views go through its decoder in batches."""

    feedback = True

    def __init__(self, sam: Sam, device: torch.device, batch: int = 64) -> None:
        self.sam, self.device, self.batch = sam.to(device).eval(), device, batch
        self.side = int(sam.image_encoder.img_size)

    def scale(self, size: tuple[int, int]) -> float:
        """Pixels of the input frame a pixel of the view."""
        return self.side / max(size)

    @torch.no_grad()
    def encode(self, views: Sequence[Image.Image]) -> Encoded:
        """See `Segmenter`."""
        frames = []
        for view in views:
            scale = self.scale(view.size)
            size = tuple(max(1, min(self.side, round(side * scale))) for side in view.size)
            resized = view.convert("RGB").resize(size, Image.Resampling.BILINEAR)  # type: ignore[arg-type]  # two of them
            pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float().to(self.device)
            frames.append(self.sam.preprocess(pixels))
        embeddings = [self.sam.image_encoder(torch.stack(frames[i : i + 8])) for i in range(0, len(frames), 8)]
        return Encoded(torch.cat(embeddings).float(), tuple(view.size for view in views))

    @torch.no_grad()
    def predict(self, encoded: Encoded, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """See `Segmenter`."""
        scales = torch.tensor([self.scale(size) for size in encoded.sizes])[prompts.view.cpu()]
        moved = Prompts(
            prompts.view.to(self.device),
            (prompts.points * scales[:, None, None]).to(self.device),
            prompts.labels.to(self.device),
            None if prompts.boxes is None else (prompts.boxes * scales[:, None]).to(self.device),
            None if prompts.masks is None else prompts.masks.to(self.device),
        )
        parts = [
            decode(self.sam, encoded.embeddings, moved.rows(slice(i, i + self.batch)))
            for i in range(0, len(moved), self.batch)
        ]
        return torch.cat([logits for logits, _ in parts]).float(), torch.cat([iou for _, iou in parts]).float()

    def coverage(self, encoded: Encoded, view: Tensor, logits: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `Segmenter`."""
        return torch.cat(
            [covered(one[None], encoded.sizes[number], grid) for number, one in zip(view.tolist(), logits, strict=True)]
        )

    def masks(self, encoded: Encoded, view: Tensor, logits: Tensor) -> list[Tensor]:
        """See `Segmenter`."""
        found = []
        for number, one in zip(view.tolist(), logits, strict=True):
            width, height = encoded.sizes[number]
            scale = self.scale((width, height))
            input_size = (max(1, round(height * scale)), max(1, round(width * scale)))
            whole = self.sam.postprocess_masks(one[None, None], input_size, (height, width))
            found.append((whole[0, 0] > 0).cpu())
        return found


class HuggingFaceSegmenter:
    """transformers' SamModel or Sam2Model; they take one mask prompt a call, so masks are not fed back."""

    feedback = False

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self.model, self.processor, self.device = model.to(device).eval(), processor, device

    @torch.no_grad()
    def encode(self, views: Sequence[Image.Image]) -> Encoded:
        """See `Segmenter`."""
        embeddings = []
        for view in views:
            inputs = self.processor(images=view.convert("RGB"), return_tensors="pt").to(self.device)
            found = self.model.get_image_embeddings(inputs["pixel_values"])
            embeddings.append((found, inputs.get("reshaped_input_sizes")))
        return Encoded(embeddings, tuple(view.size for view in views))

    @torch.no_grad()
    def predict(self, encoded: Encoded, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """See `Segmenter`."""
        logits: list[Tensor | None] = [None] * len(prompts)
        quality: list[Tensor | None] = [None] * len(prompts)
        for number in sorted(set(prompts.view.tolist())):
            rows = (prompts.view == number).nonzero().squeeze(-1)
            self._predict_view(encoded, number, prompts, rows, logits, quality)
        return torch.stack([one for one in logits if one is not None]), torch.stack(
            [one for one in quality if one is not None]
        )

    def _predict_view(
        self,
        encoded: Encoded,
        number: int,
        prompts: Prompts,
        rows: Tensor,
        logits: list[Tensor | None],
        quality: list[Tensor | None],
    ) -> None:
        width, height = encoded.sizes[number]
        points = prompts.points[rows]
        given: dict[str, Any] = {
            "input_points": points[None].tolist(),
            "input_labels": prompts.labels[rows][None].int().tolist(),
        }
        if prompts.boxes is not None:
            given["input_boxes"] = prompts.boxes[rows][None].tolist()
        blank = Image.new("RGB", (width, height))
        inputs = self.processor(images=blank, return_tensors="pt", **given)
        kept = {key: value.to(self.device) for key, value in inputs.items() if key.startswith("input_")}
        # (float64 comes out of some processors)
        kept = {key: value.float() if value.is_floating_point() else value for key, value in kept.items()}
        embeddings, _ = encoded.embeddings[number]
        found: list[Tensor] = []
        said: list[Tensor] = []
        for several in (False, True):
            out = self.model(image_embeddings=embeddings, multimask_output=several, **kept)
            found.append(out.pred_masks[0].float())
            said.append(out.iou_scores[0].float())
        for place, row in enumerate(rows.tolist()):
            logits[row] = torch.cat([one[place] for one in found])
            quality[row] = torch.cat([one[place] for one in said])

    def coverage(self, encoded: Encoded, view: Tensor, logits: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `Segmenter`."""
        stretched = [encoded.embeddings[number][1] is None for number in view.tolist()]
        sizes = [(1, 1) if whole else encoded.sizes[n] for n, whole in zip(view.tolist(), stretched, strict=True)]
        return torch.cat([covered(one[None], size, grid) for one, size in zip(logits, sizes, strict=True)])

    def masks(self, encoded: Encoded, view: Tensor, logits: Tensor) -> list[Tensor]:
        """See `Segmenter`."""
        found = []
        for number, one in zip(view.tolist(), logits, strict=True):
            width, height = encoded.sizes[number]
            reshaped = encoded.embeddings[number][1]
            if reshaped is None:  # SAM 2 stretches its input, SAM pads it
                whole = interpolate(one[None, None], (height, width), mode="bilinear", align_corners=False)
            else:
                side = int(max(reshaped[0].tolist()))
                h, w = (int(v) for v in reshaped[0].tolist())
                frame = interpolate(one[None, None], (side, side), mode="bilinear", align_corners=False)
                whole = interpolate(frame[..., :h, :w], (height, width), mode="bilinear", align_corners=False)
            found.append((whole[0, 0] > 0).cpu())
        return found


def covered(logits: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Share of every cell that masks [P, M, s, s] cover, of a view (width, height) in the top left of their frame."""
    width, height = size
    side = logits.shape[-1]
    w, h = (max(1, round(side * one / max(size))) for one in (width, height))
    return adaptive_avg_pool2d((logits[..., :h, :w] > 0).float(), grid)


def load_segmenter(
    name: str = "embedded", path: str | Path | None = None, device: torch.device | str = "cpu"
) -> Segmenter:
    """The segmenter of a name, on a device.

    Args:
        name: embedded, sam_vit_h | sam_vit_l | sam_vit_b (segment-anything's checkpoints) or hf (transformers').
        path: the checkpoint file of sam_vit_*, or a folder or hub id for hf; a folder for embedded, None = the one that
            ships with vprune.
        device: where it runs.

    Raises:
        VPruneError: an unknown name, a file that is missing or is no such model.
    """
    place = torch.device(device)
    if name == "embedded":
        folder = Path(str(files("vprune") / "assets" / "models" / "sam")) if path is None else Path(path).expanduser()
        return SamSegmenter(load_sam(folder), place)
    if name == "hf":
        return _hugging_face(str(path) if path is not None else "", place)
    if name not in NAMES:
        raise VPruneError(f"segmenter={name} is unknown; there is {', '.join(NAMES)}")
    from segment_anything import sam_model_registry

    if path is None or not Path(path).expanduser().is_file():
        raise VPruneError(f"segmenter={name} needs a checkpoint of segment-anything: segmenter_path=FILE.pth")
    try:
        sam = sam_model_registry[name.removeprefix("sam_")](checkpoint=None)
        sam.load_state_dict(torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VPruneError(f"segmenter_path={path} is no checkpoint of {name} ({reason})") from error
    return SamSegmenter(sam, place, batch=32)


def _hugging_face(source: str, device: torch.device) -> Segmenter:
    from transformers import AutoConfig, Sam2Model, Sam2Processor, SamModel, SamProcessor

    if not source:
        raise VPruneError("segmenter=hf needs a model: segmenter_path=FOLDER or a hub id such as facebook/sam-vit-base")
    try:
        sam2 = AutoConfig.from_pretrained(source).model_type.startswith("sam2")
        model: Any = (Sam2Model if sam2 else SamModel).from_pretrained(source)
        processor = (Sam2Processor if sam2 else SamProcessor).from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VPruneError(f"segmenter_path={source} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    return HuggingFaceSegmenter(model, processor, device)


def with_masks(prompts: Prompts, masks: Tensor) -> Prompts:
    """The same prompts, with logits [P, h, w] of an earlier prediction beside them."""
    return replace(prompts, masks=masks[:, None])
