"""What the hooks cost, and what pruning saves, at the shapes of 7B models with random weights.

    PYTHONPATH=. python kernels/bench/hooks.py --out DIR                   # one CUDA GPU, both families, some minutes
    PYTHONPATH=. python kernels/bench/hooks.py --out DIR --tiny            # the script itself, on a CPU, in seconds

`uniform` scores nothing: at keep=1 it is the hooks alone; `attention` at keep=1 adds the scoring. All cases of a repeat
run one after another, in an order that turns with every repeat, so that drifting clocks meet all of them alike.
Decoding steps take turns one by one, each case on a copy of the model with the same weights and on its own cache: what
a busy host adds within seconds is larger than what hooks cost.
Prints one table and writes DIR/hooks.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import vprune
from vprune.bench.architectures import ARCHITECTURES, build, bytes_of_row, make_prompt
from vprune.bench.passes import sharing
from vprune.bench.timing import Clock
from vprune.pruner import Pruner
from vprune.scoring.text_attention import TextAttention
from vprune.selection import Stride

STEPS = 48
# the architecture, and visual tokens without line breaks: at the real shapes, and at the tiny ones
FAMILIES = {"onevision": ("onevision-7b", 7290, 640), "qwen2vl": ("qwen2vl-7b", 7056, 64)}


@dataclass(frozen=True)
class Case:
    """One way to run the model; without a method it is not hooked at all."""

    method: str = ""
    keep: float = 1.0
    recycle: str = "none"

    @property
    def name(self) -> str:
        """A name for the table."""
        recycled = "" if self.recycle == "none" else f" {self.recycle}"
        return f"{self.method} keep={self.keep:g}{recycled}" if self.method else "unhooked"

    def pruner(self) -> Pruner:
        """The method, made without its YAML file, so that a bare GPU machine needs no hydra."""
        if self.method == "attention":
            sized = self.recycle != "none"
            return Pruner(
                keep=self.keep, scorer=TextAttention(), recycle=self.recycle, size_aware=sized, name=self.method
            )
        return Pruner(keep=self.keep, selector=Stride(), name=self.method)


CASES = (
    *(Case(), Case("uniform"), Case("attention"), Case("uniform", 0.1), Case("attention", 0.1)),
    *(Case("attention", 0.1, "grid"), Case("attention", 0.1, "anchors")),
)


@dataclass(frozen=True)
class Run:
    """One prefill."""

    prefill_ms: float
    plan_ms: float
    peak_bytes: int
    cache_bytes: int
    stored: int
    logits: Tensor


@contextmanager
def pruned(model: Any, case: Case) -> Iterator[vprune.Pruning | None]:
    """The model as the case wants it."""
    with ExitStack() as stack:
        yield stack.enter_context(vprune.prune(model, case.pruner())) if case.method else None


def steps_of(model: Any, token: Tensor, seen: int, cache: Any, steps: int) -> Iterator[None]:
    """Greedy steps on a cache that has seen `seen` tokens, called as `generate` calls; the host never looks at them."""
    mask = torch.ones((1, seen + steps), dtype=torch.long, device=token.device)
    positions = torch.arange(seen, seen + steps, device=token.device)[None]
    shift = getattr(model.model, "rope_deltas", None)
    if shift is not None:  # M-RoPE: those of the text, for masks, then three that rotate
        positions = torch.stack([positions, *[positions + shift] * 3])
    for step in range(steps):
        out = model(
            input_ids=token,
            attention_mask=mask[:, : seen + step + 1],
            position_ids=positions[..., step : step + 1],
            past_key_values=cache,
            use_cache=True,
        )
        token = out.logits[:, -1:].argmax(-1)
        yield


def decode_in_turns(
    model: Any, inputs: dict[str, Tensor], cases: Sequence[Case], clock: Clock, repeats: int
) -> dict[Case, list[float]]:
    """Milliseconds of every decoding step of every case, `STEPS` a repeat; who steps first turns with every step."""
    length, times = inputs["input_ids"].shape[1], {case: [] for case in cases}
    copies = [sharing(model) for _ in cases]
    with torch.no_grad(), ExitStack() as stack:
        for copied, case in zip(copies, cases, strict=True):
            stack.enter_context(pruned(copied, case))
        for _ in range(repeats):
            going = []
            for copied in copies:
                out = copied(**inputs, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
                going.append(steps_of(copied, token, length, out.past_key_values, STEPS))
            for step in range(STEPS):
                for place in range(len(cases)):
                    number = (step + place) % len(cases)
                    clock.wait()
                    start = time.perf_counter()
                    next(going[number])
                    clock.wait()
                    times[cases[number]].append((time.perf_counter() - start) * 1e3)
    return times


def run(model: Any, inputs: dict[str, Tensor], case: Case, clock: Clock) -> Run:
    """One timed prefill; putting the hooks on is not in the time."""
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), pruned(model, case) as pruning:
        clock.wait()
        if clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = clock.mark()
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        read = clock.mark()
        clock.wait()
        last = pruning.last if pruning is not None else None
    layers = out.past_key_values.layers
    return Run(
        prefill_ms=clock.between(start, read),
        plan_ms=last.seconds * 1e3 if last is not None else 0.0,
        peak_bytes=torch.cuda.max_memory_allocated() if clock.cuda else 0,
        cache_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
        stored=length - sum(one.tokens_before - one.tokens_after for one in last or []),
        logits=out.logits,
    )


def waits(model: Any, inputs: dict[str, Tensor], case: Case, clock: Clock) -> dict[str, float] | None:
    """How often the host waits for the device in a prefill and in a decoding step; None where there is no GPU."""
    if not clock.cuda:
        return None
    steps, length = 4, inputs["input_ids"].shape[1]

    def counted(work: Callable[[], Any]) -> tuple[Any, int]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return result, sum("synchronizing CUDA operation" in str(one.message) for one in seen)

    with torch.no_grad(), pruned(model, case):
        out, prefill = counted(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
        token = out.logits[:, -1:].argmax(-1)
        _, decoding = counted(lambda: list(steps_of(model, token, length, out.past_key_values, steps)))
    return {"prefill": prefill, "decode_step": decoding / steps}


def tower_ms(model: Any, pixels: dict[str, Tensor], clock: Clock) -> float:
    """The vision tower and the projector alone: the part of a prefill that pruning leaves as it is."""
    times = []
    for _ in range(5):
        clock.wait()
        start = clock.mark()
        with torch.no_grad():
            model.get_image_features(**pixels)
        end = clock.mark()
        clock.wait()
        times.append(clock.between(start, end))
    return statistics.median(times)


def generate_ms(model: Any, inputs: dict[str, Tensor], case: Case, clock: Clock) -> float:
    """Plain `generate` of `STEPS` tokens, from the call to the answer."""
    with pruned(model, case):
        clock.wait()
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        clock.wait()
        return (time.perf_counter() - start) * 1e3


def interleaved(
    work: Callable[[Case], Any], cases: Sequence[Case], repeats: int, warm_up: int
) -> dict[Case, list[Any]]:
    """The results of every case; who comes first turns with every repeat."""
    results: dict[Case, list[Any]] = {case: [] for case in cases}
    for repeat in range(-warm_up, repeats):
        turn = repeat % len(cases)
        for case in (*cases[turn:], *cases[:turn]):
            result = work(case)
            if repeat >= 0:
                results[case].append(result)
    return results


def compared(own: list[float], base: list[float]) -> dict[str, float]:
    """The median in milliseconds, the median and the quartiles of neighbours' ratios, and the ratio of the least times.

    What the host adds is never below zero, so the least of many times is the one with the least of it.
    """
    ratios = [mine / theirs for mine, theirs in zip(own, base, strict=True)]
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    middle, ratio = statistics.median(own), statistics.median(ratios)
    spread = {"ratio_p25": quarters[0], "ratio_p75": quarters[2]}
    return {"ms": middle, "ratio": ratio, **spread, "least": min(own) / min(base)}


def measure(family: str, cases: Sequence[Case], device: torch.device, tiny: bool, repeats: int) -> dict[str, Any]:
    """The cases of one family."""
    dtype, clock, started = torch.float32 if tiny else torch.bfloat16, Clock(device), time.perf_counter()
    name, *tokens = FAMILIES[family]
    config = ARCHITECTURES[name].config(tiny)
    model = build(config, device, dtype)
    prompt = make_prompt(model, ARCHITECTURES[name], "image", tokens[tiny], 1)
    inputs, pixels = prompt.inputs, prompt.pixels
    built = time.perf_counter() - started
    weights = torch.cuda.memory_allocated() if clock.cuda else 0
    runs = interleaved(lambda case: run(model, inputs, case, clock), cases, repeats, 3)
    answers = interleaved(lambda case: generate_ms(model, inputs, case, clock), cases, math.ceil(repeats / 2), 1)
    decoded = decode_in_turns(model, inputs, cases, clock, math.ceil(repeats / 3))
    plain = runs[cases[0]]
    rows = []
    for case in cases:
        own = runs[case]
        by_hand = bytes_of_row(config, dtype) * own[-1].stored
        assert own[-1].logits.isfinite().all()
        rows.append(
            {
                "case": asdict(case),
                "name": case.name,
                "prefill": compared([one.prefill_ms for one in own], [one.prefill_ms for one in plain]),
                "decode_step": compared(decoded[case], decoded[cases[0]]),
                "generate": compared(answers[case], answers[cases[0]]),
                "plan_ms": statistics.median(one.plan_ms for one in own),
                "peak_bytes": max(one.peak_bytes for one in own),
                "cache_bytes": own[-1].cache_bytes,
                "cache_bytes_by_hand": by_hand,
                "cache_as_by_hand": own[-1].cache_bytes == by_hand,
                "stored": own[-1].stored,
                "host_waits": waits(model, inputs, case, clock),
                "logits_as_unhooked": torch.equal(own[-1].logits, plain[-1].logits),
            }
        )
    return {
        "family": family,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "visual_tokens": int((inputs["input_ids"] == config.image_token_id).sum()),
        "parameters": sum(one.numel() for one in model.parameters()),
        "dtype": str(dtype),
        "weights_bytes": weights,
        "tower_ms": tower_ms(model, pixels, clock),
        "build_seconds": built,
        "seconds": time.perf_counter() - started,
        "cases": rows,
    }


def table(measured: list[dict[str, Any]]) -> str:
    """All families and cases as one table."""
    titles = ("family", "case", "prefill ms", "x", "[p25 p75]", "least", "decode ms", "x", "[p25 p75]", "least")
    titles += ("generate ms", "x")
    titles += ("plan ms", "peak GiB", "cache MiB", "by hand", "waits pre/step", "as unhooked")
    lines = [titles]
    for one in measured:
        for row in one["cases"]:
            waited, cells = row["host_waits"], [one["family"], row["name"]]
            for part in ("prefill", "decode_step"):
                times = row[part]
                cells += [f"{times['ms']:.2f}", f"{times['ratio']:.3f}"]
                cells += [f"{times['ratio_p25']:.3f} {times['ratio_p75']:.3f}", f"{times['least']:.3f}"]
            cells += [f"{row['generate']['ms']:.1f}", f"{row['generate']['ratio']:.3f}", f"{row['plan_ms']:.2f}"]
            cells += [f"{row['peak_bytes'] / 2**30:.2f}", f"{row['cache_bytes'] / 2**20:.2f}"]
            cells += ["equal" if row["cache_as_by_hand"] else f"{row['cache_bytes_by_hand'] / 2**20:.2f}"]
            cells += [f"{waited['prefill']} / {waited['decode_step']:g}" if waited else "-"]
            cells += ["equal" if row["logits_as_unhooked"] else "differs"]
            lines.append(tuple(cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for hooks.json")
    parser.add_argument("--family", choices=FAMILIES, help="default: both, one after the other")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--keep-all", action="store_true", help="only what the hooks cost where nothing is pruned")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes on the CPU: tries the script, measures nothing"
    )
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("the real shapes need a CUDA GPU; --tiny tries the script on the CPU")
    device = torch.device("cpu" if options.tiny else "cuda")
    found: dict[str, Any] = {
        "device": "CPU" if options.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "vprune": vprune.__version__,
        "attention": "sdpa",
        "repeats": options.repeats,
        "decode_steps": STEPS,
        "tiny": options.tiny,
        "families": [],
    }
    cases = [case for case in CASES if case.keep == 1 or not options.keep_all]
    options.out.mkdir(parents=True, exist_ok=True)
    for family in [options.family] if options.family else FAMILIES:
        found["families"].append(measure(family, cases, device, options.tiny, options.repeats))
        # Written after each family: a run that is cut off keeps what it has.
        (options.out / "hooks.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    versions = f"{found['device']}, torch {found['torch']}, transformers {found['transformers']}"
    for one in found["families"]:
        print(
            f"{one['family']}: {one['visual_tokens']} visual of {one['prompt_tokens']} tokens, "
            f"{one['parameters'] / 1e9:.2f}e9 parameters ({one['dtype']}), tower alone {one['tower_ms']:.1f} ms; "
            f"{one['seconds']:.0f} s in all; {versions}"
        )
    print(table(found["families"]))


if __name__ == "__main__":
    main()
