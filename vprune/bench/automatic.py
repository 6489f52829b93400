"""The command `vprune bench automatic`: prompted segmentation against SAM's own automatic mask generator."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from vprune.bench.app import DONE
from vprune.bench.results import options_text, read_words, write
from vprune.errors import VPruneError

SIDES = ("prompted", "automatic")
_BETWEEN_TABLES = 10.0  # seconds; a run that is broken off leaves the last of them


@dataclass(frozen=True)
class Options:
    """What `vprune bench automatic` is asked to do; None = by what the machine has."""

    limit: int = 20
    points: int = 32
    pred_iou: float = 0.88
    stability: float = 0.95
    recipe: str = "default"
    model: str = "embedded"
    segmenter: str = "embedded"
    segmenter_path: str | None = None
    device: str = "auto"
    out: str = "runs/bench-automatic"
    commit: str | None = None


_MEANINGS = {
    "limit": "images of the scenes split, from the first on",
    "points": "of the generator's grid, a side",
    "pred_iou": "the generator's masks of a lower predicted IoU are dropped (its own default)",
    "stability": "and those of a lower stability (its own default)",
    "recipe": "of the prompted side, a name in conf/recipe/",
    "model": "that says what it sees: embedded, a folder or a hub id",
    "segmenter": "the SAM of both sides",
    "segmenter_path": "its checkpoint",
    "device": "auto | cpu | cuda",
    "out": "the folder for bench.csv and bench.json",
    "commit": "what to record in place of what git says of the source",
}
_CHOICES = {"segmenter": ("embedded", "sam_vit_b", "sam_vit_l", "sam_vit_h")}


@dataclass(frozen=True)
class Row:
    """A line of bench.csv: one side over all images.

    `ar100`, `ap50`, `ap`: class-agnostic, as in benchmark=scenes_segment. `seconds`: the mean of an image, the VLM
    included on the prompted side; `sam_seconds`: of what SAM's part takes once there are maps (image encoder, prompts,
    masks to results). `times`, `sam_times`: how many times as fast as the generator, whose part is all SAM's.
    """

    side: str
    images: int
    masks: float
    ar100: float | None
    ap50: float | None
    ap: float | None
    seconds: float
    seconds_p50: float
    sam_seconds: float
    times: float
    sam_times: float


def help_text() -> str:
    """Every option with its default and meaning."""
    return options_text(Options, _MEANINGS, _CHOICES)


def read_options(words: Sequence[str]) -> Options:
    """Options from key=value.

    Raises:
        VPruneError: an unknown key, or a value that is none of those allowed.
    """
    values = read_words("automatic", words, _MEANINGS, _CHOICES, ("limit", "points"))
    for key in ("pred_iou", "stability"):
        if key in values:
            values[key] = _share(key, values[key])
    return Options(**values)


def _share(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise VPruneError(f"{key}={text}: give a number from 0 to 1")
    return value


def main(words: Sequence[str]) -> int:
    """Measure both sides image by image, print a table, write bench.csv and bench.json as it goes on."""
    from vprune.eval.environment import describe
    from vprune.eval.models import ModelChoice, load, pick_device
    from vprune.segmentation.evaluation import OPEN, ScenesSegment, session_of

    options = read_options(words)
    device = pick_device(options.device)
    benchmark = ScenesSegment(recipe=options.recipe, segmenter=options.segmenter)
    loaded = load(ModelChoice(options.model, device=options.device))
    session = session_of(loaded, None, options.segmenter, options.segmenter_path, options.recipe)
    generator = made_generator(session.segmenter.sam, options)
    samples = [one for one in benchmark.samples if one.kind == OPEN][: options.limit]
    contest = Contest(session, generator)
    if device.type == "cuda":  # first calls choose and load kernels
        contest.both(benchmark.load_image(samples[0]))
    environment = describe(device, str(loaded.model.dtype).removeprefix("torch."), options.model)
    environment["git_commit"] = options.commit or environment["git_commit"]
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    environment |= {"options": asdict(options) | {"device": str(device)}, "each": taken}
    folder, said = Path(options.out), time.monotonic()
    for number, sample in enumerate(samples, start=1):
        for side, (found, seconds) in contest.both(benchmark.load_image(sample)).items():
            rows[side].append({"id": sample.id, "prediction": json.dumps(found)})
            taken[side].append(seconds | {"masks": len(found)})
        last = number == len(samples)
        if last or time.monotonic() - said > _BETWEEN_TABLES:
            measured = [_row(side, benchmark.metrics(rows[side]), taken[side], taken["automatic"]) for side in SIDES]
            print("\n".join(table(measured)) if last else f"{number} of {len(samples)} images", flush=True)
            write(folder, Row, measured, environment)
            said = time.monotonic()
    print(f"wrote {folder / 'bench.csv'} and {folder / 'bench.json'}")
    return DONE


def made_generator(sam: Any, options: Options) -> Any:
    """segment-anything's SamAutomaticMaskGenerator; all but the options is its own default."""
    from segment_anything import SamAutomaticMaskGenerator

    return SamAutomaticMaskGenerator(
        sam,
        points_per_side=options.points,
        pred_iou_thresh=options.pred_iou,
        stability_score_thresh=options.stability,
        output_mode="coco_rle",
    )


class Contest:
    """Both sides with one SAM, one picture at a time."""

    def __init__(self, session: Any, generator: Any) -> None:
        self.session, self.generator = session, generator

    def both(self, picture: Any) -> dict[str, tuple[list[dict[str, Any]], dict[str, float]]]:
        """Masks, as results in COCO's form, and seconds of each side: all, and of SAM's part."""
        import numpy as np

        from vprune.segmentation.stages import SAM_STAGES, Stages

        masks = self.session(picture)
        prompted = [{key: one[key] for key in ("segmentation", "score")} for one in masks.to_coco()]
        own = sum(masks.spent.stages.get(stage, 0.0) for stage in SAM_STAGES)
        stages = Stages(self.session.model.device)
        with stages.timed("automatic"):
            made = self.generator.generate(np.asarray(picture.convert("RGB")))
        automatic = [{"segmentation": one["segmentation"], "score": one["predicted_iou"]} for one in made]
        seconds = stages.seconds["automatic"]
        return {
            "prompted": (prompted, {"seconds": masks.spent.seconds, "sam_seconds": own}),
            "automatic": (automatic, {"seconds": seconds, "sam_seconds": seconds}),
        }


def _row(
    side: str,
    metrics: dict[str, Any],
    taken: Sequence[dict[str, float]],
    automatic: Sequence[dict[str, float]],
) -> Row:
    seconds, own = mean(one["seconds"] for one in taken), mean(one["sam_seconds"] for one in taken)
    slow = mean(one["seconds"] for one in automatic)
    return Row(
        side=side,
        images=len(taken),
        masks=mean(one["masks"] for one in taken),
        ar100=metrics["open_ar100"],
        ap50=metrics["open_ap50"],
        ap=metrics["open_ap"],
        seconds=seconds,
        seconds_p50=median(one["seconds"] for one in taken),
        sam_seconds=own,
        times=slow / seconds,
        sam_times=slow / own,
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for people."""
    lines = [f"{'':<10}{'AR@100':>8}{'AP50':>8}{'masks':>8}{'s/image':>10}{'x':>8}{'SAM alone':>11}{'x':>8}"]
    for row in rows:
        ar, ap50 = ("-" if value is None else f"{value:.3f}" for value in (row.ar100, row.ap50))
        times = (f"{row.times:.1f}", f"{row.sam_times:.1f}") if row.side != "automatic" else ("1", "1")
        lines.append(
            f"{row.side:<10}{ar:>8}{ap50:>8}{row.masks:>8.1f}{row.seconds:>10.3f}{times[0]:>8}"
            f"{row.sam_seconds:>11.3f}{times[1]:>8}"
        )
    return [*lines, "x: how many times as fast as the automatic mask generator; s/image has the VLM in it"]
