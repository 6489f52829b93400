"""Wheel, sdist and editable install all hold every `vprune.*`, with its data."""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from tests.packaging.checkout import LINKS, build, install, python, run, tree_files
from tests.packaging.conftest import Distributions

# One worker builds once; the others would build again.
pytestmark = pytest.mark.xdist_group("distributions")

DATA = {".yaml", ".json", ".jsonl", ".jinja", ".css", ".js", ".txt", ".safetensors", ".webp", ".png", ".ttf", ".typed"}
OUTSIDE = ("assets/figures/", "kernels/bench/")


def packaged_files() -> set[str]:
    """Names below vprune/ that an installation must hold, from what the tree holds."""
    folders = {"vprune": "vprune"} | {target.removeprefix("../"): f"vprune/{link}" for link, target in LINKS.items()}
    names = set()
    for path in tree_files():
        for folder, package in folders.items():
            inside = path.is_relative_to(folder) and not path.as_posix().startswith(OUTSIDE)
            if inside and path.suffix in DATA | {".py"}:
                names.add(f"{package}/{path.relative_to(folder).as_posix()}")
    return names


def test_every_file_is_in_the_wheel_and_the_sdist(distributions: Distributions) -> None:
    wanted = packaged_files()
    assert any(name.startswith("vprune/conf/") and name.endswith(".yaml") for name in wanted)
    assert sorted(wanted - distributions.wheel_names) == []
    assert sorted(wanted - distributions.sdist_names) == []


def test_the_wheel_holds_only_the_package(distributions: Distributions) -> None:
    tops = {name.partition("/")[0] for name in distributions.wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vprune"}
    assert not [name for name in distributions.wheel_names if "__pycache__" in name or "/figures/" in name]


def test_a_wheel_from_real_folders_is_the_same(distributions: Distributions, tmp_path: Path) -> None:
    """The sdist carries vprune/eval and the others as folders; so does a checkout without symbolic links."""
    with tarfile.open(distributions.sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (tree,) = (tmp_path / "source").iterdir()
    assert not [name for name in LINKS if (tree / "vprune" / name).is_symlink()]
    build(tree, tmp_path / "dist", "--wheel")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert Distributions(tree, wheel, distributions.sdist).wheel_names == distributions.wheel_names


def test_the_installed_wheel_imports(distributions: Distributions, tmp_path: Path) -> None:
    target = install(distributions.wheel, tmp_path / "site")
    code = f"""
import importlib, pathlib, vprune
for name in {sorted(LINKS)}:
    module = importlib.import_module("vprune." + name)
    print(pathlib.Path(next(iter(module.__path__))).resolve().relative_to({str(target.resolve())!r}))
"""
    assert python(code, tmp_path, PYTHONPATH=str(target)).split() == [f"vprune/{name}" for name in sorted(LINKS)]


def test_the_editable_install_reaches_the_root_folders(distributions: Distributions, tmp_path: Path) -> None:
    """Looked up without the environment's own site-packages, where vprune may be installed already."""
    tree = Path(shutil.copytree(distributions.tree, tmp_path / "checkout", symlinks=True)).resolve()
    target = install(tree, tmp_path / "site", "--editable")
    code = f"""
import site; site.addsitedir({str(target)!r})
import importlib.util, pathlib
for name in {sorted(LINKS)}:
    (place,) = importlib.util.find_spec("vprune." + name).submodule_search_locations
    print(pathlib.Path(place).resolve().relative_to({str(tree)!r}))
"""
    found = run([sys.executable, "-I", "-S", "-c", code], tmp_path)
    assert found.split() == ["assets", "conf", "eval", "kernels/ops"]


def test_the_console_script_is_declared(distributions: Distributions, tmp_path: Path) -> None:
    target = install(distributions.wheel, tmp_path / "site")
    (entry,) = target.glob("vprune-*.dist-info/entry_points.txt")
    assert "vprune = vprune.cli:main" in entry.read_text()
