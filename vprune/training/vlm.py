"""`vprune train vlm`: trains the embedded vision-language model from scratch on scenes painted on the fly.

Nothing is pruned in training: every sequence holds all 576 visual tokens, as real VLMs are trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration

from vprune.eval.scenes.render import Batch, Painter, photograph_names
from vprune.eval.scenes.world import KINDS
from vprune.training import checkpoint
from vprune.training.architecture import build_model, build_processor
from vprune.training.packed_model import PackedVLM, answer_loss, grounding_loss, patch_labels, patch_loss
from vprune.training.packing import IGNORE, Packed, PackedScenes
from vprune.training.schedule import adamw, follow, warmed_cosine

EVALUATION_SEED = 1_000_003
"""The world that progress is measured on: neither the training seeds nor the seed of the shipped split."""


def train(config: DictConfig) -> Path:
    """Trains, or goes on from the last checkpoint in `config.out`, and returns the folder of the finished model."""
    out = Path(config.out)
    checkpoint.claim(out, config, {checkpoint.FILE: ("seed", "model", "data", "optimizer")})
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if config.device == "auto" else config.device)
    if device.type == "cpu":
        print("Training on a CPU: about 3 images/s; the recipe reads 2.4 million (18 minutes on one H200).")
    torch.set_float32_matmul_precision("high")
    fields = cast(dict[str, Any], OmegaConf.to_container(config.model))
    model = build_model(fields["vision"], fields["text"], seed=config.seed)
    if config.start_from:
        model.load_state_dict(load_shards(Path(config.start_from)), strict=False)
        model.tie_weights()
    packed = PackedVLM(model).to(device).train()
    run = _Run(config, packed, device, out)
    run.resume()
    run.loop()
    folder = out / "model"
    save_finished(run.averaged_model(), folder)
    return folder


def save_finished(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes model (bf16 shards under 15 MB), tokenizer, processor and chat template."""
    model.bfloat16().save_pretrained(folder, max_shard_size="14MB")
    build_processor().save_pretrained(folder)


def save_shards(state: dict[str, Tensor], folder: Path, limit: int = 14_000_000) -> None:
    """Writes a state dict in float32 as `weights-N.safetensors`, each under `limit` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    number = 0
    for name, tensor in state.items():
        full = sum(t.numel() * 4 for t in shard.values()) + tensor.numel() * 4 > limit
        if full and shard:
            save_file(shard, folder / f"weights-{number}.safetensors")
            shard, number = {}, number + 1
        shard[name] = tensor.detach().float().cpu().contiguous()
    save_file(shard, folder / f"weights-{number}.safetensors")


def load_shards(folder: Path) -> dict[str, Tensor]:
    """Reads what `save_shards` wrote."""
    return {k: v for f in sorted(folder.glob("weights-*.safetensors")) for k, v in load_file(f).items()}


class _Run:
    """One training run: its model, optimizer, clock and log."""

    def __init__(self, config: DictConfig, packed: PackedVLM, device: torch.device, out: Path) -> None:
        self.config, self.packed, self.device, self.out = config, packed, device, out
        self.step, self.seconds = 0, 0.0
        self.optimizer = adamw(packed.parameters(), config.optimizer, device)
        self.average = {k: v.detach().float().clone() for k, v in packed.vlm.state_dict().items()}
        self.painter = Painter(config.data.photographs, device, compiled=config.compile)
        self.forward = torch.compile(self._losses, dynamic=False) if config.compile else self._losses

    # -- one step ---------------------------------------------------------------------------------------------------

    def _losses(self, pixels: Tensor, batch: dict[str, Tensor], patches: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to descend and, detached, its three parts: answers, patches, grounding."""
        logits, patch_logits, where = self._predict(pixels, batch)
        answers = answer_loss(logits, batch["labels"])
        seen = patch_loss(patch_logits, patches)
        found = grounding_loss(where, batch["grounding"], batch["objects"])
        weights = self.config.optimizer
        total = answers + weights.patch_loss * seen + weights.grounding_loss * found
        return total, torch.stack((answers, seen, found)).detach()

    def _predict(self, pixels: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            out: tuple[Tensor, Tensor, Tensor] = self.packed(
                pixels, batch["tokens"], batch["segments"], batch["positions"]
            )
        return out

    @torch.no_grad()
    def _prepare(self, packed: Packed, painter: Painter, noise: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        names = ("tokens", "segments", "positions", "labels", "grounding")
        batch = {n: getattr(packed, n).to(self.device, non_blocking=True).long() for n in names}
        scenes: Batch = packed.scenes.to(self.device)
        batch["objects"] = scenes.objects
        images, seen = painter.render(scenes)
        pixels = images.float()
        if noise:
            # Seeded by the step, so that a run that goes on draws what an unbroken one would have drawn.
            stream = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + self.step)
            strength = noise * torch.rand(len(pixels), 1, 1, 1, device=self.device, generator=stream)
            pixels = (pixels + strength * torch.randn(pixels.shape, device=self.device, generator=stream)).clamp(0, 255)
        return pixels / 127.5 - 1, batch, patch_labels(seen, scenes.objects)

    def progress(self) -> float:
        """Share of the schedule that is done, by the clock or by steps."""
        minutes = self.config.optimizer.minutes
        done = self.step / self.config.optimizer.steps if minutes is None else self.seconds / (60 * minutes)
        return min(1.0, float(done))

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to a fiftieth."""
        return warmed_cosine(self.config.optimizer, self.step, self.progress())

    def loop(self) -> None:
        """Trains until the schedule ends; logs, measures and saves on the way."""
        config = self.config
        batches = iter(self._loader(config.seed, config.data.photographs, first=self.step * config.data.batch_size))
        started, log_started = time.perf_counter() - self.seconds, time.perf_counter()
        saved = self.seconds
        recent: list[Tensor] = []
        with progress_bar() as bar:
            task = bar.add_task("train vlm", total=1.0, note="")
            while self.progress() < 1:
                rate = self.learning_rate()
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                loss, parts = self.forward(*self._prepare(next(batches), self.painter, config.data.noise))
                torch.autograd.backward(loss)
                norm = torch.nn.utils.clip_grad_norm_(self.packed.parameters(), config.optimizer.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self._update_average()
                recent.append(torch.cat((parts, norm[None])))
                self.step += 1
                if self.step % config.log_every == 0:
                    means = torch.stack(recent).mean(0).tolist()
                    recent = []
                    now = time.perf_counter()
                    speed = config.log_every * config.data.batch_size / (now - log_started)
                    log_started = now
                    names = ("answer_loss", "patch_loss", "grounding_loss", "gradient")
                    row = dict(zip(names, (round(m, 4) for m in means), strict=True))
                    self._log(**row, lr=rate, images_per_second=round(speed))
                    bar.update(task, completed=self.progress(), note=f"loss {means[0]:.3f} {speed:.0f} images/s")
                if self.step % config.evaluate_every == 0:
                    self._log(**self.evaluate())
                    log_started = time.perf_counter()
                self.seconds = time.perf_counter() - started
                if self.seconds - saved > 60 * config.checkpoint_minutes:
                    self.save()
                    saved = self.seconds
        self._log(**self.evaluate(batches=4))
        self.save()

    def _update_average(self) -> None:
        follow(self.average, self.packed.vlm.state_dict(), float(self.config.optimizer.average), self.step)

    # -- data -------------------------------------------------------------------------------------------------------

    def _loader(self, seed: int, photographs: str, first: int = 0, describe: float | None = None) -> DataLoader[Packed]:
        data = self.config.data
        stream = PackedScenes(
            seed,
            data.batch_size,
            data.length,
            len(photograph_names(photographs)),
            list(data.weights),
            data.describe if describe is None else describe,
            first,
        )
        workers = max(0, (os.cpu_count() or 1) - 2) if data.workers == "auto" else int(data.workers)
        return DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)

    # -- measuring --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches: int = 2) -> dict[str, Any]:
        """Share of answers right under teacher forcing, by kind: averaged weights, scenes over the test photographs."""
        if not hasattr(self, "held_out"):
            stream = self._loader(EVALUATION_SEED, "test").dataset
            self.held_out = [b for b, _ in zip(iter(stream), range(4), strict=False)]
            self.test_painter = Painter("test", self.device)
        right = torch.zeros(len(KINDS) + 1)
        asked = torch.zeros(len(KINDS) + 1)
        with self._averaged():
            for packed in self.held_out[:batches]:
                pixels, batch, _ = self._prepare(packed, self.test_painter, noise=0.0)
                logits, _, _ = self._predict(pixels, batch)
                wrong = ((logits.argmax(-1) != batch["labels"]) & (batch["labels"] != IGNORE)).cpu()
                segments = packed.segments.long() + 1000 * torch.arange(len(wrong))[:, None]
                answered = packed.segments > 0
                names, which = torch.unique(segments[answered], return_inverse=True)
                failed = torch.zeros(len(names)).index_add_(0, which, wrong[answered].float()) > 0
                kinds = torch.zeros(len(names), dtype=torch.long).index_copy_(0, which, packed.kinds[answered].long())
                asked.index_add_(0, kinds, torch.ones(len(names)))
                right.index_add_(0, kinds, (~failed).float())
        shares = (right / asked.clamp(min=1)).tolist()
        by_kind = {kind: round(share, 4) for kind, share in zip([*KINDS, "describe"], shares, strict=True)}
        return {"accuracy": round(sum(by_kind[k] for k in KINDS) / len(KINDS), 4), "by_kind": by_kind}

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        own = {k: v.detach().clone() for k, v in self.packed.vlm.state_dict().items()}
        self.packed.vlm.load_state_dict(self.average)
        try:
            yield
        finally:
            self.packed.vlm.load_state_dict(own)

    def averaged_model(self) -> LlavaForConditionalGeneration:
        """The model with the running mean of its weights."""
        self.packed.vlm.load_state_dict(self.average)
        return self.packed.release()

    def _log(self, **row: Any) -> None:
        line = {"step": self.step, "seconds": round(self.seconds, 1), **row}
        with (self.out / checkpoint.LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    # -- stopping and going on --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint that `resume` reads, whole or not at all, and the averaged weights beside it."""
        checkpoint.save(self.out, self.packed, self.optimizer, self.average, self.step, self.seconds)
        save_shards(self.average, self.out / "averaged")

    def resume(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        before = checkpoint.resume(self.out, self.packed, self.optimizer, self.device)
        if before is not None:
            self.average, self.step, self.seconds = before


def progress_bar() -> Progress:
    """How far a training run is."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>4.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
