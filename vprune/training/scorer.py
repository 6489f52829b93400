"""`vprune train scorer`: teaches a small network which visual tokens a model's answers cannot do without."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.functional import log_softmax

from vprune.errors import VPruneError
from vprune.records import Prefill
from vprune.scoring.learned import Features, identity_of, read_features
from vprune.scoring.network import ScorerConfig, ScorerNetwork, same_grid
from vprune.training.effect import Budgeting, answer_logits, divergence, full_states, gate, gated_states
from vprune.training.labels import Labelled, label
from vprune.training.prompts import Answered, Painted, read_prompt
from vprune.training.questions import Questions, load_model

OBJECTIVES = ("effect", "relevance")
EVALUATION_SEED = 1_000_003
_EVALUATED = 4  # batches


def train(config: DictConfig) -> Path:
    """Train a scorer as conf/train/scorer.yaml says, or go on with it; returns the folder of the finished one.

    Raises:
        VPruneError: a value out of range, a model that cannot be had, questions that hold no images.

    Example:
        >>> from omegaconf import OmegaConf
        >>> train(OmegaConf.load("conf/train/scorer.yaml"))  # doctest: +SKIP
        PosixPath('runs/train/scorer/scorer')
    """
    if config.objective not in OBJECTIVES:
        raise VPruneError(f"objective={config.objective!r}: choose one of {', '.join(OBJECTIVES)}")
    if config.optimizer.minutes is None and config.optimizer.steps is None:
        raise VPruneError("optimizer.minutes and optimizer.steps are both null: give one of them")
    out = Path(str(config.out)).expanduser()
    claim(out, config)
    run = _Run(config, out)
    run.say_what_it_costs()
    run.resume()
    run.loop()
    return run.finish()


def claim(out: Path, config: DictConfig) -> None:
    """Make `out` this run's folder.

    Raises:
        VPruneError: another recipe has begun in it.
    """
    path = out / "config.yaml"
    if path.exists() and (out / "checkpoint.pt").exists():
        before: Any = OmegaConf.load(path)
        differing = [key for key in config if key not in ("out", "device") and before.get(key) != config[key]]
        if differing:
            raise VPruneError(
                f"{out} holds a run with other values of {', '.join(map(str, differing))}: give another folder with "
                "out=, or delete this one to start over"
            )
    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, path)


class _Run:
    """One training run: model, network, optimizer, clock and log."""

    def __init__(self, config: DictConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.loaded = load_model(str(config.model), str(config.device))
        self.device, self.model = self.loaded.device, self.loaded.model
        self.compiled = self.device.type == "cuda" if config.compile == "auto" else bool(config.compile)
        self.painted = str(config.questions) == "painted"
        self.batch_size = int(config.optimizer.batch_size)
        self.questions = None if self.painted else Questions(self.loaded, str(config.questions), config.limit, out)
        if self.painted and str(config.model) != "embedded":
            raise VPruneError(
                f"model={config.model} with questions=painted: those are about the embedded model's world; give "
                "questions=FOLDER, one with samples.jsonl and the images it names"
            )
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(config.seed)
        first = next(iter(self._batches(0)))
        self.first_prompt = read_prompt(self.model, first.inputs)
        self.network = self._network(self.first_prompt).to(self.device)
        self.average = {key: value.detach().clone() for key, value in self.network.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        self.labels: Labelled | None = None
        if config.objective == "relevance":
            count = config.limit or 10_000
            self.labels = label(self.model, self._batches, int(count), out / "labels", int(config.label_batch))

    def _network(self, prefill: Prefill) -> ScorerNetwork:
        wanted: Any = OmegaConf.to_container(self.config.network)
        reads = wanted.pop("reads_rows")
        identity = identity_of(prefill.anatomy)
        recipe: Any = OmegaConf.to_container(self.config)
        recipe = {key: value for key, value in recipe.items() if key not in ("out", "device", "network")}
        return ScorerNetwork(
            ScorerConfig(
                **wanted,
                heads=int(identity["num_attention_heads"]),
                width=int(identity["hidden_size"]) if reads else 0,
                model=identity,
                recipe=recipe,
            )
        )

    def _batches(self, skip: int, size: int | None = None) -> Iterator[Answered]:
        """The batches of the run from the `skip`-th on, the same ones whenever they are asked for."""
        size = size or self.batch_size
        if self.questions is not None:
            yield from self.questions.batches(size, self.config.seed, skip)
        else:
            import os

            workers = 0 if self.device.type == "cpu" else max(0, (os.cpu_count() or 1) // 2)
            each = min(int(self.config.optimizer.questions_per_image), size)
            weights = list(self.config.optimizer.kinds)
            yield from Painted(self.config.seed, size, "train", self.device, each, workers, skip, weights)

    # -- what it will cost ------------------------------------------------------------------------------------------

    def say_what_it_costs(self) -> None:
        """Print, before anything long begins, what memory and time the run will take."""
        batch, length = self.first_prompt.valid.shape
        text: Any = self.model.config.get_text_config()
        heads = int(text.num_attention_heads)
        bytes_each = 2 if self.device.type == "cuda" else 4
        # What the backward pass holds of a layer: ten or so rows of the width (more in the MLP), one mask for all.
        rows = text.num_hidden_layers * batch * length * (10 * text.hidden_size + 3 * text.intermediate_size)
        need = bytes_each * (rows + 2 * heads * batch * length**2)
        span = f"{self.config.optimizer.minutes} minutes"
        if self.config.optimizer.minutes is None:
            span = f"{self.config.optimizer.steps} steps (the first ones will tell how long they take)"
        parameters = sum(part.numel() for part in self.network.parameters())
        print(
            f"training a scorer of {parameters:,} parameters on {self.device}: {batch} questions a step, "
            f"{length} tokens each, about {need / 1e9:.1f} GB beside the model; {span}",
            flush=True,
        )

    # -- one step ---------------------------------------------------------------------------------------------------

    def _loss(self, batch: Answered, number: int) -> Tensor:
        prefill, features = self._read(batch)
        if self.labels is not None:
            return self._relevance_loss(prefill, features, number)
        chance = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        pick = torch.multinomial(torch.tensor(list(self.config.effect.how_often)), 1, generator=chance)
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # so that a run that goes on draws the same noise
        wanted, progress = self.config.effect, self.progress()
        first, last = wanted.temperature
        how = replace(
            self._hard(float(wanted.keeps[int(pick)])),
            temperature=first * (last / first) ** progress,
            noise=wanted.noise * (1 - progress),
        )
        full, pruned = self._answers(prefill, features, batch, how)
        return divergence(full, pruned, batch)

    def _hard(self, keep: float) -> Budgeting:
        return Budgeting(keep, self.config.effect.share, self.config.effect.distance)

    def _answers(self, prefill: Prefill, features: Features, batch: Answered, how: Budgeting) -> tuple[Tensor, Tensor]:
        """The answers' logits [T, V] of the full model and of the pruned one."""
        groups = []
        with self._autocast():
            with torch.no_grad():
                full = answer_logits(self.model, full_states(prefill, self.compiled), batch)
            for grid, numbers in same_grid([image.grid for image in prefill.images]).items():
                images = [prefill.images[number] for number in numbers]
                arguments = features.of(images, grid)
                scores = self.network(*arguments).float()
                groups.append((images, gate(scores, arguments[2], grid, how)))
            return full, answer_logits(self.model, gated_states(prefill, groups, self.compiled), batch)

    def _read(self, batch: Answered) -> tuple[Prefill, Features]:
        with self._autocast():
            prefill = read_prompt(self.model, batch.inputs, batch.repeats)
        return prefill, read_features(prefill, self.network.config.layer, batch.begins)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _relevance_loss(self, prefill: Prefill, features: Features, number: int) -> Tensor:
        assert self.labels is not None
        wanted, losses = self.config.relevance, []
        for grid, numbers in same_grid([image.grid for image in prefill.images]).items():
            images = [prefill.images[n] for n in numbers]
            scores = self.network(*features.of(images, grid)).float()
            if wanted.mask_top:
                best = scores.detach().topk(10, -1).indices
                hidden = torch.rand(best.shape, device=best.device) < wanted.mask_top
                scores = scores.scatter_add(1, best, -1e4 * hidden.float())
            target = self.labels.of(number, numbers).to(scores.device)
            told = log_softmax(scores, -1)
            weight = (1 - told.exp()) ** wanted.focal if wanted.focal else 1.0
            losses.append((weight * target * (target.clamp(min=1e-12).log() - told)).sum(-1))
        return torch.cat(losses).mean()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """Share of the schedule that is done, by the clock or by steps."""
        minutes, steps = self.config.optimizer.minutes, self.config.optimizer.steps
        done = self.step / steps if minutes is None else self.seconds / (60 * minutes)
        return min(1.0, float(done))

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / max(1, self.config.optimizer.warmup))
        return float(self.config.optimizer.lr * warm * 0.5 * (1 + math.cos(math.pi * self.progress())))

    def loop(self, until: int | None = None) -> None:
        """Train until the schedule ends (or step `until`); log, measure and save on the way."""
        from vprune.training.vlm import progress_bar

        config, recent, started = self.config, [], time.perf_counter() - self.seconds
        saved = self.seconds
        batches = self._numbered()
        with progress_bar() as bar:
            task = bar.add_task("train scorer", total=1.0, note="")
            while self.progress() < 1 and self.step != until:
                for group in self.optimizer.param_groups:
                    group["lr"] = self._rate()
                number, batch = next(batches)
                loss = self._loss(batch, number)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.optimizer.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                decay = min(float(config.optimizer.average), self.step / (self.step + 10))
                for key, value in self.network.state_dict().items():
                    self.average[key].lerp_(value, 1 - decay)
                recent.append(loss.detach())
                self.step += 1
                if self.step % config.log_every == 0:
                    mean, recent = float(torch.stack(recent).mean()), []
                    self._log(loss=round(mean, 5), seconds=round(self.seconds, 1))
                    bar.update(task, completed=self.progress(), note=f"loss {mean:.4f}")
                if self.step % config.evaluate_every == 0:
                    self._log(**self.evaluate())
                self.seconds = time.perf_counter() - started
                if self.seconds - saved > 60 * config.checkpoint_minutes:
                    self.save()
                    saved = self.seconds
        self._log(**self.evaluate())

    def _numbered(self) -> Iterator[tuple[int, Answered]]:
        """The batches that are left, with their numbers; labelled ones come again and again."""
        period = self.labels.batches if self.labels is not None else None
        number = self.step if period is None else self.step % period
        while True:
            for batch in self._batches(number):
                yield number, batch
                number += 1
                if number == period:
                    break
            number = 0

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Share of the full model's answers that stay right to the last word under pruning, by budget.

        Averaged weights; painted questions are about photographs that training does not see, others are its last ones.
        """
        own = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        told = {}
        for keep in self.config.effect.keeps:
            how = self._hard(float(keep))
            right = asked = 0
            for batch in self._held_out():
                prefill, features = self._read(batch)
                full, pruned = self._answers(prefill, features, batch, how)
                wrong = (full.argmax(-1) != pruned.argmax(-1)).float()
                lengths = batch.answer.sum(-1)
                failed = torch.zeros(len(batch), device=wrong.device)
                owner = torch.arange(len(batch), device=wrong.device).repeat_interleave(lengths)
                right += int((failed.index_add(0, owner, wrong) == 0).sum())
                asked += len(batch)
            told[str(keep)] = round(right / asked, 4)
        self.network.load_state_dict(own)
        return {"same_answers": told}

    def _held_out(self) -> list[Answered]:
        if not hasattr(self, "_kept"):
            source: Iterator[Answered]
            if self.questions is not None:
                source = self.questions.held_out(self.batch_size)
            else:
                source = iter(Painted(EVALUATION_SEED, self.batch_size, "test", self.device, 1))
            self._kept = [batch for batch, _ in zip(source, range(_EVALUATED), strict=False)]
        return self._kept

    def _log(self, **row: Any) -> None:
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **row}) + "\n")

    # -- stopping and going on --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint that `resume` reads, whole or not at all."""
        state = {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        part = self.out / "checkpoint.part"
        torch.save(state, part)
        part.replace(self.out / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        path = self.out / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]

    def finish(self) -> Path:
        """Write the scorer with its averaged weights."""
        self.network.load_state_dict(self.average)
        folder = self.out / "scorer"
        self.network.cpu().save_pretrained(folder)
        return folder
