"""The command `vprune bench model`: a whole model pruned, unpruned, and given a sequence that simply is that short."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vprune.bench.app import DONE, SOME_FAILED
from vprune.bench.model_rows import BOUND_CELLS, BOUND_KEEP, Cell, Row, line_of
from vprune.bench.results import DEVICES, options_text, read_words, write
from vprune.errors import VPruneError


@dataclass(frozen=True)
class Options:
    """What `vprune bench model` is asked to do; None = by what the machine has."""

    model: str = "onevision-7b"
    out: str = "runs/bench-model"
    device: str | None = None
    size: str | None = None
    dtype: str = "bfloat16"
    kind: str = "image"
    tokens: str | None = None
    batch: str | None = None
    keep: str = "0.1,0.25,0.5"
    method: str = "attention_max"
    scorer: str | None = None
    recycle: str | None = None
    size_aware: str | None = None
    layer: str | None = None
    graphs: str = "false"
    decode: str = "eager"
    new: str = "1,16,64,256"
    measure: str = "prefill,answer"
    repeats: int = 9
    minutes: float | None = None
    commit: str | None = None


MEANINGS = {
    "model": "at full size on cuda",
    "out": "the folder for bench.csv and bench.json",
    "device": "cuda where there is one",
    "size": "full on cuda",
    "dtype": "of weights and activations",
    "kind": "both with image,video",
    "tokens": "visual tokens a sample (729,7290,29160; tiny: 64,640), to the nearest whole picture or frame",
    "batch": "samples (1,8,32; tiny: 1,2)",
    "keep": "shares of the visual tokens; the cells of 0.1 come first",
    "method": "a name in conf/method/",
    "scorer": "the network of method=learned with random weights, so that what it costs is counted",
    "recycle": "as the method takes it",
    "size_aware": "as the method takes it",
    "layer": "as the method takes it",
    "graphs": "planning as CUDA graphs, as `vprune.prune` takes it",
    "decode": "compiled has a static cache and torch.compile, graph a static cache and CUDA graphs alone",
    "new": "numbers of new tokens, end to end",
    "measure": "both with prefill,answer",
    "repeats": "how often a prefill is timed; an answer half as often",
    "minutes": "begin no further cell after so many minutes, cells with bounds of their own first",
    "commit": "what to record in place of what git says of the source",
}
_CHOICES = {
    **DEVICES,
    "scorer": ("random",),
    "size_aware": ("true", "false"),
    "graphs": ("false", "true"),
    "decode": ("eager", "compiled", "graph"),
}
_LISTS = {"kind": ("image", "video"), "measure": ("prefill", "answer")}  # of which several may be given


def help_text() -> str:
    """Every option with its default and meaning."""
    from vprune.bench.architectures import ARCHITECTURES

    return options_text(Options, MEANINGS, {**_CHOICES, **_LISTS, "model": tuple(ARCHITECTURES)})


def read_options(words: Sequence[str]) -> Options:
    """Options from key=value.

    Raises:
        VPruneError: an unknown key, or a value that is none of those allowed.
    """
    values = read_words("model", words, MEANINGS, _CHOICES, ("repeats",))
    if "model" in values:
        from vprune.bench.architectures import ARCHITECTURES  # imports torch: other mistakes are told sooner

        read_words("model", [f"model={values['model']}"], MEANINGS, {"model": tuple(ARCHITECTURES)})
    if "minutes" in values:
        values["minutes"] = _number("minutes", values["minutes"], float)
    options = Options(**values)
    if options.scorer and options.method != "learned":
        raise VPruneError(f"scorer={options.scorer} belongs to method=learned, not to method={options.method}")
    for key, allowed in _LISTS.items():
        for one in getattr(options, key).split(","):
            if one not in allowed:
                raise VPruneError(f"{key}={getattr(options, key)}: choose {', '.join(allowed)}, or both")
    if options.layer is not None and not options.layer.isdecimal():
        raise VPruneError(f"layer={options.layer}: give the number of a decoder layer")
    if any(not 0 < share <= 1 for share in numbers(options.keep, "keep", float)):
        raise VPruneError(f"keep={options.keep}: give shares above 0, 1 at most")
    return options


def numbers(text: str, key: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers above 0, comma-separated.

    Raises:
        VPruneError: they are none.
    """
    return [_number(key, one, kind) for one in text.split(",")]


def _number(key: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise VPruneError(f"{key}={text}: give numbers above 0")
    return value


def main(words: Sequence[str]) -> int:
    """Measure, print and write after every cell; 1 if a cell failed its check."""
    options = read_options(words)

    import torch  # takes seconds, and mistakes are told by now

    on_cuda = torch.cuda.is_available()
    device = torch.device(options.device or ("cuda" if on_cuda else "cpu"))
    if device.type == "cuda" and not on_cuda:
        raise VPruneError("device=cuda: torch sees no CUDA device here; leave device out to try the bench on the CPU")
    size = options.size or ("full" if device.type == "cuda" else "tiny")
    if device.type == "cpu":
        print(f"no CUDA device is used: this tries the bench on the CPU, at {size} sizes")
    bench = ModelBench(options, device, size == "tiny")
    return SOME_FAILED if bench.run() else DONE


class ModelBench:
    """The cells of one model, measured one after the other; `rows` fill up, and are written after each."""

    def __init__(self, options: Options, device: Any, tiny: bool) -> None:
        import torch

        from vprune.bench.architectures import ARCHITECTURES, build, visual_tokens
        from vprune.bench.model_rows import SIDES
        from vprune.bench.passes import Side
        from vprune.bench.timing import Clock
        from vprune.eval.environment import describe

        self.options, self.device, self.tiny = options, device, tiny
        self.started = time.monotonic()
        self.counts = sorted({1, *numbers(options.new, "new", int)})
        self.work = self.planned()
        self.pruner(self.work[0][0].keep)  # a mistake in the method is told before minutes have passed
        self.architecture, self.clock = ARCHITECTURES[options.model], Clock(device)
        config = self.architecture.config(tiny)
        for cell, _ in self.work:
            visual_tokens(self.architecture, config, cell.kind, cell.tokens)
        self.dtype = getattr(torch, options.dtype)
        model = build(config, device, self.dtype)
        self.sides = {name: Side(name, model, self.clock) for name in SIDES}
        self.pruning(self.work[0][0].keep)  # refused here, not after a cell
        self.rows: list[Row] = []
        environment = describe(device, options.dtype, None)
        environment["git_commit"] = options.commit or environment["git_commit"]
        self.environment = environment | {
            "options": asdict(options) | {"device": str(device), "size": "tiny" if tiny else "full"},
            "parameters": sum(part.numel() for part in model.parameters()),
            "weights_bytes": sum(part.nbytes for part in model.parameters()),
            "attention": "sdpa",
            "prefill_is": "decoder entry, device idle, to the first token; hooks before the vision tower added",
            "build_seconds": time.monotonic() - self.started,
        }

    def planned(self) -> list[tuple[Cell, str]]:
        """Cells and what is measured of them, the most important first: those with bounds of their own, then small."""
        options = self.options
        tokens = numbers(options.tokens or ("64,640" if self.tiny else "729,7290,29160"), "tokens", int)
        batches = numbers(options.batch or ("1,2" if self.tiny else "1,8,32"), "batch", int)
        cells = [
            Cell(kind, count, batch, keep)
            for kind in options.kind.split(",")
            for keep in numbers(options.keep, "keep", float)
            for count in tokens
            for batch in batches
        ]
        phases = options.measure.split(",")

        def rank(work: tuple[Cell, str]) -> tuple[Any, ...]:
            cell, phase = work
            place = (cell.batch, cell.tokens)
            bound = cell.keep == BOUND_KEEP and cell.kind == "image" and place in BOUND_CELLS
            if bound:
                return 0, phase != "prefill", BOUND_CELLS.index(place)
            return 1, cell.keep != BOUND_KEEP, cell.kind != "image", cell.batch * cell.tokens, phase != "prefill"

        return sorted(((cell, phase) for cell in cells for phase in phases), key=rank)

    def pruner(self, keep: float) -> Any:
        """The method at one budget.

        Raises:
            VPruneError: the method does not know one of the options.
        """
        from vprune.pruner import load_method

        options = self.options
        aware = None if options.size_aware is None else options.size_aware == "true"
        layer = None if options.layer is None else int(options.layer)
        pruner = load_method(options.method, keep=keep, recycle=options.recycle, size_aware=aware, layer=layer)
        if options.scorer == "random":
            from vprune.bench.untrained import Untrained

            pruner = replace(pruner, scorer=Untrained())
        return pruner

    def pruning(self, keep: float) -> Any:
        """The pruned side's `Pruning` at one budget, not yet attached."""
        import vprune

        return vprune.prune(self.sides["pruned"].model, self.pruner(keep), graphs=self.options.graphs == "true")

    def run(self) -> bool:
        """Measure everything that is planned, as long as there is time; True if a check failed."""
        left: list[str] = []
        print("x: the unpruned model's time (or bytes) over the other's; above 1x the other is faster (or smaller)")
        for number, (cell, phase) in enumerate(self.work):
            if self._late():
                left.append(f"{cell.name}: {phase}")
                continue
            print(f"{cell.name}: {phase}", flush=True)
            rows = self._measured(cell, phase, len(self.work) - number)
            for row in rows:
                print(line_of(row), flush=True)
            self.rows += rows
            self._write([f"{one.name}: {name}" for one, name in self.work[number + 1 :]])
        self._write(left)
        if left:
            print(f"out of time after {self.options.minutes:g} minutes, not measured: {'; '.join(left)}")
        folder = Path(self.options.out)
        print(f"wrote {folder / 'bench.csv'} and {folder / 'bench.json'}")
        from vprune.bench.cell import NO_ROOM

        return any(row.problem is not None and not row.problem.startswith(NO_ROOM) for row in self.rows)

    def _late(self) -> bool:
        minutes = self.options.minutes
        return minutes is not None and time.monotonic() - self.started > minutes * 60

    def _write(self, left: list[str]) -> None:
        seconds = time.monotonic() - self.started
        write(Path(self.options.out), Row, self.rows, self.environment | {"not_measured": left, "seconds": seconds})

    def _measured(self, cell: Cell, phase: str, left: int) -> list[Row]:
        import torch

        from vprune.bench.architectures import make_prompt
        from vprune.bench.cell import NO_ROOM, CheckError, Fits, measure_answers, measure_prefills

        options, sides = self.options, self.sides
        method = options.method + (" (random scorer)" if options.scorer else "")
        method += " (graphs)" if options.graphs == "true" else ""
        head = {"model": options.model, "method": method, "decode": options.decode, **asdict(cell), "layout": ""}
        try:
            with self.pruning(cell.keep) as pruning, self._cleared():
                prompt = make_prompt(sides["unpruned"].model, self.architecture, cell.kind, cell.tokens, cell.batch)
                head |= {"tokens": prompt.tokens, "layout": prompt.layout}
                one = Fits(replace(cell, tokens=prompt.tokens), prompt, dict(sides), pruning, head, self._until(left))
                if phase == "prefill":
                    return measure_prefills(one, options.repeats)
                return measure_answers(one, math.ceil(options.repeats / 2), self.counts, options.decode)
        except CheckError as failure:
            return [Row(**head, measure=phase, problem=str(failure))]
        except torch.OutOfMemoryError:
            return [Row(**head, measure=phase, problem=f"{NO_ROOM}: the prompt itself")]

    def _until(self, left: int) -> float:
        """When repeats of the next cell should end, so that those after it have as much time."""
        minutes, now = self.options.minutes, time.monotonic()
        if minutes is None:
            return math.inf
        return now + max(0.0, self.started + 60 * minutes - now) / max(1, min(left, len(BOUND_CELLS)))

    @contextmanager
    def _cleared(self) -> Iterator[None]:
        """Caches and compiled steps of one cell leave no trace in the next."""
        import torch

        try:
            yield
        finally:
            for side in self.sides.values():
                side.forget()
                side.length = None
            if self.options.decode != "eager":
                torch.compiler.reset()
            gc.collect()
            if self.clock.cuda:
                torch.cuda.empty_cache()
