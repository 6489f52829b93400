"""`vprune train scorer`: teaches a small network which visual tokens a model's answers cannot do without."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.functional import log_softmax

from vprune.errors import VPruneError
from vprune.eval.models import resolve
from vprune.records import Prefill
from vprune.scoring.learned import Features, identity_of, read_features
from vprune.scoring.network import FINISHED, ScorerConfig, ScorerNetwork, same_grid, scorer_folder
from vprune.training import checkpoint
from vprune.training.effect import Budgeting, answer_logits, certain, divergence, full_states, gate, gated_states
from vprune.training.labels import FOLDER as LABELS
from vprune.training.labels import Labelled, label
from vprune.training.prompts import Answered, Painted, read_prompt, refuse_untrainable
from vprune.training.questions import ANSWERS, LONGEST, Questions, drawn, load_model
from vprune.training.schedule import spare_the_host
from vprune.training.watching import Watching, start_from

OBJECTIVES = ("effect", "relevance", "demand")
_DRAWN = ("model", "questions", "limit", "seed", "optimizer.batch_size", "optimizer.questions_per_image")
_MADE = {ANSWERS: _DRAWN[:2], LABELS: (*_DRAWN, "optimizer.kinds")}
"""What each file of a run depends on, beside its checkpoint, which depends on everything."""


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
    if config.objective == "demand" and (config.start_from is None or not config.demand.count):
        raise VPruneError(
            "objective=demand teaches a finished scorer how many tokens a question needs: give its folder as "
            f"start_from= (it is {config.start_from}) and demand.count above 0 (it is {config.demand.count})"
        )
    if config.optimizer.minutes is None and config.optimizer.steps is None:
        raise VPruneError("optimizer.minutes and optimizer.steps are both null: give one of them")
    resolve(str(config.model))
    if config.start_from is not None:
        scorer_folder(str(config.start_from), "start_from")
    if str(config.questions) != "painted":
        drawn(str(config.questions), config.limit)  # told before a large model is loaded, not after
    elif str(config.model) != "embedded":
        raise VPruneError(
            f"model={config.model} with questions=painted: those are about the embedded model's world; give "
            "questions=FOLDER, one with samples.jsonl and the images it names"
        )
    out = Path(str(config.out)).expanduser()
    checkpoint.claim(out, config, _MADE)
    run = _Run(config, out)
    run.say_what_it_costs()
    if config.objective != "demand":
        run.label()
        run.resume()
        run.loop()
    run.learn_demand()
    return run.finish()


class _Run(Watching):
    """One training run: model, network, optimizer, clock and log."""

    def __init__(self, config: DictConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.loaded = load_model(str(config.model), str(config.device))
        self.device, self.model = self.loaded.device, self.loaded.model
        self.compiled = self.device.type == "cuda" if config.compile == "auto" else bool(config.compile)
        self.painted = str(config.questions) == "painted"
        self.batch_size = int(config.optimizer.batch_size)
        self.questions = None if self.painted else Questions(self.loaded, str(config.questions), config.limit, out)
        if self.questions is not None:
            self.batch_size = min(self.batch_size, len(self.questions.train))
        torch.set_float32_matmul_precision("high")
        spare_the_host(self.device)
        torch.manual_seed(config.seed)
        self.first = next(self.batches(0, 2))
        self.first_prompt = read_prompt(self.model, self.first.inputs)
        refuse_untrainable(self.first_prompt)
        self.network = self._network(self.first_prompt).to(self.device)
        if config.start_from is not None:
            before = start_from(self.network, str(config.start_from))
            if config.objective == "demand":  # (all else was learnt as that scorer's recipe says)
                recipe = {**before.recipe, "demand": self.network.config.recipe["demand"]}
                self.network.config = replace(self.network.config, recipe=recipe)
        self.average = {key: value.detach().clone() for key, value in self.network.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        self.labels: Labelled | None = None

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
                levels=tuple(self.config.demand.levels) if self.learns_demand else (),
                model=identity,
                recipe=recipe,
            )
        )

    def batches(
        self, skip: int, size: int | None = None, seed: int | None = None, kinds: Sequence[float] | None = None
    ) -> Iterator[Answered]:
        """The batches of the run from the `skip`-th on, the same ones whenever they are asked for."""
        size, seed = size or self.batch_size, self.config.seed if seed is None else seed
        if self.questions is not None:
            yield from self.questions.batches(size, seed, skip)
        else:
            each = min(int(self.config.optimizer.questions_per_image), size)
            weights = list(self.config.optimizer.kinds if kinds is None else kinds)
            yield from Painted(seed, size, "train", self.device, each, self.workers, skip, weights)

    # -- what it will cost ------------------------------------------------------------------------------------------

    def say_what_it_costs(self) -> None:
        """Print, before anything long begins, what memory and time the run will take.

        Raises:
            VPruneError: a step does not fit into the memory of the GPU.
        """
        wanted, size, length = self.config.optimizer, self.batch_size, self.first_prompt.valid.shape[1]
        text: Any = self.model.config.get_text_config()
        heads = int(text.num_attention_heads)
        bytes_each = 2 if self.device.type == "cuda" else 4
        # What the backward pass holds of a layer: ten or so rows of the width (more in the MLP), one mask for all.
        rows = text.num_hidden_layers * size * length * (10 * text.hidden_size + 3 * text.intermediate_size)
        need = bytes_each * (rows + 2 * heads * size * length**2)
        span = f"{wanted.steps} steps" if wanted.steps is not None else f"{wanted.minutes} minutes"
        parameters = sum(part.numel() for part in self.network.parameters())
        told = [
            f"training a scorer of {parameters:,} parameters on {self.device}: {size} questions a step, about {length} "
            f"tokens each, about {need / 1e9:.1f} GB beside the model; {span}"
        ]
        if self.questions is not None:
            told.append(
                f"{len(self.questions.train)} questions to learn from, {len(self.questions.kept)} to measure on; the "
                f"model answers each of them once, in at most {LONGEST} tokens, and the answers are kept"
            )
        if self.learns_demand:
            most = "" if self.config.demand.minutes is None else f", for {self.config.demand.minutes} minutes at most"
            told.append(
                f"then {self.config.demand.count} answers are watched at {len(self.config.demand.levels)} budgets{most}"
            )
        print(*told, sep="\n", flush=True)
        if self.config.objective == "demand":
            return
        seconds = self._seconds_a_step()
        if seconds is None:
            return
        steps = int(60 * wanted.minutes / seconds if wanted.steps is None else wanted.steps)
        print(f"about {seconds:.1f} s a step: {steps} steps take {steps * seconds / 60:.1f} minutes", flush=True)
        if steps < wanted.warmup:
            print(
                f"{steps} steps are fewer than the {wanted.warmup} of the warm-up, too few to learn much: give more of "
                "optimizer.minutes (or steps), or a smaller optimizer.batch_size, or a GPU",
                flush=True,
            )

    def _seconds_a_step(self) -> float | None:
        """How long a step will take, tried out; None where labels come first, or a GPU's first steps soon tell."""
        on_gpu = self.device.type == "cuda"
        if self.config.objective == "relevance" or (on_gpu and self.painted):
            return None
        batch, seconds = self.first, 0.0
        for _ in range(2):  # the first one is slower than all that follow
            started = time.perf_counter()
            try:
                if on_gpu and batch is self.first:  # (a GPU takes no longer for many questions than for two)
                    batch = next(self.batches(0))
                torch.autograd.backward(self._loss(batch, 0))
            except torch.OutOfMemoryError as error:
                free, whole = (number / 1e9 for number in torch.cuda.mem_get_info(self.device))
                raise VPruneError(
                    f"{self.batch_size} questions of about {self.first_prompt.valid.shape[1]} tokens a step do not fit "
                    f"into the memory of {self.device} ({whole:.0f} GB, {free:.0f} free): give a smaller "
                    "optimizer.batch_size"
                ) from error
            self.optimizer.zero_grad(set_to_none=True)
            if on_gpu:
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - started
        return seconds * self.batch_size / len(batch)

    def label(self) -> None:
        """Have the questions labelled, where relevance is what is learnt: all of a folder, 10,000 painted ones."""
        if self.config.objective == "relevance":
            count = int(self.config.limit or 10_000) if self.questions is None else len(self.questions.train)
            folder, at_once = self.out / LABELS, int(self.config.label_batch)
            self.labels = label(self.model, self.batches, count, self.batch_size, folder, at_once)

    # -- one step ---------------------------------------------------------------------------------------------------

    def _loss(self, batch: Answered, number: int) -> Tensor:
        chance = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # so that a run that goes on draws the same noise
        prefill, features = self.read(batch)
        if self.labels is not None:
            return self._relevance_loss(prefill, features, number)
        often = torch.tensor([float(share) for share in self.config.effect.how_often])
        pick = torch.multinomial(often, 1, generator=chance)
        wanted, progress = self.config.effect, self.progress()
        first, last = wanted.temperature
        how = replace(
            self.hard(float(wanted.keeps[int(pick)])),
            temperature=first * (last / first) ** progress,
            noise=float(wanted.noise),
            widest=float(wanted.widest),
        )
        full, pruned = self._answers(prefill, features, batch, how)
        return divergence(full, pruned, batch)

    def hard(self, keep: float) -> Budgeting:
        """A budget as pruning spends it."""
        wanted = self.config.effect
        return Budgeting(keep, float(wanted.share), float(wanted.distance), power=float(wanted.power))

    def _answers(self, prefill: Prefill, features: Features, batch: Answered, how: Budgeting) -> tuple[Tensor, Tensor]:
        """The answers' logits [T, V] of the full model and of the pruned one."""
        groups = []
        with self.autocast():
            with torch.no_grad():
                if self.config.effect.teacher == "model":
                    full = answer_logits(self.model, full_states(prefill, self.compiled), batch)
                else:
                    full = certain(batch, int(self.model.config.get_text_config().vocab_size))
            for grid, numbers in same_grid([image.grid for image in prefill.images]).items():
                images = [prefill.images[number] for number in numbers]
                arguments = features.of(images, grid)
                scores = self.network(*arguments).float()
                groups.append((images, gate(scores, arguments[2], grid, how)))
            return full, answer_logits(self.model, gated_states(prefill, groups, self.compiled), batch)

    def read(self, batch: Answered) -> tuple[Prefill, Features]:
        """What the decoder and the network read of a batch."""
        with self.autocast():
            prefill = read_prompt(self.model, batch.inputs, batch.repeats)
        return prefill, read_features(prefill, self.network.config.layer, batch.begins)

    def autocast(self) -> Any:
        """Half precision on a GPU."""
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
        done = self.step / steps if steps is not None else self.seconds / (60 * minutes)
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
                torch._foreach_lerp_(list(self.average.values()), list(self.network.state_dict().values()), 1 - decay)
                recent.append(loss.detach())
                self.step += 1
                if self.step % config.log_every == 0:
                    mean, recent = float(torch.stack(recent).mean()), []
                    self.log(loss=round(mean, 5), seconds=round(self.seconds, 1))
                    bar.update(task, note=f"loss {mean:.4f}")
                bar.update(task, completed=self.progress())
                if self.step % config.evaluate_every == 0:
                    self.log(**self.evaluate())
                self.seconds = time.perf_counter() - started
                if self.seconds - saved > 60 * config.checkpoint_minutes:
                    self.save()
                    saved = self.seconds
        self.save()
        self.log(**self.evaluate())

    def _numbered(self) -> Iterator[tuple[int, Answered]]:
        """The batches that are left, with their numbers; labelled ones come again and again."""
        period = self.labels.batches if self.labels is not None else None
        number = self.step if period is None else self.step % period
        while True:
            for batch in self.batches(number):
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
        keeps = [float(keep) for keep in self.config.effect.keeps]
        same, lost, asked = [0] * len(keeps), [0.0] * len(keeps), 0
        for batch in self.held_out():
            prefill, features = self.read(batch)
            lengths = batch.answer.sum(-1)
            owner = torch.arange(len(batch), device=self.device).repeat_interleave(lengths)
            for number, keep in enumerate(keeps):
                full, pruned = self._answers(prefill, features, batch, self.hard(keep))
                wrong = (full.argmax(-1) != pruned.argmax(-1)).float()
                failed = torch.zeros(len(batch), device=self.device).index_add(0, owner, wrong)
                same[number] += int((failed == 0).sum())
                lost[number] += float(divergence(full, pruned, batch)) * len(batch)
            asked += len(batch)
        self.network.load_state_dict(own)
        return {
            "same_answers": {str(keep): round(count / asked, 4) for keep, count in zip(keeps, same, strict=True)},
            "divergence": {str(keep): round(total / asked, 5) for keep, total in zip(keeps, lost, strict=True)},
        }

    def log(self, **row: Any) -> None:
        """Add a line to log.jsonl."""
        with (self.out / checkpoint.LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **row}) + "\n")

    # -- stopping and going on --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint that `resume` reads, whole or not at all."""
        checkpoint.save(self.out, self.network, self.optimizer, self.average, self.step, self.seconds)

    def resume(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        before = checkpoint.resume(self.out, self.network, self.optimizer, self.device)
        if before is not None:
            self.average, self.step, self.seconds = before

    def finish(self) -> Path:
        """Write the scorer with its averaged weights."""
        self.network.load_state_dict(self.average)
        folder = self.out / FINISHED
        self.network.cpu().save_pretrained(folder)
        return folder
