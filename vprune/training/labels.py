"""Relevance labels on disk: one shard a batch, so that labelling can be broken off and taken up again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vprune.errors import VPruneError
from vprune.scoring.relevance import memory_of, relevance
from vprune.training.prompts import Answered, read_prompt


@dataclass(frozen=True)
class Labelled:
    """The relevance of every image of the first `batches` batches of a stream, in `folder`."""

    folder: Path
    batches: int

    def of(self, number: int, images: Sequence[int]) -> Tensor:
        """The targets [I, N] of some images, all of one grid, of batch `number`."""
        shard = load_file(self.folder / name_of(number))
        return as_label(torch.stack([shard[str(image)] for image in images]))


def name_of(number: int) -> str:
    """The file of a batch."""
    return f"labels-{number:05d}.safetensors"


def label(
    model: Any,
    batches: Callable[[int], Iterator[Answered]],
    count: int,
    folder: Path,
    at_once: int,
    bar: Any = None,
) -> Labelled:
    """Label the first `count` questions of a stream, from where an earlier call broke off.

    Says beforehand what memory it takes. `batches(skip)` gives the stream from its `skip`-th batch on, all batches but
    the last of one size; `at_once` questions share a pass.

    Raises:
        VPruneError: `folder` cannot be written to.
    """
    from vprune.training.vlm import progress_bar

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VPruneError(f"{folder} cannot be written to ({error})") from error
    size = len(next(iter(batches(0))))
    total = max(1, math.ceil(count / size))
    done = 0
    while done < total and _whole(folder / name_of(done)):
        done += 1
    if done == total:
        return Labelled(folder, total)
    with progress_bar() as shown:
        task = shown.add_task("labelling", total=total, completed=done, note="")
        for number, batch in zip(range(done, total), batches(done), strict=False):
            if number == done:
                need = memory_of(model.config, min(at_once, size), batch.answer.shape[1])
                print(f"labelling {count} questions, {at_once} at a time: {need / 1e9:.1f} GB of attention", flush=True)
            _save(relevance_of_images(model, batch, at_once), folder / name_of(number))
            shown.update(task, advance=1, note=f"{(number + 1) * size} questions")
    return Labelled(folder, total)


def relevance_of_images(model: Any, batch: Answered, at_once: int) -> dict[str, Tensor]:
    """The relevance, float32 [N], of each image of a batch by its number in it."""
    found: dict[str, Tensor] = {}
    # Answers of a length go together: a pass takes one step back for each token of its longest.
    lengths = batch.answer.sum(-1)
    for rows in torch.split(lengths.argsort(stable=True), at_once):
        part = batch.rows(rows)
        prefill = read_prompt(model, part.inputs)
        told = relevance(prefill.anatomy, prefill, part.inputs["input_ids"], part.answer).cpu()
        for image in prefill.images:
            found[f"{int(rows[image.sample])} {image.image}"] = told[image.sample, image.columns.cpu()]
    ordered = sorted(found, key=lambda key: tuple(map(int, key.split())))
    return {str(number): found[key].contiguous() for number, key in enumerate(ordered)}


def _save(found: dict[str, Tensor], path: Path) -> None:
    part = path.with_suffix(".part")
    save_file(found, part)
    part.replace(path)


def _whole(path: Path) -> bool:
    try:
        return path.exists() and bool(load_file(path))
    except (OSError, SafetensorError):
        return False


def as_label(relevant: Tensor) -> Tensor:
    """The target of the published recipe, [I, N]: the lower half set to zero, the rest divided by its sum."""
    middle = relevant.median(-1, keepdim=True).values
    upper = torch.where(relevant > middle, relevant, 0.0)
    total = upper.sum(-1, keepdim=True)
    return torch.where(total > 0, upper / total.clamp(min=1e-30), 1.0 / relevant.shape[-1])
