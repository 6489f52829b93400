"""One model three times over the same weights: pruned, unpruned, and given a sequence that simply is that short."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vprune.bench.architectures import Prompt, as_short, bytes_of_row
from vprune.bench.timing import Clock
from vprune.models.anatomy import dissect


@dataclass(frozen=True)
class Prefilled:
    """One prefill in milliseconds and bytes.

    `prefill`: from the decoder's entry, the device idle and the features of the vision tower merged, to the first
    token, and whatever hooks did before the tower ran; `plan`: the part of it before the first layer; `stored`: rows of
    a sample in the cache, the mean over layers, and at `most`; `cache`: bytes of all of them; `peak`: bytes taken at
    most, and `extra`: those above what was taken before.
    """

    prefill: float
    plan: float
    stored: float
    most: int
    cache: int
    peak: int
    extra: int
    finite: bool


@dataclass(frozen=True)
class Answered:
    """One call of `generate` with the vision tower in it, in milliseconds after its start, by number of new tokens."""

    at: Mapping[int, float]

    @property
    def step(self) -> float:
        """Milliseconds a decoding step after the first token."""
        last = max(self.at)
        return (self.at[last] - self.at[1]) / (last - 1)


def sharing(model: Any) -> Any:
    """A copy of a model whose weights are those of the model itself."""
    shared: Any = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(part): part for part in shared})


class Side:
    """A copy of a model over the same weights, which nothing else puts hooks on; None as `length`: the whole prompt."""

    def __init__(self, name: str, model: Any, clock: Clock) -> None:
        self.name, self.clock = name, clock
        self.model: Any = sharing(model)
        self.length: int | None = None

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """What the model is called with; for a sequence that simply is short, the vision tower runs now."""
        return dict(prompt.inputs) if self.length is None else as_short(self.model, prompt, self.length)

    @torch.no_grad()
    def prefill(self, prompt: Prompt) -> Prefilled:
        """Read the prompt once, up to the first token."""
        clock = self.clock
        before = clock.start_peak()
        inputs = self.inputs(prompt)
        with self._marked() as marks:
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            out.logits[:, -1:].argmax(-1)
            marks["end"] = clock.mark()
            clock.wait()
        hooked = clock.between(marks["base"], marks["based"])
        layers = out.past_key_values.layers
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        peak = clock.peak()
        return Prefilled(
            prefill=hooked + clock.between(marks["decoder"], marks["end"]),
            plan=hooked + clock.between(marks["decoder"], marks["layer"]),
            stored=held / prompt.shape[0] / bytes_of_row(self.model.config, layers[0].keys.dtype),
            most=max(layer.keys.shape[2] for layer in layers),
            cache=held,
            peak=peak,
            extra=peak - before,
            finite=bool(out.logits.isfinite().all()),
        )

    @contextmanager
    def _marked(self) -> Iterator[dict[str, Any]]:
        """Points of time around all other hooks: before and after those of the model and of its decoder."""
        anatomy, marks = dissect(self.model), {}

        def marking(name: str, wait: bool = False) -> Callable[..., None]:
            def note(*_: Any) -> None:
                if wait:  # whatever was queued is over: nothing of what follows hides behind it
                    self.clock.wait()
                marks[name] = self.clock.mark()

            return note

        handles: Sequence[RemovableHandle] = (
            anatomy.base.register_forward_pre_hook(marking("base", wait=True), prepend=True),
            anatomy.base.register_forward_pre_hook(marking("based")),
            anatomy.decoder.register_forward_pre_hook(marking("decoder", wait=True), prepend=True),
            anatomy.layers[0].register_forward_pre_hook(marking("layer")),
        )
        try:
            yield marks
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def answer(self, prompt: Prompt, counts: Sequence[int], options: Mapping[str, Any]) -> Answered:
        """Generate as many tokens as the largest of `counts`, vision tower included, and note when each is there."""
        clock = self.clock
        marks: dict[int, Any] = {}
        seen = 0

        def note(*_: Any, **__: Any) -> Tensor:
            nonlocal seen
            seen += 1
            if seen in counts:
                marks[seen] = clock.mark()
            return torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.inputs["input_ids"].device)

        clock.wait()
        start = clock.mark()
        inputs = self.inputs(prompt)
        self.model.generate(**inputs, max_new_tokens=max(counts), do_sample=False, stopping_criteria=[note], **options)
        clock.wait()
        return Answered({count: clock.between(start, marks[count]) for count in counts})

    def forget(self) -> None:
        """Let go of caches and compiled steps that `generate` keeps for its next call."""
        for name in ("_cache", "_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
            if hasattr(self.model, name):
                delattr(self.model, name)


def interleaved(
    works: Mapping[str, Callable[[], Any]], repeats: int, enough: Callable[[int], bool]
) -> dict[str, list[Any]]:
    """The results of every piece of work; who comes first turns with every repeat; `enough` may end it earlier."""
    results: dict[str, list[Any]] = {name: [] for name in works}
    names = list(works)
    for repeat in range(repeats):
        if enough(repeat):
            break
        turn = repeat % len(names)
        for name in (*names[turn:], *names[:turn]):
            results[name].append(works[name]())
    return results
