"""From the scorer to the first layer nobody asks the device for a value, so that the host never waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vprune
from tests.conftest import build_model
from tests.exactness.families import batch, build
from tests.exactness.prompts import KINDS
from tests.exactness.prompts import batch as prompts
from tests.scoring.test_learned import saved
from vprune.attach import Pruning
from vprune.kernels import reference
from vprune.models import rotary
from vprune.passage import Passage
from vprune.scoring import learned

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "unique")
RECYCLED: dict[str, dict[str, Any]] = {
    "none": {"recycle": "none", "size_aware": False},
    "grid": {"recycle": "grid", "size_aware": True},
    "weighted": {"recycle": "weighted", "size_aware": True},
    "anchors": {"recycle": "anchors", "size_aware": True},
    "nearest": {"recycle": "nearest", "size_aware": True},
}


class Unasked(TorchDispatchMode):
    """No operation within the block may need a value before it can go on."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        assert name not in READS and not masks, f"{name} reads a value"
        return function(*args, **(kwargs or {}))


def no_reading(tensor: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("a tensor is read on the host")


@contextmanager
def unasked(patched: pytest.MonkeyPatch) -> Iterator[None]:
    """What a dispatch mode does not see is refused at the tensor."""
    with patched.context() as readers:
        for name in ("cpu", "tolist", "numpy"):
            readers.setattr(Tensor, name, no_reading)
        with Unasked():
            yield


def guarded(patched: pytest.MonkeyPatch, guard: Callable[[], Any]) -> None:
    """Have `guard` watch every stage, and what is made of it until the first layer is entered."""
    enter, begin = Passage.enter, Pruning._begin
    held: list[Any] = []

    def watched(self: Passage, layer: int, hidden: Tensor) -> Any:
        watch = guard()
        watch.__enter__()
        if not layer:
            held.append(watch)
            return enter(self, layer, hidden)
        try:
            return enter(self, layer, hidden)
        finally:
            watch.__exit__(None, None, None)

    def begun(self: Pruning, *args: Any) -> Any:
        try:
            return begin(self, *args)
        finally:
            if held:
                held.pop().__exit__(None, None, None)

    patched.setattr(Passage, "enter", watched)
    patched.setattr(Pruning, "_begin", begun)
    # What is not finite is looked for on the CPU only, where looking costs no waiting; so are positions met before, and
    # scores that meet at the border of a choice.
    patched.setattr(learned, "_refuse_nonsense", lambda prefill, maps: None)
    patched.setattr(rotary, "_frequencies", lambda rotary_emb, kind: None)
    patched.setattr(reference, "_clear_choice", lambda scores, width: None)


@pytest.mark.parametrize("options", RECYCLED.values(), ids=RECYCLED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["attention_max", "learned", "vision", "uniform"])
def test_a_pruned_prompt_asks_for_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_processor: Any, method: str, kind: str, options: Any
) -> None:
    model, inputs = build_model(), prompts(tiny_processor, kind)
    more = {"checkpoint": str(saved(tmp_path / "scorer", model))} if method == "learned" else {}
    guarded(monkeypatch, lambda: unasked(monkeypatch))
    with torch.no_grad(), vprune.prune(model, method, keep=0.25, **more, **options) as pruning:
        model(**inputs)
    assert pruning.last is not None and all(one.tokens_after == 9 for one in pruning.last)


@pytest.mark.parametrize("options", RECYCLED.values(), ids=RECYCLED)
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "internvl", "gemma3"])
def test_stages_of_every_family_ask_for_nothing(monkeypatch: pytest.MonkeyPatch, family: str, options: Any) -> None:
    model, inputs = build(family, torch.float32), batch(family, "mixed", torch.float32)
    guarded(monkeypatch, lambda: unasked(monkeypatch))
    stages = [[0, 0.6], [1, 0.4], [2, 0.25]]
    with torch.no_grad(), vprune.prune(model, "attention_max", stages=stages, **options) as pruning:
        model(**inputs)
    assert pruning.last is not None and all(len(one.stages) == 3 for one in pruning.last)


def test_images_that_compete_do_ask(monkeypatch: pytest.MonkeyPatch, tiny_vlm: Any, tiny_processor: Any) -> None:
    """The control: how many rows each of them keeps depends on the scores, and the host must know."""
    model, inputs = tiny_vlm(), prompts(tiny_processor, "several")
    guarded(monkeypatch, lambda: unasked(monkeypatch))
    competing = vprune.prune(model, "attention_max", keep=0.25, budget="sample")
    with torch.no_grad(), competing, pytest.raises(AssertionError, match="read"):
        model(**inputs)


def test_a_report_outlives_its_prefill_and_holds_no_row_of_it(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), prompts(tiny_processor, "several")
    with torch.no_grad(), vprune.prune(model, "attention_max", keep=0.25) as pruning:
        model(**inputs)
        first = pruning.last
        model(**{**inputs, "pixel_values": -inputs["pixel_values"]})
    assert first is not None and pruning.last is not None and len(first) == len(pruning.last) == 3
    images, decided, clock, *_ = first._read.args  # type: ignore[attr-defined]
    stages = [one() for one in decided]
    held = [one.numel() for stage in stages for one in stage.maps] + [len(stage.standing) for stage in stages]
    assert max(held) == 36 and len(images) == 3 and clock.seconds() == first.seconds > 0
    assert any(not torch.equal(a.kept, b.kept) for a, b in zip(first, pruning.last, strict=True))


@contextmanager
def device_never_waited_for() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", RECYCLED.values(), ids=RECYCLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["attention_max", "learned", "uniform"])
def test_the_host_never_waits_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_processor: Any,
    method: str,
    kind: str,
    dtype: torch.dtype,
    options: Any,
) -> None:
    model = build_model(dtype=dtype)
    more = {"checkpoint": str(saved(tmp_path / "scorer", model))} if method == "learned" else {}
    model = model.cuda()
    inputs = {name: one.cuda() for name, one in prompts(tiny_processor, kind, dtype).items()}
    with torch.no_grad(), vprune.prune(model, method, keep=0.25, **more, **options) as pruning:
        model(**inputs)  # kernels are compiled, and what depends on the grid alone is sent there once
        guarded(monkeypatch, device_never_waited_for)
        model(**inputs)
        assert pruning.last is not None and all(one.tokens_after == 9 for one in pruning.last)
        assert 0 < pruning.last.seconds < 10
