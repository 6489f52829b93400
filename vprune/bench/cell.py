"""One cell of `vprune bench model`: checked, sides that do not fit left out, the rest timed in turns."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from vprune.bench.architectures import Prompt, bytes_of_row
from vprune.bench.model_rows import Cell, Row, measured
from vprune.bench.passes import Answered, Prefilled, Side, interleaved
from vprune.models.cache import cache_for, cache_in

NO_ROOM = "does not fit into the memory of this device"
WARM_UP = 2  # runs of every side before the clock counts
LEAST = 3  # repeats of a cell that was begun, whatever the time


class CheckError(Exception):
    """A side does not do what it is to be timed for; says what is wrong."""


@dataclass
class Fits:
    """A cell under way: `sides` that fit so far, `lost` those that do not; repeats after `LEAST` end at `until`.

    `head`: what all of its rows begin with; `most`: rows of a sample that each side stores at most.
    """

    cell: Cell
    prompt: Prompt
    sides: dict[str, Side]
    pruning: Any
    head: dict[str, Any]
    until: float

    def __post_init__(self) -> None:
        self.lost: list[str] = []
        self.most: dict[str, int] = {}
        self._settle()

    def _settle(self) -> None:
        """Give the oracle the length that pruning leaves, and check both.

        Raises:
            CheckError: a side is not what it is called.
        """
        pruned, oracle, batch = self.sides["pruned"], self.sides["oracle"], self.prompt.shape[0]
        try:
            first = pruned.prefill(self.prompt)
        except torch.OutOfMemoryError:
            raise CheckError(f"{NO_ROOM}: pruned") from None
        oracle.length = round(first.stored)
        second = oracle.prefill(self.prompt)
        self.head |= {"unpruned_length": self.prompt.shape[1], "pruned_length": first.stored}
        self.head |= {"oracle_length": second.stored}
        self.most = {"unpruned": self.prompt.shape[1], "pruned": first.most, "oracle": second.most}
        report = self.pruning.last
        if report is None:
            raise CheckError("the method reported no prefill")
        if second.stored != oracle.length:
            raise CheckError(f"the oracle's cache holds {second.stored:g} rows, not {oracle.length}")
        if not (first.finite and second.finite):
            raise CheckError("logits are not finite")
        before, after = (sum(getattr(one, name) for one in report) for name in ("tokens_before", "tokens_after"))
        if before != batch * self.cell.tokens:
            raise CheckError(f"the report counts {before} visual tokens, not {batch * self.cell.tokens}")
        if after > max(math.floor(self.cell.keep * before + 1e-6), len(list(report))):
            raise CheckError(f"{after} of {before} visual tokens were kept, more than {self.cell.keep:.0%}")
        if round(first.stored) != self.prompt.others + after // batch and not self.pruning.pruner.stages:
            raise CheckError(f"the pruned cache holds {first.stored:g} rows, not {self.prompt.others + after // batch}")

    def timed(
        self, work: Callable[[Side], Any], repeats: int, warmed: Callable[[str], None] = lambda side: None
    ) -> dict[str, list[Any]]:
        """The results of all sides that fit, taking turns, after some runs of each; `warmed` looks at what those did.

        Raises:
            CheckError: none fits.
        """
        for name, side in list(self.sides.items()):
            try:
                for _ in range(WARM_UP):
                    work(side)
            except torch.OutOfMemoryError:
                self.lost.append(name)
                del self.sides[name]
            else:
                warmed(name)
            gc.collect()
            if self.lost and torch.cuda.is_available():
                torch.cuda.empty_cache()
        if not self.sides:
            raise CheckError(f"{NO_ROOM}: {', '.join(self.lost)}")
        works = {name: partial(work, side) for name, side in self.sides.items()}
        return interleaved(works, repeats, lambda done: done >= LEAST and time.monotonic() > self.until)

    def noted(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, with a word on sides that did not fit."""
        if not self.lost:
            return list(rows)
        return [replace(row, problem=f"{NO_ROOM}: {', '.join(self.lost)}") for row in rows]


def measure_prefills(fits: Fits, repeats: int) -> list[Row]:
    """Rows of the prefill, of what the hooks do before the first layer, of memory.

    Raises:
        CheckError: no side fits.
    """
    found: dict[str, list[Prefilled]] = fits.timed(lambda side: side.prefill(fits.prompt), repeats)

    def of(name: str) -> dict[str, list[float]]:
        return {side: [getattr(one, name) for one in runs] for side, runs in found.items()}

    side = next(iter(fits.sides.values()))
    dtype = next(side.model.parameters()).dtype
    text = fits.prompt.shape[0] * fits.prompt.others * bytes_of_row(side.model.config, dtype)
    row = partial(measured, fits.head, fits.cell)
    rows = [
        row("prefill", "ms", of("prefill")),
        row("plan", "ms", of("plan"), whole=of("prefill").get("unpruned")),
        row("kv_visual", "bytes", {name: [one - text for one in held] for name, held in of("cache").items()}),
    ]
    if side.clock.cuda:
        rows += [row("peak_memory", "bytes", of("peak")), row("peak_above_before", "bytes", of("extra"))]
    return fits.noted(rows)


def measure_answers(fits: Fits, repeats: int, counts: Sequence[int], decode: str) -> list[Row]:
    """Rows of the time to the first token, to so many new tokens, of a decoding step.

    Raises:
        CheckError: no side fits, or steps that were to be compiled were not.
    """
    if decode != "eager":  # every cell has shapes of its own, and only so many of them may be compiled
        torch._dynamo.reset()
    options = {name: decoding(side, decode, fits.most[name] + max(counts)) for name, side in fits.sides.items()}
    graphs = _graphs()

    def work(side: Side) -> Answered:
        cache = cache_in(options[side.name])
        if cache is not None:
            cache.reset()
        return side.answer(fits.prompt, counts, options[side.name])

    def warmed(name: str) -> None:
        nonlocal graphs
        if decode != "eager" and max(counts) > 1 and _graphs() == graphs:
            raise CheckError(f"decoding steps of the side '{name}' were not compiled")
        graphs = _graphs()

    found: dict[str, list[Answered]] = fits.timed(work, repeats, warmed)
    row = partial(measured, fits.head, fits.cell)
    rows = []
    for count in counts:
        values = {name: [one.at[count] for one in runs] for name, runs in found.items()}
        rows.append(row("first_token", "ms", values) if count == 1 else row("end_to_end", "ms", values, count))
    if max(counts) > 1:
        rows.append(row("decode_token", "ms", {name: [one.step for one in runs] for name, runs in found.items()}))
    return fits.noted(rows)


def decoding(side: Side, decode: str, rows: int) -> dict[str, Any]:
    """What `generate` is told: nothing, or a static cache of just so many rows, and how to compile its steps."""
    from transformers import CompileConfig, StaticCache

    if decode == "eager":
        return {}
    config: Any = CompileConfig
    if not side.clock.cuda:
        compiled = config(backend="eager", mode=None, dynamic=False)
        compiled._compile_all_devices = True
    elif decode == "compiled":
        compiled = config(mode="reduce-overhead", dynamic=False)
    else:
        compiled = config(backend="cudagraphs", mode=None, dynamic=False)
    cache = StaticCache(config=side.model.config.get_text_config(), max_cache_len=rows)
    return {**cache_for(side.model, cache), "compile_config": compiled}


def _graphs() -> int:
    """How many graphs were compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
