"""What a run ran on: versions, hardware, source and command, for `environment.json`."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "vprune",
    "torch",
    "transformers",
    "tokenizers",
    "triton",
    "numpy",
    "pillow",
    "hydra-core",
    "pycocotools",
    "segment-anything",
    "open_clip_torch",
    "ray",
)


def describe(device: torch.device, dtype: str, model_revision: str | None) -> dict[str, Any]:
    """Everything needed to tell two runs' surroundings apart, as plain JSON values."""
    return {
        "command": command(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(device),
        "device": str(device),
        "dtype": dtype,
        "model_revision": model_revision,
        "git_commit": _git_commit(),
    }


def command() -> str:
    """The command line of this process."""
    return shlex.join([_program(), *sys.argv[1:]])


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "vprune" if name == "cli.py" else name  # python -m vprune.cli


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _hardware(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return facts


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the source this package runs from, with "+" when files differ from it; None outside a checkout."""
    source = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name) == "":
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
