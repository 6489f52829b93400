"""Pictures of single samples: what a method saw, what it kept, and both answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from vprune.errors import VPruneError
from vprune.eval.benchmarks.sample import Benchmark, Sample
from vprune.eval.reporting.cases import RIGHT, Case, choose
from vprune.eval.reporting.sections import Entry, Section
from vprune.eval.results import Run

REASONS = {
    "disagree": "Lost here, kept by another method",
    "lost": "Lost by every method at this budget",
    "gained": "Right only after pruning",
    "held": "Held where another method fails",
}
MAX_SIDE = 480


@dataclass(frozen=True)
class Answer:
    """One model's answer, whether it counts as right, and in words how right it is."""

    who: str
    text: str
    right: bool
    verdict: str


@dataclass(frozen=True)
class Card:
    """One sample of the gallery; pictures are data URIs, `described` says the drawn one in words."""

    reason: str
    kind: str
    question: str
    expected: str
    method: str
    budget: str
    picture: str
    drawn: str
    drawn_shape: tuple[int, int]
    described: str
    has_map: bool
    tokens: str
    full: Answer
    pruned: Answer
    others: tuple[Answer, ...]
    changed: str


@dataclass(frozen=True)
class Gallery:
    """The cards, or the reason why there are none."""

    cards: tuple[Card, ...] = ()
    left_out: str = ""


def gallery(section: Section, count: int) -> Gallery:
    """Recompute maps and selections for up to `count` telling samples of a section.

    Predictions hold no maps, so the section's model answers the chosen samples once more, pruned. What cannot be shown
    is left out with its reason, never silently.
    """
    if count < 1:
        return Gallery(left_out="It was switched off (gallery=0).")
    if section.blank:
        return Gallery(left_out="Every image of these runs was blank.")
    if section.full is None:
        return Gallery(left_out="There is no run of the full model on these samples to compare with.")
    cases = choose(section, count, _has_map)
    if not cases:
        return Gallery(left_out="No sample tells these runs apart: each is right in all of them, or wrong in all.")
    try:
        return Gallery(tuple(_cards(section, cases)))
    except VPruneError as error:
        return Gallery(left_out=f"The pictures could not be computed again: {error}")


def _has_map(entry: Entry) -> bool:
    from vprune.pruner import load_method

    try:
        return load_method(_job(entry.run).method_source).scorer is not None
    except VPruneError:
        return False


def _cards(section: Section, cases: Sequence[Case]) -> list[Card]:
    from vprune.eval.run import load_model

    benchmark = _benchmark(cases[0].entry.run)
    samples = {sample.id: sample for sample in benchmark.samples}
    for case in cases:
        sample, row = samples.get(case.sample_id), case.entry.answers[case.sample_id]
        if sample is None or sample.question != row["question"]:
            raise VPruneError(f"benchmark={benchmark.name} no longer holds sample {case.sample_id!r} as it was asked")
    # Whatever the runs were made on, the pictures are drawn on what this machine has.
    loaded = load_model(replace(_job(cases[0].entry.run).model_choice, device="auto"))
    return [_card(section, case, samples[case.sample_id], benchmark, loaded) for case in cases]


def _card(section: Section, case: Case, sample: Sample, benchmark: Benchmark, loaded: Any) -> Card:
    entry, full = case.entry, section.full
    assert full is not None
    recorded = entry.answers[case.sample_id]
    image = benchmark.load_image(sample)
    answer, report = _answer_again(entry, sample, benchmark, loaded)
    drawn = report.draw(image)
    before, after = sum(one.tokens_before for one in report), sum(one.tokens_after for one in report)
    changed = "" if answer == recorded["prediction"] else answer
    return Card(
        reason=REASONS[case.reason],
        kind=sample.kind,
        question=sample.question,
        expected=sample.answer,
        method=entry.label,
        budget=entry.budget,
        picture=data_uri(image),
        drawn=data_uri(drawn, max_side=2 * MAX_SIDE),
        drawn_shape=(drawn.width, drawn.height),
        described=report.describe().removeprefix("sample 0, image 0: "),
        has_map=any(one.importance is not None for one in report),
        tokens=f"{after} of {before} tokens",
        full=_answer(full, case.sample_id, "full model"),
        pruned=_answer(entry, case.sample_id, f"{entry.label}, {entry.budget}"),
        others=tuple(_answer(other, case.sample_id, other.label) for other in case.others),
        changed=changed,
    )


def _answer_again(entry: Entry, sample: Sample, benchmark: Benchmark, loaded: Any) -> tuple[str, Any]:
    """The answer and the report of the sample alone, pruned as the run was."""
    from vprune.attach import prune
    from vprune.eval.predictor import Predictor
    from vprune.pruner import load_method

    method = load_method(_job(entry.run).method_source, **_job(entry.run).method_options)
    with prune(loaded.model, method=method) as pruning:
        predictor = Predictor(
            loaded,
            benchmark,
            entry.run.config["max_new_tokens"],
            pruning=pruning,
            wants_evidence=method.needs_evidence,
        )
        (answer,) = predictor.answer(predictor.prepare([sample]))
        report = pruning.last
    if report is None:
        raise VPruneError(f"method={entry.method} pruned nothing of sample {sample.id!r}")
    return answer.text, report


def _answer(entry: Entry, sample_id: str, who: str) -> Answer:
    row = entry.answers[sample_id]
    score = float(row["correct"])
    # Lists are scored between 0 and 1.
    verdict = f"{100 * score:.0f}% right" if 0 < score < 1 else "right" if score else "wrong"
    return Answer(who, str(row["prediction"]), score >= RIGHT, verdict)


def _job(run: Run) -> Any:
    from vprune.eval.settings import Job

    config = {key: value for key, value in run.config.items() if key != "fingerprint"}
    return Job(config, run.folder, run.folder.parent, overwrite=False)


def _benchmark(run: Run) -> Benchmark:
    from vprune.eval.run import load_benchmark

    places = (run.folder, *list(run.folder.parents)[:2])
    drawn = (place for place in places if any(place.glob("scenes-*/samples.jsonl")))
    return load_benchmark(json.dumps(run.config["benchmark"]), str(next(drawn, run.folder.parent)))


def data_uri(image: Image.Image, max_side: int = MAX_SIDE) -> str:
    """A picture as a WebP data URI, scaled down to `max_side` pixels if it is larger."""
    small = image.convert("RGB")
    small.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
