"""Importing vprune is quick, quiet and changes nothing; a root folder called `kernels` disturbs nobody."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.packaging.checkout import ROOT, python, run

SECONDS = 0.3

QUIET_IMPORT = """
import json, logging, os, random, signal, sys, threading, time, warnings
watched = {
    "environment": lambda: dict(os.environ),
    "path": lambda: list(sys.path),
    "hooks": lambda: [sys.excepthook.__name__, sys.displayhook.__name__, len(sys.meta_path)],
    "filters": lambda: [str(entry) for entry in warnings.filters],
    "handlers": lambda: [str(handler) for handler in logging.getLogger().handlers] + [logging.getLogger().level],
    "random": lambda: hash(random.getstate()),
    "threads": lambda: threading.active_count(),
    "interrupt": lambda: str(signal.getsignal(signal.SIGINT)),
}
before = {name: watch() for name, watch in watched.items()}
start = time.perf_counter()
import vprune
seconds = time.perf_counter() - start
after = {name: watch() for name, watch in watched.items()}
heavy = [name for name in ("torch", "transformers", "torchvision", "numpy", "PIL", "hydra") if name in sys.modules]
changed = [name for name in watched if before[name] != after[name]]
print(json.dumps({"seconds": seconds, "heavy": heavy, "changed": changed}))
"""

AFTER_THE_HEAVY_ONES = """
import json, time
import torch, transformers
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
def state():
    return [torch.get_default_dtype().__str__(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
            sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()), torch.backends.cuda.flash_sdp_enabled(),
            torch.nn.Module.__call__.__qualname__, transformers.GenerationMixin.generate.__qualname__,
            len(torch.nn.modules.module._global_forward_hooks), len(torch.nn.modules.module._global_forward_pre_hooks)]
before = state()
start = time.perf_counter()
import vprune
seconds = time.perf_counter() - start
for name in vprune.__all__:
    getattr(vprune, name)
print(json.dumps({"seconds": seconds, "same": before == state()}))
"""


def test_import_is_quick_and_changes_nothing() -> None:
    found = [json.loads(python(QUIET_IMPORT, ROOT)) for _ in range(3)]
    assert found[0]["heavy"] == []
    assert found[0]["changed"] == []
    assert min(one["seconds"] for one in found) < SECONDS


def test_loading_every_public_name_leaves_torch_and_transformers_as_they_were() -> None:
    found = json.loads(python(AFTER_THE_HEAVY_ONES, ROOT))
    assert found["same"]
    assert found["seconds"] < SECONDS


def fake_kernels(folder: Path) -> Path:
    """A stand-in for the PyPI package `kernels`, enough for a probe to find it and import it."""
    package = folder / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "__version__ = '0.18.2'\n"
        "class _Anything:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, *args, **kwargs): return self\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return _Anything\n"
    )
    metadata = folder / "kernels-0.18.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return folder


@pytest.fixture(params=["without", "with"])
def kernels_path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """PYTHONPATH on which the PyPI package `kernels` is absent or present (the real one where it is installed)."""
    spec = importlib.util.find_spec("kernels")
    installed = spec is not None and spec.origin is not None
    if request.param == "without":
        if installed:
            pytest.skip("the package kernels is installed in this environment: only the other case can be tested")
        return ""
    return "" if installed else str(fake_kernels(tmp_path))


def test_transformers_from_the_root_never_takes_our_folder(kernels_path: str) -> None:
    code = """
import importlib.util, json
import transformers
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import is_kernels_available
spec = importlib.util.find_spec("kernels")
print(json.dumps({"available": is_kernels_available(), "origin": spec and spec.origin}))
"""
    found = json.loads(python(code, ROOT, PYTHONPATH=kernels_path).splitlines()[-1])
    if kernels_path:
        assert found["origin"] == str(Path(kernels_path) / "kernels" / "__init__.py")
    assert found["origin"] or not found["available"]
    assert not (found["origin"] or "").startswith(str(ROOT / "kernels"))


def test_pytest_from_the_root_is_clean(kernels_path: str, tmp_path: Path) -> None:
    test = tmp_path / "test_models_import.py"
    test.write_text(
        "def test_it():\n    from transformers import LlavaForConditionalGeneration\n    import vprune.kernels\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(test)]
    run(command, ROOT, PYTHONPATH=kernels_path)
