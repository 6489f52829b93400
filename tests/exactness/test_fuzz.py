"""Fuzzing: whatever is drawn, the pruned model says what the masked full model says, or refuses with a reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, event, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import vprune
from tests.exactness.agreement import DEVIATIONS
from tests.exactness.families import LINED, QWEN, Layout
from tests.exactness.made_batches import layouts, made_batch, pictures_in, videos_of
from tests.exactness.more_families import TEN, made
from tests.exactness.test_families import line_breaks, masked, stepped
from tests.exactness.test_family_scenarios import NEVER, Told
from tests.exactness.test_stages import masked_by_stages

EXACT = 1e-12
SAMPLE = 40
RECYCLED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "none": {},
    "grid": {"cells": st.sampled_from([1, 4, 16])},
    "weighted": {"cells": st.sampled_from([1, 4, 16])},
    "nearest": {"distance": st.sampled_from([0.0, 0.5, 2.0])},
    "anchors": {"share": st.sampled_from([0.15, 0.5]), "distance": st.sampled_from([0.0, 2.0])},
}
QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@dataclass(frozen=True)
class Case:
    """A batch, a method and a way of decoding."""

    family: str
    layout: Layout
    video: bool = False
    attention: str = "sdpa"
    method: str = "attention"
    keep: float | int = 0.3
    options: dict[str, Any] = field(default_factory=dict)
    fed: tuple[int, ...] = ()  # lengths of what is fed to the cache, one call each; () = `generate` chooses
    steps: int = 3


@dataclass(frozen=True)
class Outcome:
    """What became of a case: pruned, whole (nothing was dropped) or refused; how far the logits were from the oracle's,
    and from the unpruned model's."""

    kind: str
    reason: str = ""
    deviation: float = 0.0
    control: float = 0.0


# What a refusal may say, and of which cases; any other one is a failure.
REASONS: dict[str, tuple[str, Callable[[Case], bool]]] = {
    "count": (r"keep=\d+ but the image has \d+ visual tokens", lambda case: isinstance(case.keep, int)),
    "growing": (
        r"would leave \d+ tokens of an image of which an earlier stage left \d+",
        lambda case: len(case.options.get("stages", ())) > 1,
    ),
    "deepstack": (r"layer 1 lies among the first 2 layers", lambda case: case.family == "qwen3_vl"),
    "room": (
        r"keep=1 leaves no room for the recycled tokens",
        lambda case: case.keep == 1 and case.options["recycle"] in ("grid", "weighted", "anchors"),
    ),
}


@contextmanager
def exact_softmax() -> Iterator[None]:
    """Eager attention takes its softmax in float32, whatever the model: here in float64 as the rest."""
    own = torch.nn.functional.softmax

    def softmax(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if given.dtype == torch.float64 and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return own(given, *args, **kwargs)

    with patch.object(torch.nn.functional, "softmax", softmax):
        yield


def said(case: Case, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The prompt with its answer, and the logits that predict each word of the answer."""
    if not case.fed:
        seen: list[Tensor] = []  # `generate` gives its logits in float32
        hook = model.register_forward_hook(lambda _, args, out: seen.append(out.logits[:, -1]))
        try:
            answer = model.generate(**inputs, max_new_tokens=case.steps, do_sample=False, **NEVER)
        finally:
            hook.remove()
        return answer, seen
    told = Told(case.family, model, inputs)
    logits, rows = [told.last], inputs["input_ids"].shape[0]
    for number, length in enumerate(case.fed):
        words = 20 + (torch.arange(rows * length).view(rows, length) + 7 * number) % 60
        logits += told.feed(words).unbind(1)
    return torch.cat([told.ids, torch.full((rows, 1), 30)], 1), logits


def expected(case: Case, inputs: dict[str, Tensor], reports: list[Any], sequences: Tensor) -> list[Tensor]:
    """The logits of the masked full model (sdpa: the same weights) for the same answer."""
    model, aware = made(case.family), bool(case.options.get("size_aware"))
    weighted = case.options.get("recycle") == "weighted" and any(one.importance is not None for one in reports)
    if case.options.get("stages") or weighted:
        seeing = masked_by_stages(model, inputs, reports, aware, weighted)
    else:
        breaks = line_breaks(model, inputs)
        seeing = masked(model, inputs["input_ids"], inputs["attention_mask"], reports, aware, breaks)
    with seeing:
        return stepped(model, inputs, sequences)


def apart(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of any logit."""
    assert len(mine) == len(theirs)
    return max(float((one - other).abs().max()) for one, other in zip(mine, theirs, strict=True))


def judged(case: Case) -> Outcome:
    """Run a case and its oracle.

    Raises:
        AssertionError: they disagree, or a refusal gives no known reason.
    """
    inputs, model = made_batch(case.family, case.layout, video=case.video), made(case.family, attention=case.attention)
    try:
        with exact_softmax(), vprune.prune(model, case.method, keep=case.keep, **case.options) as pruning:
            sequences, logits = said(case, model, inputs)
    except vprune.VPruneError as error:
        reasons = [name for name, (words, may) in REASONS.items() if re.search(words, str(error)) and may(case)]
        assert reasons, f"refused without a known reason: {error}"
        return Outcome("refused", reasons[0])
    reports = list(pruning.last or [])
    assert bool(reports) == bool(pictures_in(case.layout))
    deviation = apart(logits, expected(case, inputs, reports, sequences))
    DEVIATIONS["fp64"] = max(DEVIATIONS.get("fp64", 0.0), deviation)
    assert deviation <= EXACT, f"{deviation} from the masked model"
    if all(report.tokens_after == report.tokens_before for report in reports):
        return Outcome("whole", deviation=deviation)
    return Outcome("pruned", deviation=deviation, control=apart(logits, stepped(made(case.family), inputs, sequences)))


@st.composite
def budgets(draw: Any, family: str, video: bool) -> tuple[float | int, dict[str, Any]]:
    """What stays, of what, and at which layers."""
    fraction = st.floats(0.02, 1.0).map(lambda share: round(share, 3))
    keep: float | int = draw(st.one_of(fraction, fraction, fraction, st.integers(1, 4)))
    options: dict[str, Any] = {"budget": draw(st.sampled_from(["image", "sample", *(["frame"] * video)]))}
    if draw(st.booleans()):
        options["minimum"] = draw(st.integers(1, 4))
    stages = draw(st.integers(0, 2))
    layers = (0, 2) if family == "qwen3_vl" and draw(st.integers(0, 4)) else (0, 1, 2)  # DeepStack refuses layer 1
    at = sorted(draw(st.lists(st.sampled_from(layers), min_size=stages, max_size=stages, unique=True)))
    if stages == 1:
        options["stages"] = at
    elif stages:
        shares = sorted(draw(st.tuples(fraction, fraction)), reverse=True)
        options["stages"] = [list(pair) for pair in zip(at, shares, strict=True)]
    return keep, options


@st.composite
def cases(draw: Any) -> Case:
    """Any family, batch, method, budget and way of decoding that belong together."""
    family = draw(st.sampled_from(TEN))
    video = draw(videos_of(family))
    keep, options = draw(budgets(family, video))
    methods = ["random", "uniform", "attention", "attention_max", "pool"]
    methods += ["vision"] * (family not in (*QWEN, *LINED))
    method = draw(st.sampled_from(methods))
    if method != "pool":
        recycle = draw(st.sampled_from(["none", *RECYCLED]))
        options |= {"recycle": recycle, **{name: draw(values) for name, values in RECYCLED[recycle].items()}}
    options["size_aware"] = draw(st.booleans())
    if method == "random":
        options["seed"] = draw(st.integers(0, 3))
    return Case(
        family=family,
        layout=draw(layouts(family, video)),
        video=video,
        attention=draw(st.sampled_from(["sdpa", "eager"])),
        method=method,
        keep=keep,
        options=options,
        fed=draw(st.sampled_from([(), (), (1,), (1, 1), (3,), (2, 1)])),
        steps=draw(st.sampled_from([1, 3])),
    )


TALLY: Counter[str] = Counter()  # of the sample's outcomes


def checked(case: Case) -> Outcome:
    """Judge a case and tell Hypothesis what became of it."""
    note(repr(case))
    outcome = judged(case)
    event(f"{outcome.kind} {outcome.reason}".strip())
    return outcome


@settings(max_examples=SAMPLE, derandomize=True, **QUIET)
@given(cases())
def test_fuzz_sample(case: Case) -> None:
    TALLY[checked(case).kind] += 1


def test_most_of_the_sample_is_pruned() -> None:
    if TALLY.total() < SAMPLE:
        test_fuzz_sample()
    assert TALLY.total() >= SAMPLE and TALLY["pruned"] >= TALLY.total() / 2, TALLY


@pytest.mark.slow
def test_fuzz_all() -> None:
    """2,000 cases, from many starts: what Hypothesis draws one after another resembles itself."""
    tally: Counter[str] = Counter()
    seen: set[str] = set()
    worst = [0.0]

    def run(case: Case) -> None:
        outcome = checked(case)
        tally[f"{outcome.kind} {outcome.reason}".strip()] += 1
        seen.add(repr(case))
        worst[0] = max(worst[0], outcome.deviation)

    for start in range(50):
        seed(start)(settings(max_examples=40, database=None, **QUIET)(given(cases())(run)))()
    print(f"{tally.total()} cases, {len(seen)} unlike: {dict(tally)}; largest deviation {worst[0]:.1e}")
    assert tally.total() >= 2000 and tally["pruned"] >= tally.total() / 2 and len(seen) >= 0.9 * tally.total()
    assert {f"refused {reason}" for reason in REASONS} <= set(tally)


@pytest.mark.parametrize("options", [{}, {"stages": [[0, 0.6], [2, 0.3]]}], ids=["input", "stages"])
@pytest.mark.parametrize("family", TEN)
def test_a_dropped_token_left_visible_is_noticed(family: str, options: dict[str, Any]) -> None:
    """The control: the oracle sees one token more than was kept."""
    layout = Layout((((32, 32),), ((24, 40), (16, 48))), after=(2, 5))
    case = Case(family, layout, options=options)
    inputs, model = made_batch(family, layout), made(family)
    with vprune.prune(model, case.method, keep=case.keep, **options) as pruning:
        sequences, logits = said(case, model, inputs)
    reports = list(pruning.last or [])
    assert apart(logits, expected(case, inputs, reports, sequences)) <= EXACT
    first = reports[0]
    dropped = next(token for token in range(first.tokens_before) if token not in first.kept.tolist())
    kept = torch.cat([first.kept, torch.tensor([dropped])])
    last = replace(first.stages[-1], kept=kept, sizes=torch.cat([first.stages[-1].sizes, torch.tensor([1])]))
    reports[0] = replace(first, kept=kept, stages=(*first.stages[:-1], last))
    assert apart(logits, expected(case, inputs, reports, sequences)) > 1e-6
