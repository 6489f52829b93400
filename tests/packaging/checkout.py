"""The tree as a commit would have it, and what pip and build make of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKS = {"kernels": "../kernels/ops", "eval": "../eval", "conf": "../conf", "assets": "../assets"}


def tree_files() -> list[Path]:
    """Files a commit of the working tree would hold, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: what belongs to the tree cannot be told from what was built in it")
    names = {Path(name) for name in listing.stdout.decode().split("\0") if name}
    return sorted(name for name in names if os.path.lexists(ROOT / name))


def copy_tree(target: Path) -> Path:
    """Copy the tree into `target`, relative links as links."""
    for name in tree_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def build(tree: Path, out: Path, *kinds: str) -> None:
    """Build without isolation: the backend is in the development environment, the network is not."""
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *kinds, str(tree)], cwd=tree)


def install(source: Path, target: Path, *options: str) -> Path:
    """Install one wheel or checkout into `target`, without dependencies and without the network."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    run([*command, "--target", str(target), *options, str(source)], cwd=target.parent)
    return target


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Run a command that has to succeed; its output, or a failure that shows it."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def python(code: str, cwd: Path, **environment: str) -> str:
    """`python -c code` in a folder: what it printed."""
    return run([sys.executable, "-c", code], cwd, **environment).strip()
