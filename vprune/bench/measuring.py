"""One case of the bench: checked, then timed beside its torch expressions, what torch.compile makes of them, a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vprune.bench.app import Options, Row
from vprune.bench.kernels import Case
from vprune.bench.timing import Timing, copy_time, measure, measure_launched
from vprune.kernels import backend_module


def measured(case: Case, device: torch.device, options: Options, compiling: bool) -> Row:
    """The row of a case; without times where the check fails."""
    backend = options.backend if options.backend != "auto" else _chosen_by_auto(device)
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "dtype": options.dtype, "backend": backend}
    problem = case.problem()
    if problem is not None:
        return Row(**row, problem=problem)

    def timed(run: Callable[..., Any]) -> Timing:
        return measure([partial(run, *inputs) for inputs in case.sets], device, options.repeats)

    own = timed(case.run)
    launched = measure_launched([partial(case.run, *inputs) for inputs in case.sets], device, options.repeats)
    copied = copy_time(case.size, device, options.repeats)
    plain = {name: timed(run) for name, run in case.expressions.items()}
    best = min(plain, key=lambda name: plain[name].p50)
    row |= {"p20_us": own.p20 * 1e6, "p50_us": own.p50 * 1e6, "p80_us": own.p80 * 1e6, "timed_as": own.how}
    row |= {"launched_us": launched.p50 * 1e6, "bytes": case.size, "tb_per_s": case.size / own.p50 / 1e12}
    row |= {"copy_us": copied.p50 * 1e6, "to_copy": own.p50 / copied.p50}
    row |= {"torch": best, "torch_us": plain[best].p50 * 1e6, "torch_timed_as": plain[best].how}
    row |= {"to_torch": own.p50 / plain[best].p50}
    if case.work:
        row["tflop_per_s"] = case.work / own.p50 / 1e12
    if compiling:
        torch.compiler.reset()
        try:
            compiled = timed(torch.compile(case.expressions[best], dynamic=False))
        except RuntimeError as error:  # the compiler's failure is no reason to lose the other columns
            row["problem"] = f"torch.compile failed: {str(error).splitlines()[0]}"
        else:
            row |= {"compiled_us": compiled.p50 * 1e6, "to_compiled": own.p50 / compiled.p50}
    return Row(**row)


def _chosen_by_auto(device: torch.device) -> str:
    module = backend_module("auto", None, torch.empty(0, device=device))
    return "torch" if module.__name__.endswith("reference") else "triton"
