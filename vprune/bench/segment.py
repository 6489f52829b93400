"""The command `vprune bench segment`: what every stage of a segmentation takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vprune.bench.app import DONE, SOME_FAILED
from vprune.bench.results import DEVICES, options_text, read_words, write
from vprune.errors import VPruneError

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Options:
    """What `vprune bench segment` is asked to do; None = by the model and by what the machine has."""

    model: str = EMBEDDED
    segmenter: str | None = None
    clip: str | None = None
    device: str | None = None
    size: str | None = None
    dtype: str = "bfloat16"
    crops: str = "false,true"
    maps: str = "mean"
    tokens: int | None = None
    new: int = 32
    words: int = 8
    side: int | None = None
    automatic: int | None = None
    images: int = 3
    repeats: int = 3
    out: str = "runs/bench-segment"
    commit: str | None = None


_MEANINGS = {
    "model": "embedded looks at scenes; the others have random weights",
    "segmenter": "beside random weights (vit_h), random as well",
    "clip": "labels the masks: a name of open_clip (ViT-L-14), weights random; the embedded one beside embedded models",
    "device": "cuda where there is one",
    "size": "of random weights; full on cuda",
    "dtype": "of a model with random weights; SAM is float32 as in `vprune segment`",
    "crops": "both with false,true",
    "maps": "a name in conf/maps/",
    "tokens": "random weights: visual tokens a view (7290; tiny: 64), to the nearest whole picture",
    "new": "random weights: tokens of an answer",
    "words": "random weights: words a view that maps are made of, and as many prompts",
    "side": "random weights: pixels of the picture's sides (1024; tiny: 64)",
    "automatic": "also time SAM's automatic mask generator with so many points a side, once a picture",
    "images": "of the scenes split, from the first on; of random weights one",
    "repeats": "how often each image is timed, after one that is not",
    "out": "the folder for bench.csv and bench.json",
    "commit": "what to record in place of what git says of the source",
}
_CHOICES = {**DEVICES, "segmenter": ("vit_b", "vit_l", "vit_h")}
_COUNTS = ("tokens", "new", "words", "side", "automatic", "images", "repeats")


@dataclass(frozen=True)
class Row:
    """A line of bench.csv: one stage, whole image or with crops.

    `stage` as in `vprune.segmentation.stages`; `labels`: CLIP's; `sam`: encode, prompt and merge; `total`: all of one
    image; `automatic`: SAM's generator on the whole image. `masks`: found, in the mean; `prompts`: given, of all views,
    where they are given. `peak_bytes`: see `vprune.segmentation.memory`, of the cell.
    """

    model: str
    segmenter: str
    crops: bool
    views: int
    prompts: int | None = None
    masks: float | None = None
    stage: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    repeats: int | None = None
    peak_bytes: int | None = None
    problem: str | None = None


def _choices() -> dict[str, Sequence[str]]:
    from vprune.bench.architectures import ARCHITECTURES
    from vprune.eval.options import entries

    return {**_CHOICES, "model": (EMBEDDED, *ARCHITECTURES), "maps": tuple(entries("maps"))}


def help_text() -> str:
    """Every option with its default and meaning."""
    return options_text(Options, _MEANINGS, _choices())


def read_options(words: Sequence[str]) -> Options:
    """Options from key=value.

    Raises:
        VPruneError: an unknown key, a value that is none of those allowed, or one of random weights for embedded ones.
    """
    values = read_words("segment", words, _MEANINGS, _choices(), _COUNTS)
    options = Options(**values)
    if any(one not in ("false", "true") for one in options.crops.split(",")):
        raise VPruneError(f"crops={options.crops}: choose false, true, or both")
    if options.words > options.new:
        raise VPruneError(f"words={options.words}: an answer of new={options.new} tokens has no so many words")
    if options.model == EMBEDDED:
        given = {"segmenter", "clip", "size", "dtype", "tokens", "new", "words", "side"} & set(values)
        if given:
            key = sorted(given)[0]
            raise VPruneError(
                f"{key}={values[key]} belongs to a model with random weights, and model={EMBEDDED} is none"
            )
    elif "images" in values:
        raise VPruneError(f"images={options.images} belongs to model={EMBEDDED}; of random weights there is one image")
    return options


def main(words: Sequence[str]) -> int:
    """Measure, print and write after every cell; 1 if one did not fit into memory."""
    import torch

    from vprune.eval.environment import describe
    from vprune.eval.models import pick_device

    options = read_options(words)
    device = pick_device(options.device or "auto")
    tiny = (options.size or ("full" if device.type == "cuda" else "tiny")) == "tiny"
    began = time.monotonic()
    subject = _subject(options, device, tiny)
    environment = describe(device, subject.dtype, None)
    environment["git_commit"] = options.commit or environment["git_commit"]
    told = {**asdict(options), "device": str(device)} | ({} if options.model == EMBEDDED else {"size": _size(tiny)})
    environment |= {"options": told, **subject.told, "build_seconds": time.monotonic() - began}
    folder, rows = Path(options.out), list[Row]()
    for crops in [one == "true" for one in options.crops.split(",")]:
        try:
            rows += _measured(subject, options, crops)
        except torch.OutOfMemoryError:
            rows.append(Row(subject.model, subject.segmenter, crops, 5 if crops else 1, problem="out of memory"))
        print("\n".join(lines_of(rows, crops)), flush=True)
        write(folder, Row, rows, environment)
    print(f"wrote {folder / 'bench.csv'} and {folder / 'bench.json'}")
    return SOME_FAILED if any(row.problem for row in rows) else DONE


def _size(tiny: bool) -> str:
    return "tiny" if tiny else "full"


@dataclass
class Subject:
    """What is timed: `session(crops)` segments `pictures`, `labels` names categories; both have names in the table."""

    model: str
    segmenter: str
    dtype: str
    session: Callable[[bool], Any]
    pictures: Sequence[Any]
    labels: Callable[[Sequence[str]], Any] | None
    prompts: int | None
    told: dict[str, Any]


def _subject(options: Options, device: Any, tiny: bool) -> Subject:
    if options.model != EMBEDDED:
        from vprune.bench.unknowing import random_subject

        return random_subject(options, device, tiny)
    from vprune.eval.models import ModelChoice, load
    from vprune.segmentation.evaluation import OPEN, ScenesSegment, made_recipe
    from vprune.segmentation.labels import Labeller
    from vprune.segmentation.segment import Session
    from vprune.segmentation.segmenters import load_segmenter

    loaded = load(ModelChoice(EMBEDDED, device=str(device)))
    benchmark, segmenter = ScenesSegment(), load_segmenter(EMBEDDED, device=device)
    samples = [one for one in benchmark.samples if one.kind == OPEN][: options.images]
    labeller = Labeller(benchmark.categories, EMBEDDED, device)

    def session(crops: bool) -> Any:
        recipe = made_recipe({"maps": options.maps, "crops": crops})
        return Session((loaded.model, loaded.processor), segmenter, recipe, device=str(device))

    pictures = [benchmark.load_image(one) for one in samples]
    told = {"categories": len(benchmark.categories), "picture": pictures[0].size}
    return Subject(EMBEDDED, EMBEDDED, "float32", session, pictures, labeller, None, told)


def _measured(subject: Subject, options: Options, crops: bool) -> list[Row]:
    from statistics import mean

    from vprune.bench.timing import Timing
    from vprune.segmentation.stages import SAM_STAGES, STAGES, Stages

    session = subject.session(crops)
    device = session.model.device
    stages = (*STAGES, "labels", "sam", "total")
    seconds: dict[str, list[float]] = {stage: [] for stage in stages}
    found: list[int] = []
    peaks: list[int] = []

    def once(picture: Any, counts: bool) -> None:
        masks = session(picture)
        taken, labelling = dict(masks.spent.stages), Stages(device)
        if subject.labels is not None:
            with labelling.timed("labels"):
                subject.labels(masks.names)
            taken |= labelling.seconds
        taken["total"] = masks.spent.seconds + taken.get("labels", 0.0)
        taken["sam"] = sum(taken.get(stage, 0.0) for stage in SAM_STAGES)
        if not counts:
            return
        found.append(len(masks))
        if masks.spent.peak_bytes is not None:
            peaks.append(masks.spent.peak_bytes)
        for stage, spent in taken.items():
            seconds[stage].append(spent)

    once(subject.pictures[0], False)
    for picture in [picture for picture in subject.pictures for _ in range(options.repeats)]:
        once(picture, True)
    if options.automatic is not None and not crops:
        seconds["automatic"] = [_generated(session, picture, options.automatic) for picture in subject.pictures]
    views = 5 if crops else 1
    prompts = None if subject.prompts is None else views * subject.prompts
    rows = []
    for stage, values in seconds.items():
        if values:
            timing = Timing.of(values, "clock")
            head = (subject.model, subject.segmenter, crops, views, prompts, mean(found), stage)
            rows.append(Row(*head, timing.p20, timing.p50, timing.p80, len(values), max(peaks, default=None)))
    return rows


def _generated(session: Any, picture: Any, points: int) -> float:
    """Seconds of SAM's automatic mask generator."""
    import numpy as np

    from vprune.bench.automatic import Options as Automatic
    from vprune.bench.automatic import made_generator
    from vprune.segmentation.stages import Stages

    generator, stages = made_generator(session.segmenter.sam, Automatic(points=points)), Stages(session.model.device)
    with stages.timed("automatic"):
        generator.generate(np.asarray(picture.convert("RGB")))
    return stages.seconds["automatic"]


def lines_of(rows: Sequence[Row], crops: bool) -> list[str]:
    """The printed table of one cell."""
    own = [row for row in rows if row.crops == crops]
    if own[0].problem is not None:
        return [f"{own[0].model}, {own[0].segmenter}, {own[0].views} views: NOT TIMED: {own[0].problem}"]
    first = own[0]
    peak = "" if first.peak_bytes is None else f", peak {first.peak_bytes / 2**20:,.0f} MiB"
    prompts = "" if first.prompts is None else f", {first.prompts} prompts"
    shown = f"{first.views} view{'s' * (first.views > 1)}{prompts}, {first.masks:.1f} masks{peak}"
    lines = [f"{first.model} model, {first.segmenter} SAM, {shown}; seconds an image:"]
    lines += [f"    {row.stage:<10}{row.p50:>9.4f}  ({row.p20:.4f}-{row.p80:.4f})" for row in own]
    return lines
