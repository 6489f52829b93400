"""What the recipes of the embedded SAM and CLIP share: painted scenes, schedule, running mean, log and resume."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vprune.errors import VPruneError
from vprune.eval.scenes import layout
from vprune.eval.scenes.render import Batch, Painter, pack, photograph_names
from vprune.training import checkpoint
from vprune.training.schedule import adamw, follow, spare_the_host, warmed_cosine
from vprune.training.vlm import EVALUATION_SEED, progress_bar


class PaintedScenes(IterableDataset[Batch]):
    """An endless stream of packed scenes; workers take turns over the scene indices.

    Args:
        seed: seed of the world.
        batch_size: scenes a batch.
        photographs: number of photographs that backgrounds are cut from.
        skip: batches to leave out, where a run goes on.
        scenes: so many different scenes, over and over; None: always new ones.
    """

    def __init__(self, seed: int, batch_size: int, photographs: int, skip: int = 0, scenes: int | None = None) -> None:
        self.seed, self.batch_size, self.photographs = seed, batch_size, photographs
        self.skip, self.scenes = skip, scenes

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, step = (worker.id, worker.num_workers) if worker else (0, 1)
        turn += self.skip
        while True:
            indices = range(turn * self.batch_size, (turn + 1) * self.batch_size)
            yield pack([self._scene(index) for index in indices])
            turn += step

    def _scene(self, index: int) -> Any:
        index = index if self.scenes is None else index % self.scenes
        return layout.sample_scene(layout.stream(self.seed, index), self.photographs)


class TrainingLoop:
    """One training run of `model`; a recipe adds `losses` and `measure`.

    Every random choice of a step comes from a generator seeded by the step, so a run that goes on draws what an
    unbroken one would have drawn.
    """

    name = "model"

    def __init__(self, config: DictConfig, model: nn.Module, device: torch.device, out: Path) -> None:
        self.config, self.model, self.device, self.out = config, model.to(device).train(), device, out
        self.step, self.seconds = 0, 0.0
        self.optimizer = adamw(model.parameters(), config.optimizer, device)
        self.average = {key: value.detach().clone() for key, value in model.state_dict().items()}
        compiled = bool(config.compile) and device.type == "cuda"
        self.painter = Painter(config.data.photographs, device, compiled=compiled)
        self.compiled = compiled

    # -- what a recipe adds -----------------------------------------------------------------------------------------

    def losses(self, scenes: Batch, random: torch.Generator) -> dict[str, Tensor]:
        """Run the model on the scenes, go backward, and tell the losses (detached scalars)."""
        raise NotImplementedError

    def measure(self, batches: list[Batch], painter: Painter) -> dict[str, Any]:
        """Figures on held-out scenes, for the log; the model holds the averaged weights meanwhile."""
        raise NotImplementedError

    # -- the loop ---------------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """Share of the schedule that is done, by the clock or by steps."""
        optimizer = self.config.optimizer
        done = self.step / optimizer.steps if optimizer.steps is not None else self.seconds / (60 * optimizer.minutes)
        return min(1.0, float(done))

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to a fiftieth."""
        return warmed_cosine(self.config.optimizer, self.step, self.progress())

    def autocast(self) -> Any:
        """Brain-float arithmetic on a GPU, plain float32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def run(self) -> None:
        """Train until the schedule ends; log, measure and save on the way."""
        config = self.config
        self.resume()
        batches = iter(self._loader())
        started = time.perf_counter() - self.seconds
        saved, since = self.seconds, time.perf_counter()
        recent: list[Tensor] = []
        with progress_bar() as bar:
            task = bar.add_task(f"train {self.name}", total=1.0, note="")
            while self.progress() < 1:
                rate = self.learning_rate()
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                random = torch.Generator(self.device).manual_seed(config.seed * 1_000_003 + self.step)
                losses = self.losses(next(batches).to(self.device), random)
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self._update_average()
                recent.append(torch.stack([*losses.values(), norm]).detach())
                self.step += 1
                if self.step % config.log_every == 0:
                    means = torch.stack(recent).mean(0).tolist()
                    recent = []
                    speed = config.log_every * config.data.batch_size / (time.perf_counter() - since)
                    row = dict(zip([*losses, "gradient"], (round(m, 4) for m in means), strict=True))
                    self.log(**row, lr=rate, images_per_second=round(speed, 1))
                    bar.update(task, completed=self.progress(), note=f"loss {means[0]:.3f} {speed:.0f} images/s")
                    since = time.perf_counter()
                if self.step % config.evaluate_every == 0:
                    self.log(**self.evaluate())
                    since = time.perf_counter()
                self.seconds = time.perf_counter() - started
                if self.seconds - saved > 60 * config.checkpoint_minutes:
                    self.save()
                    saved = self.seconds
            bar.update(task, completed=1.0)
        if self.step % config.evaluate_every:
            self.log(**self.evaluate())
        self.save()

    def _loader(self) -> DataLoader[Batch]:
        data = self.config.data
        stream = PaintedScenes(
            int(self.config.seed), int(data.batch_size), len(photograph_names(data.photographs)), self.step, data.scenes
        )
        workers = max(0, (os.cpu_count() or 1) - 2) if data.workers == "auto" else int(data.workers)
        return DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)

    def _update_average(self) -> None:
        follow(self.average, self.model.state_dict(), float(self.config.optimizer.average), self.step)

    # -- measuring --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Figures of the averaged weights, on scenes over photographs never trained on."""
        held_out = self.config.held_out
        size = int(held_out.batch_size)
        stream = iter(PaintedScenes(EVALUATION_SEED, size, len(photograph_names("test"))))
        batches = [next(stream).to(self.device) for _ in range(max(1, int(held_out.scenes) // size))]
        if not hasattr(self, "test_painter"):
            self.test_painter = Painter("test", self.device)
        with self.averaged():
            return self.measure(batches, self.test_painter)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the running mean of its weights."""
        own = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(own)
            self.model.train()

    def log(self, **row: Any) -> None:
        """Write a line of `log.jsonl`."""
        line = {"step": self.step, "seconds": round(self.seconds, 1), **row}
        with (self.out / checkpoint.LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # -- stopping and going on --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint that `resume` reads, whole or not at all."""
        checkpoint.save(self.out, self.model, self.optimizer, self.average, self.step, self.seconds)

    def resume(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        before = checkpoint.resume(self.out, self.model, self.optimizer, self.device)
        if before is not None:
            self.average, self.step, self.seconds = before


def begin(config: DictConfig, recipe: str) -> tuple[Path, torch.device]:
    """The folder of a run, claimed, and the device that it trains on.

    Raises:
        VPruneError: no length of the schedule, or a folder that another recipe has begun in.
    """
    if config.optimizer.minutes is None and config.optimizer.steps is None:
        raise VPruneError("optimizer.minutes and optimizer.steps are both null: give one of them")
    out = Path(str(config.out)).expanduser()
    checkpoint.claim(out, config)
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if config.device == "auto" else str(config.device))
    if device.type == "cpu":
        print(f"Training {recipe} on a CPU: the recipe is laid out for minutes on a GPU and takes hours here.")
    torch.set_float32_matmul_precision("high")
    spare_the_host(device)
    torch.manual_seed(int(config.seed))
    return out, device
