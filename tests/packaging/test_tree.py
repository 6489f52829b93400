"""What the tree may hold: no pickles, no long files, no root package `kernels`, at most 55 MiB."""

from __future__ import annotations

import tomllib

from tests.packaging.checkout import LINKS, ROOT, tree_files

PACKAGE_FOLDERS = ("vprune", "kernels", "eval", "conf", "assets")
MAX_LINES = 400
MAX_MIB = 55
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}


def test_the_links_are_relative_links() -> None:
    assert {name: str((ROOT / "vprune" / name).readlink()) for name in LINKS} == LINKS


def test_the_root_folder_kernels_is_no_package() -> None:
    """transformers probes `find_spec("kernels")` and would execute ours for the PyPI package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_stay_short() -> None:
    code = [path for path in tree_files() if path.suffix == ".py" and path.parts[0] in PACKAGE_FOLDERS]
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in code}
    assert {path: lines for path, lines in lengths.items() if lines >= MAX_LINES} == {}


def test_nothing_is_called_utils() -> None:
    assert [str(path) for path in tree_files() if path.stem in {"utils", "helpers", "misc"}] == []


def test_no_pickled_weights() -> None:
    assert [str(path) for path in tree_files() if path.suffix in PICKLES] == []


def test_the_tree_is_small() -> None:
    size = sum((ROOT / path).stat().st_size for path in tree_files() if not (ROOT / path).is_symlink())
    assert size <= MAX_MIB * 2**20, f"the tree has {size / 2**20:.1f} MiB, the limit is {MAX_MIB}"


def test_no_installed_package_needs_a_pinned_torch() -> None:
    """torchvision pins its torch: a pin of ours can only break the pair."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith(("torch=", "torch<", "torch>", "torch~", "torchvision"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [need for need in project["dependencies"] if need.startswith("torch")] == ["torch>=2.11", "torchvision"]
