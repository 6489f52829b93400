"""Every kernel in Triton's interpreter, on the CPU: in a process of its own, where it is chosen before Triton loads."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize("cases", ["triton_cases.py", "pruned_cases.py"])
def test_every_kernel_in_the_interpreter(cases: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--show-capture=no"]
    surroundings = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    surroundings = {name: value for name, value in surroundings.items() if not name.startswith("PYTEST_")}
    file = f"tests/kernels/{cases}"
    done = subprocess.run([*command, file], cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
