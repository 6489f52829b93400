"""Relevance labels on disk: one shard a batch, so that labelling can be broken off and taken up again."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vprune.errors import VPruneError
from vprune.records import Prefill
from vprune.scoring.relevance import memory_of, relevance
from vprune.training.prompts import Answered, read_prompt

FOLDER = "labels"
_LONGER = 1.25  # times the shortest answer of a pass: longer ones go into a pass of their own
_SHARE = 0.6  # of the free memory that attention and its gradients may take; the rest of the graph needs some, too


@dataclass(frozen=True)
class Labelled:
    """The relevance of every image of the first `batches` batches of a stream, in `folder`."""

    folder: Path
    batches: int
    _last: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def of(self, number: int, images: Sequence[int]) -> Tensor:
        """The targets [I, N] of some images, all of one grid, of batch `number`."""
        if number not in self._last:  # a batch of pictures of many sizes asks for as many groups of one shard
            self._last.clear()
            self._last[number] = load_file(self.folder / name_of(number))
        return as_label(torch.stack([self._last[number][str(image)] for image in images]))


def name_of(number: int) -> str:
    """The file of a batch."""
    return f"labels-{number:05d}.safetensors"


def label(
    model: Any, batches: Callable[[int], Iterator[Answered]], count: int, size: int, folder: Path, at_once: int
) -> Labelled:
    """Label the first `count` questions of a stream, or those of them that earlier calls left.

    Says beforehand what it takes. `batches(skip)` gives the stream from its `skip`-th batch on, `size` questions each
    (the last ones of a folder may be fewer); at most `at_once` questions share a pass.

    Raises:
        VPruneError: `folder` cannot be written to.
    """
    from vprune.training.vlm import progress_bar

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VPruneError(f"{folder} cannot be written to ({error})") from error
    total = math.ceil(count / size)
    missing = [number for number in range(total) if not _whole(folder / name_of(number))]
    if not missing:
        return Labelled(folder, total)
    left = min(count, len(missing) * size)
    print(f"labelling: {left} of {count} questions are left, in {len(missing)} batches", flush=True)
    stream, at = batches(missing[0]), missing[0]
    with progress_bar() as bar:
        task, passes, began = bar.add_task("labelling", total=left, note=""), 0, 0.0

        def tell(questions: int, tokens: int) -> None:
            nonlocal passes, began
            bar.advance(task, questions)
            passes += 1
            if passes == 2:  # the first pass is slower than all others: kernels are loaded and memory is taken
                minutes = (time.perf_counter() - began) / 60 / tokens * left * float(batch.answer.sum()) / len(batch)
                print(f"labelling takes about {minutes:.1f} minutes; broken off, it goes on where it was", flush=True)
            began = time.perf_counter()

        for number in missing:
            if number != at:
                stream = batches(number)
            batch, at = next(stream), number + 1
            fitting = _fitting(model, batch, at_once)
            if number == missing[0]:
                need = memory_of(model.config, fitting, batch.answer.shape[1])
                lowered = "" if fitting == min(at_once, len(batch)) else f" (memory allows no more; asked: {at_once})"
                print(f"labelling {fitting} at a time{lowered}: {need / 1e9:.1f} GB of attention", flush=True)
            _save(relevance_of_images(model, batch, fitting, tell), folder / name_of(number))
            bar.update(task, note=f"batch {number + 1} of {total}")
    return Labelled(folder, total)


def relevance_of_images(
    model: Any, batch: Answered, at_once: int, tell: Callable[[int, int], None] = lambda questions, tokens: None
) -> dict[str, Tensor]:
    """The relevance, float32 [N], of each image of a batch by its number in it.

    `tell` hears of every pass, how many questions it was and how many tokens were asked about.
    """
    prefill, ids = read_prompt(model, batch.inputs, batch.repeats), batch.inputs["input_ids"]
    told, lengths = torch.zeros(ids.shape), batch.answer.sum(-1)
    for rows in _passes(lengths.tolist(), at_once):
        some = torch.tensor(rows, device=ids.device)
        told[rows] = relevance(prefill.anatomy, _rows(prefill, some), ids[some], batch.answer[some]).float().cpu()
        tell(len(rows), len(rows) * int(lengths[some].max()))
    return {str(number): told[one.sample, one.columns.cpu()].contiguous() for number, one in enumerate(prefill.images)}


def _passes(lengths: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """The rows that share a pass: it takes one step back for each token of its longest answer, in all of its rows."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if len(rows) == at_once or (rows and lengths[row] > _LONGER * lengths[rows[0]]):
            yield rows
            rows = []
        rows.append(row)
    yield rows


def _rows(prefill: Prefill, rows: Tensor) -> Prefill:
    """What the decoder reads of some samples of a batch, LongTensor `rows`, whose images nobody asks about.

    (Taken here and not from the model's inputs: families lay out the pixels of a batch each in their own way.)
    """
    positions = prefill.positions
    if positions.shape[-2] > 1:
        positions = positions[..., rows.to(positions.device), :]
    whole = {"hidden": prefill.hidden, "valid": prefill.valid, "visual": prefill.visual}
    part: dict[str, Any] = {name: tensor[rows.to(tensor.device)] for name, tensor in whole.items()}
    return replace(prefill, positions=positions, images=(), tower=(), **part)


def _fitting(model: Any, batch: Answered, at_once: int) -> int:
    """How many questions of a batch can share a pass, at least one."""
    device = batch.answer.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return min(at_once, len(batch))
    most = int(_SHARE * free / memory_of(model.config, 1, batch.answer.shape[1]))
    return max(1, min(at_once, len(batch), most))


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
