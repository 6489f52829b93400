"""Where the GPU waits while a pruned prompt is read: every gap between its kernels, and what the host did meanwhile.

    PYTHONPATH=. python kernels/bench/gaps.py --out DIR [--graphs] [--tokens 7290] [--batch 1] [--model onevision-7b]

Profiles (torch.profiler) one prefill of each side of `vprune bench model`, vision tower included, after some unprofiled
ones: a full-size model with random weights, bf16, on one CUDA GPU. Prints a line for every part of the prefill, and one
for every gap longer than `--longest` microseconds outside the vision tower; writes DIR/gaps.json. The profiler slows
the host down, so that gaps are longer than they are without it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import vprune
from vprune.bench.architectures import ARCHITECTURES, build, make_prompt
from vprune.bench.model_rows import SIDES
from vprune.bench.passes import Side
from vprune.bench.timing import Clock
from vprune.models.anatomy import dissect

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
POINT = "point: "


@dataclass(frozen=True)
class Gap:
    """A time in which the device had nothing to do, in microseconds.

    `at`: since the first kernel; `part`: of the prefill, in which the kernel behind the gap was launched; `late`: of
    the gap, until the host had launched that kernel; `kernel`: its name; `host`: the operations of the host that began
    meanwhile, in their order.
    """

    at: float
    us: float
    part: str
    late: float
    kernel: str
    host: tuple[str, ...]


def gaps_of(events: Sequence[dict[str, Any]]) -> tuple[list[Gap], float]:
    """The gaps in a trace of torch.profiler, and the time from the first kernel to the end of the last."""
    timed = [event for event in events if event.get("ph") == "X"]
    points = sorted((one["ts"], one["name"][len(POINT) :]) for one in timed if one["name"].startswith(POINT))
    starts = [ts for ts, _ in points]
    launches = {
        one["args"]["correlation"]: one
        for one in timed
        if one.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in one["args"]
    }
    work = sorted((one for one in timed if one.get("cat") in ON_DEVICE), key=lambda one: one["ts"])
    calls = sorted(
        (one for one in timed if one.get("cat") in ("cpu_op", "cuda_runtime") and not one["name"].startswith(POINT)),
        key=lambda one: one["ts"],
    )
    begun = [one["ts"] for one in calls]
    found, free = [], work[0]["ts"]
    for one in work:
        if one["ts"] > free:
            launch = launches.get(one["args"].get("correlation"))
            called = one["ts"] if launch is None else launch["ts"]
            number = bisect_right(starts, called) - 1
            meanwhile = calls[bisect_right(begun, free) : bisect_right(begun, min(called, one["ts"]))]
            found.append(
                Gap(
                    at=free - work[0]["ts"],
                    us=one["ts"] - free,
                    part=points[number][1] if number >= 0 else "before",
                    late=min(max(called - free, 0.0), one["ts"] - free),
                    kernel=one["name"][:60],
                    host=tuple(call["name"] for call in meanwhile),
                )
            )
        free = max(free, one["ts"] + one["dur"])
    return found, free - work[0]["ts"]


def profiled(side: Side, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The trace of one prefill, with a point where each of its parts begins."""
    anatomy, model = dissect(side.model), side.model

    def point(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            with record_function(POINT + name):
                pass

        return note

    handles = [
        anatomy.base.register_forward_pre_hook(point("before the tower"), prepend=True),
        anatomy.decoder.register_forward_pre_hook(point("planning"), prepend=True),
        anatomy.decoder.register_forward_pre_hook(point("decoder's own beginning")),
        anatomy.layers[0].register_forward_pre_hook(point("layers"), prepend=True),
        anatomy.decoder.register_forward_hook(point("head")),
        *[
            part.register_forward_pre_hook(point("vision tower"), prepend=True)
            for name, part in model.named_modules()
            if name.rpartition(".")[2] in ("vision_tower", "visual")
        ],
        *[
            part.register_forward_hook(point("merging features"))
            for name, part in model.named_modules()
            if name.rpartition(".")[2] in ("vision_tower", "visual")
        ],
    ]
    try:
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            out = model(**inputs, use_cache=True, logits_to_keep=1)
            out.logits[:, -1:].argmax(-1)
            side.clock.wait()
    finally:
        for handle in handles:
            handle.remove()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        recorded.export_chrome_trace(file.name)
        events: list[dict[str, Any]] = json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]
    return events


def summary(name: str, gaps: Sequence[Gap], whole: float, longest: float) -> str:
    """Lines for the parts, then for the long gaps outside the tower."""
    lines = [f"{name}: {whole / 1000:.2f} ms, of it idle {sum(gap.us for gap in gaps) / 1000:.2f} ms"]
    for part in dict.fromkeys(gap.part for gap in gaps):
        inside = [gap for gap in gaps if gap.part == part]
        long = [gap for gap in inside if gap.us > longest]
        lines.append(
            f"  {part:<24} {len(inside):>5} gaps {sum(one.us for one in inside) / 1000:>8.3f} ms; above {longest:g} us "
            f"{len(long):>4}, {sum(one.us for one in long) / 1000:>8.3f} ms, host late "
            f"{sum(one.late for one in long) / 1000:.3f} ms"
        )
    for gap in gaps:
        if gap.us > longest and gap.part != "vision tower":
            names = list(dict.fromkeys(gap.host))
            shown = ", ".join(names[:6]) + (f", {len(names) - 6} more" if len(names) > 6 else "")
            lines.append(
                f"    {gap.at / 1000:>8.3f} ms {gap.us:>7.1f} us (host late {gap.late:.1f}) {gap.part}: "
                f"{len(gap.host)} calls ({shown}) before {gap.kernel[:40]}"
            )
    return "\n".join(lines)


def main() -> None:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gaps.json")
    parser.add_argument("--model", choices=ARCHITECTURES, default="onevision-7b")
    parser.add_argument("--tokens", type=int, default=7290)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--method", default="attention_max")
    parser.add_argument("--graphs", action="store_true", help="planning as CUDA graphs")
    parser.add_argument("--longest", type=float, default=20.0, help="microseconds that need no explanation")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU, whose gaps could be told")
    device = torch.device("cuda")
    architecture, clock = ARCHITECTURES[options.model], Clock(device)
    model = build(architecture.config(False), device, torch.bfloat16)
    sides = {name: Side(name, model, clock) for name in SIDES}
    prompt = make_prompt(model, architecture, "image", options.tokens, options.batch)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found |= {"options": {name: str(value) for name, value in vars(options).items()}, "sides": {}}
    with vprune.prune(sides["pruned"].model, options.method, keep=options.keep, graphs=options.graphs):
        sides["oracle"].length = round(sides["pruned"].prefill(prompt).stored)
        for name in ("pruned", "oracle"):
            inputs = sides[name].inputs(prompt)
            for _ in range(4):
                times = sides[name].prefill(prompt)
            gaps, whole = gaps_of(profiled(sides[name], inputs))
            print(f"{name}, not profiled: prefill {times.prefill:.2f} ms, of it planning {times.plan:.2f} ms")
            print(summary(name, gaps, whole, options.longest), flush=True)
            found["sides"][name] = {"us": whole, "times": asdict(times), "gaps": [asdict(gap) for gap in gaps]}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gaps.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
