"""`kernels/bench/gaps.py`: what it calls a gap, and whose it is."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "kernels" / "bench" / "gaps.py"


def script() -> Any:
    spec = spec_from_file_location("gaps", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)

    sys.modules["gaps"] = module
    spec.loader.exec_module(module)
    return module


def one(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_gaps_are_those_of_the_device_and_tell_how_late_the_host_was() -> None:
    events = [
        one("user_annotation", "point: planning", 90, 1),
        one("cuda_runtime", "cudaLaunchKernel", 95, 2, 1),
        one("kernel", "first", 100, 10, 1),
        one("kernel", "beside it", 105, 15, 2),  # on another stream: the device is busy until 120
        one("cuda_runtime", "cudaLaunchKernel", 101, 2, 2),
        one("user_annotation", "point: layers", 121, 1),
        one("cpu_op", "aten::nonzero", 125, 20),
        one("cuda_runtime", "cudaLaunchKernel", 150, 2, 3),
        one("kernel", "third", 160, 5, 3),
        one("cuda_runtime", "cudaLaunchKernel", 155, 2, 4),
        one("kernel", "fourth", 170, 5, 4),
    ]
    gaps, whole = script().gaps_of(events)
    assert whole == 75
    assert [(gap.at, gap.us, gap.part, gap.late, gap.kernel) for gap in gaps] == [
        (20, 40, "layers", 30, "third"),
        (65, 5, "layers", 0, "fourth"),
    ]
    assert gaps[0].host == ("aten::nonzero", "cudaLaunchKernel") and gaps[1].host == ()
    text = script().summary("pruned", gaps, whole, 20)
    assert "0.07 ms, of it idle 0.04 ms" in text
    assert "(host late 30.0) layers: 2 calls (aten::nonzero, cudaLaunchKernel)" in text
