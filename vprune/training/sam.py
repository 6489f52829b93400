"""`vprune train sam`: the embedded SAM, from scratch, with the interactive prompts of the SAM paper (arXiv 2304.02643).

Every object is prompted by a point or by a box and then, round after round, by a point where the last prediction is
wrong and by the last prediction itself. Focal loss 20, Dice 1, predicted IoU 1; of three masks the best one is taught.
Beside that, a linear head that is dropped after training tells of every cell what it shows and where the middle of that
is: dense supervision, without which the encoder learns slowly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, grid_sample, interpolate, max_pool2d, smooth_l1_loss
from torchvision.ops import sigmoid_focal_loss  # type: ignore[import-untyped]  # torchvision leaves it unannotated

from vprune.eval.scenes.render import COLOUR, SHAPE, Batch, Painter
from vprune.eval.scenes.world import COLOURS, MAX_OBJECTS, SHAPES, SIDE
from vprune.segmentation.sam import Prompts, build_sam, decode, load_sam, save_sam
from vprune.training.loop import TrainingLoop, begin

LEAST_VISIBLE = 40
"""Pixels of an object that must be seen for it to be asked for."""
LOOSE = 13
"""Side in pixels of the square around a positive point within which some points may miss their object."""
THRESHOLDS = torch.arange(0.5, 1.0, 0.05)


def train(config: DictConfig) -> Path:
    """Train as conf/train/sam.yaml says, or go on with it; returns the folder of the finished model.

    Raises:
        VPruneError: a schedule without a length, a folder of another run.

    Example:
        >>> from omegaconf import OmegaConf
        >>> train(OmegaConf.load("conf/train/sam.yaml"))  # doctest: +SKIP
        PosixPath('runs/train/sam/model')
    """
    out, device = begin(config, "sam")
    fields: Any = OmegaConf.to_container(config.model)
    sam = build_sam(fields)
    if config.start_from:
        sam.load_state_dict(load_sam(Path(str(config.start_from)).expanduser()).state_dict())
    loop = SamLoop(config, sam, device, out)
    loop.run()
    loop.model.load_state_dict(loop.average)
    save_sam(loop.sam, fields, out / "model")
    return out / "model"


class TaughtSam(nn.Module):
    """A Sam and the head that tells what each cell of its embedding shows: shape, colour and the way to its middle."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam
        width = int(sam.prompt_encoder.embed_dim)
        self.cells = nn.Conv2d(width, len(SHAPES) + 1 + len(COLOURS) + 1 + 2, 1)


class SamLoop(TrainingLoop):
    """One training run of a Sam."""

    name = "sam"

    def __init__(self, config: DictConfig, sam: Sam, device: torch.device, out: Path) -> None:
        self.taught = TaughtSam(sam)
        super().__init__(config, self.taught, device, out)
        self.sam = sam
        self.side = int(sam.image_encoder.img_size)
        self.cell = self.side // int(sam.prompt_encoder.mask_input_size[0])  # pixels a pixel of a mask stands for
        self.encode: Any = torch.compile(sam.image_encoder, dynamic=False) if self.compiled else sam.image_encoder

    def losses(self, scenes: Batch, random: torch.Generator) -> dict[str, Tensor]:
        """Encode once, then go backward round by round into the embedding, and at last through the encoder."""
        with torch.no_grad():
            images, seen = self.painter.render(scenes)
            pixels, seen = self._augmented(images, seen, random)
            targets, view, weight = self._choose(seen, int(self.config.data.objects), random)
        with self.autocast():
            encoded = self.encode(pixels)
        embeddings = encoded.detach().float().requires_grad_()
        half = len(targets) // 2
        totals: dict[str, list[Tensor]] = {
            name: [] for name in ("loss", "cells", "iou_point", "iou_box", "iou_last", "quality_error")
        }
        told = self._cells_loss(embeddings, seen, scenes.objects)
        totals["cells"].append(told.detach())
        torch.autograd.backward(float(self.config.optimizer.cells) * told)
        for part, boxed in ((slice(0, half), False), (slice(half, None), True)):
            self._converse(embeddings, targets[part], view[part], weight[part], seen, boxed, random, totals)
        torch.autograd.backward(encoded, embeddings.grad.to(encoded.dtype))
        return {name: torch.stack(values).mean() for name, values in totals.items()}

    def _converse(
        self,
        embeddings: Tensor,
        targets: Tensor,
        view: Tensor,
        weight: Tensor,
        seen: Tensor,
        boxed: bool,
        random: torch.Generator,
        totals: dict[str, list[Tensor]],
    ) -> None:
        """All rounds with some of the prompts."""
        rounds = int(self.config.data.rounds)
        soft = avg_pool2d(targets.float(), self.cell)
        share = weight / weight.sum().clamp(min=1)
        points, labels = first_points(targets, seen[view], random)
        boxes = noisy_boxes(targets, random) if boxed else None
        if boxed:
            labels = torch.full_like(labels, -1)
        masks: Tensor | None = None
        for turn in range(rounds):
            prompts = Prompts(view, points, labels, boxes, masks)
            with self.autocast():
                logits, quality = decode(self.sam, embeddings, prompts)
            logits, quality = logits.float(), quality.float()
            each, iou = mask_losses(logits, soft)
            errors = (quality - iou).square().mean(1)
            several = 0.85 * each[:, 1:].min(1).values + 0.15 * each[:, 1:].mean(1)
            loss = ((each[:, 0] + several + errors) * share).sum() / rounds
            torch.autograd.backward(loss)
            with torch.no_grad():
                best = 1 + quality[:, 1:].argmax(1)
                took = best if turn == 0 else torch.zeros_like(best)
                rows = torch.arange(len(took), device=took.device)
                masks = logits.detach()[rows, took, None]
                totals["loss"].append(loss.detach() * rounds)
                totals["quality_error"].append(((quality - iou).abs().mean(1) * share).sum())
                if turn in (0, rounds - 1):
                    first = "iou_box" if boxed else "iou_point"
                    totals[first if turn == 0 else "iou_last"].append((iou[rows, took] * share).sum())
                where, sign = corrections(masks, soft, self.cell, random)
                points, labels = torch.cat((points, where), 1), torch.cat((labels, sign), 1)

    def _cells_loss(self, embeddings: Tensor, seen: Tensor, objects: Tensor) -> Tensor:
        """Cross entropy of the shape and colour in the middle of every cell, and distance from the object's middle."""
        told: Tensor = self.taught.cells(embeddings)
        patch = self.side // told.shape[-1]
        middle = seen[:, patch // 2 :: patch, patch // 2 :: patch].flatten(1).long()
        there, index = middle >= 0, middle.clamp(min=0)
        shape = torch.where(there, objects[:, :, SHAPE].long().gather(1, index), len(SHAPES))
        colour = torch.where(there, objects[:, :, COLOUR].long().gather(1, index), len(COLOURS))
        own = (seen[:, None] == torch.arange(MAX_OBJECTS, device=seen.device)[:, None, None]).float()
        line = torch.arange(self.side, device=seen.device, dtype=torch.float32)
        area = own.sum((2, 3)).clamp(min=1)
        centres = torch.stack((own.sum(2) @ line / area, own.sum(3) @ line / area), 1)  # [B, 2, 8]
        at = line[patch // 2 :: patch]
        here = torch.stack((at.repeat(len(at)), at.repeat_interleave(len(at))))
        way = (centres.gather(2, index[:, None].expand(-1, 2, -1)) - here) / 32
        by_shape, by_colour, offset = torch.split(told.flatten(2), [len(SHAPES) + 1, len(COLOURS) + 1, 2], dim=1)
        weight = torch.where(there, 1.0, 0.15)
        named = cross_entropy(by_shape, shape, reduction="none") + cross_entropy(by_colour, colour, reduction="none")
        apart = smooth_l1_loss(offset, way, reduction="none").sum(1) * there
        return (named * weight + apart).sum() / weight.sum()

    def _augmented(self, images: Tensor, seen: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normalised pixels [B, 3, S, S] and their objects; some images zoomed into, or shrunk beside empty borders."""
        size, device = len(images), images.device
        draw = torch.rand(size, 4, generator=random, device=device)
        zoomed = draw[:, 0] < float(self.config.data.zoomed)
        # A part as small as 0.45 of the side, as crops are; or up to 1.4 times it, as a picture that is not square.
        scale = torch.where(zoomed, 0.45 + 0.95 * draw[:, 1], 1.0)
        inside = (1 - scale).clamp(min=0)
        outside = scale.clamp(min=1)
        corner = torch.stack((inside * draw[:, 2], inside * draw[:, 3]), -1)
        line = (torch.arange(self.side, device=device) + 0.5) / self.side
        # Borders are empty on the right and at the bottom, where Sam pads.
        aspect = torch.where(draw[:, 2:] < 0.5, outside[:, None], outside[:, None].clamp(max=1.0))
        span = torch.where(scale[:, None] > 1, aspect, scale[:, None])
        x = 2 * (corner[:, :1] + span[:, :1] * line) - 1
        y = 2 * (corner[:, 1:] + span[:, 1:] * line) - 1
        grid = torch.stack((x[:, None].expand(-1, self.side, -1), y[:, :, None].expand(-1, -1, self.side)), -1)
        pixels = images.float()
        strength = float(self.config.data.noise) * torch.rand(size, 1, 1, 1, generator=random, device=device)
        pixels = pixels + strength * torch.randn(pixels.shape, generator=random, device=device)
        normal = (pixels.clamp(0, 255) - self.sam.pixel_mean) / self.sam.pixel_std
        # Padding by zeros in both: mean grey, and object -1 (stored one higher for the purpose).
        normal = grid_sample(normal, grid, align_corners=False)
        known = grid_sample(seen[:, None].float() + 1, grid, mode="nearest", align_corners=False)
        return normal, (known[:, 0].round() - 1).to(torch.int8)

    def _choose(self, seen: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Targets bool [B * count, 1, S, S], their images and weights: 0 where an image shows too few objects."""
        kinds = torch.arange(MAX_OBJECTS, device=seen.device)
        areas = torch.stack([(seen == kind).flatten(1).sum(1) for kind in kinds], 1)
        keys = torch.rand(areas.shape, generator=random, device=seen.device)
        keys = torch.where(areas >= LEAST_VISIBLE, keys + 1, 0.0)
        top, chosen = keys.topk(count, dim=1)
        view = torch.arange(len(seen), device=seen.device).repeat_interleave(count)
        return (seen[:, None] == chosen[:, :, None, None]).flatten(0, 1)[:, None], view, (top >= 1).float().flatten()

    @torch.no_grad()
    def measure(self, batches: list[Batch], painter: Painter) -> dict[str, Any]:
        """Mean IoU, in pixels of the input, after one point, three points and a box, and the box's average recall."""
        random = torch.Generator(self.device).manual_seed(1)
        found: dict[str, list[Tensor]] = {"miou_point": [], "miou_3_points": [], "miou_box": [], "quality_error": []}
        for scenes in batches:
            images, seen = painter.render(scenes)
            pixels = (images.float() - self.sam.pixel_mean) / self.sam.pixel_std
            if self.side != SIDE:
                pixels = interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
                seen = interpolate(seen[:, None].float(), (self.side, self.side))[:, 0].to(torch.int8)
            targets, view, weight = self._choose(seen, MAX_OBJECTS, random)
            there = weight > 0
            targets, view = targets[there], view[there]
            soft = avg_pool2d(targets.float(), self.cell)
            with self.autocast():
                embeddings = self.sam.image_encoder(pixels).float()
            points, labels = first_points(targets, seen[view], random, strict=True)
            masks: Tensor | None = None
            for turn in range(3):
                logits, quality = self._predict(embeddings, Prompts(view, points, labels, None, masks))
                took = 1 + quality[:, 1:].argmax(1) if turn == 0 else torch.zeros(len(logits), dtype=torch.long)
                rows = torch.arange(len(logits), device=self.device)
                masks = logits[rows, took.to(self.device), None]
                iou = true_iou(masks, targets)
                if turn == 0:
                    found["miou_point"].append(iou)
                    found["quality_error"].append((quality[rows, took.to(self.device)] - iou).abs())
                where, sign = corrections(masks, soft, self.cell, random)
                points, labels = torch.cat((points, where), 1), torch.cat((labels, sign), 1)
            found["miou_3_points"].append(iou)
            nothing = torch.full_like(labels[:, :1], -1)
            boxed = Prompts(view, points[:, :1], nothing, noisy_boxes(targets, random, 0.0))
            logits, _ = self._predict(embeddings, boxed)
            found["miou_box"].append(true_iou(logits[:, :1], targets))
        ious = {name: torch.cat(values) for name, values in found.items()}
        recall = (ious["miou_box"][:, None] > THRESHOLDS.to(self.device)).float().mean()
        return {name: round(float(values.mean()), 4) for name, values in ious.items()} | {
            "recall_box": round(float(recall), 4)
        }

    def _predict(self, embeddings: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        with self.autocast():
            logits, quality = decode(self.sam, embeddings, prompts)
        return logits.float(), quality.float()


def draw_points(where: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """One pixel of each mask [N, H, W], all pixels alike: (x, y) [N, 1, 2], and whether there is any [N, 1]."""
    keys = torch.rand(where.shape, generator=random, device=where.device)
    top, index = torch.where(where, keys, -1.0).flatten(1).max(1)
    width = where.shape[-1]
    points = torch.stack((index % width, index // width), -1).float()
    return points[:, None], (top >= 0)[:, None]


def first_points(targets: Tensor, seen: Tensor, random: torch.Generator, strict: bool = False) -> tuple[Tensor, Tensor]:
    """A point on each object and up to two more beside it, some of them negative, as attention gives them.

    One point in five lies near the object and not on it, though never on another one. `strict`: one point, on it.

    Returns:
        points [N, K, 2] and labels [N, K].
    """
    own, device = targets[:, 0], targets.device
    if strict:
        points, _ = draw_points(own, random)
        return points, torch.ones(len(own), 1, device=device)
    near = max_pool2d(targets.float(), LOOSE, stride=1, padding=LOOSE // 2)[:, 0] > 0
    others = (seen >= 0) & ~own
    loose = torch.rand(len(own), generator=random, device=device) < 0.2
    points, _ = draw_points(torch.where(loose[:, None, None], near & ~others, own), random)
    labels = torch.ones(len(own), 1, device=device)
    extra = int(torch.randint(3, (1,), generator=random, device=device))
    for _ in range(extra):
        draw = torch.rand(len(own), 2, generator=random, device=device)
        anywhere = ~(near | own)
        among = (others & anywhere).flatten(1).any(1) & (draw[:, 1] < 0.5)
        more, there = draw_points(torch.where(among[:, None, None], others & anywhere, anywhere), random)
        negative = (draw[:, :1] < 0.6) & there
        points = torch.cat((points, more), 1)
        labels = torch.cat((labels, torch.where(negative, 0.0, -1.0)), 1)
    return points, labels


def noisy_boxes(targets: Tensor, random: torch.Generator, noise: float = 0.1) -> Tensor:
    """The box of each mask, corners moved by `noise` times the side, 20 pixels at most: [N, 4] as (x0, y0, x1, y1)."""
    own = targets[:, 0]
    size = own.shape[-1]
    line = torch.arange(size, device=own.device)
    columns, rows = own.any(1), own.any(2)
    low = [torch.where(axis, line, size).min(1).values for axis in (columns, rows)]
    high = [torch.where(axis, line, -1).max(1).values + 1 for axis in (columns, rows)]
    boxes = torch.stack((*low, *high), 1).float()
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = noise * sides * torch.randn(boxes.shape, generator=random, device=own.device)
    # Sam adds half a pixel to every coordinate.
    return (boxes + moved.clamp(-20, 20)).clamp(0, size) - 0.5


def mask_losses(logits: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and Dice loss of every mask [N, 4, h, w], and its IoU: both [N, 4]. `soft` [N, 1, h, w] is in 0..1."""
    wanted = soft.expand_as(logits)
    focal = sigmoid_focal_loss(logits, wanted, alpha=-1, gamma=2).mean((2, 3))
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * wanted).sum((2, 3)) + 1) / (chance.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    with torch.no_grad():
        predicted, there = logits > 0, wanted > 0.5
        union = (predicted | there).sum((2, 3))
        iou = (predicted & there).sum((2, 3)) / union.clamp(min=1)
    return 20 * focal + dice, iou


def corrections(masks: Tensor, soft: Tensor, cell: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A point where each mask [N, 1, h, w] is wrong: (x, y) [N, 1, 2] in the input's frame, and label [N, 1].

    Where a mask is right, a positive point on the object.
    """
    predicted, wanted = masks[:, 0] > 0, soft[:, 0] > 0.5
    wrong = predicted ^ wanted
    right = ~wrong.flatten(1).any(1)
    points, there = draw_points(torch.where(right[:, None, None], wanted, wrong), random)
    at = points[:, 0].long()
    labels = wanted[torch.arange(len(at), device=at.device), at[:, 1], at[:, 0]].float()[:, None]
    return cell * (points + 0.5) - 0.5, torch.where(there, labels, -1.0)


def true_iou(masks: Tensor, targets: Tensor) -> Tensor:
    """IoU [N] of logits [N, 1, h, w], enlarged, with the pixels of the object [N, 1, S, S]."""
    predicted = interpolate(masks, targets.shape[-2:], mode="bilinear", align_corners=False) > 0
    union = (predicted | targets).flatten(1).sum(1)
    return (predicted & targets).flatten(1).sum(1) / union.clamp(min=1)
