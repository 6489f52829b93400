"""The command `vprune segment`: an image, or a folder of them, to one COCO file and a picture each."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vprune.arguments import Parser
from vprune.errors import VPruneError
from vprune.eval.options import help_text

_DESCRIPTION = """\
Outline what a vision-language model says it sees, or what a phrase means: no category list, no training.

  vprune segment photo.jpg
  vprune segment photo.jpg phrase="the small red circle"
  vprune segment folder/ segmenter=sam_vit_h segmenter.path=sam_vit_h_4b8939.pth model=llava-hf/llava-1.5-7b-hf

annotations.json is a COCO file; overlay/NAME.png shows it. A folder that was broken off goes on where it was."""
_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_JOURNAL, _RESULT, _CONFIG = "images.jsonl", "annotations.json", "config.yaml"
_EXIT_CODES = "exit codes: 0 done, 1 some images failed (they are named), 2 a mistake in the command or in a file"
_ELSEWHERE = ("out", "overwrite", "overlay", "device")


def main(argv: Sequence[str]) -> int:
    """Run `vprune segment`; exit code 0 done, 1 some images failed. VPruneError for a user's mistake."""
    told = help_text("segment", [_EXIT_CODES])
    parser = Parser("segment", "IMAGE_OR_DIR [key=value ...]", description=_DESCRIPTION, epilog=told)
    parser.add_argument("image", metavar="IMAGE_OR_DIR", help="a picture, or a folder of them")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="how; options below")
    arguments = parser.parse_intermixed_args(list(argv))
    if re.match(r"[\w.]+=", arguments.image) and not Path(arguments.image).exists():
        parser.error("the following arguments are required: IMAGE_OR_DIR")
    if bare := [word for word in arguments.overrides if "=" not in word]:
        raise VPruneError(_misplaced(bare, arguments.overrides))
    source = Path(arguments.image).expanduser()
    images_in(source)
    return run(source, configured(arguments.overrides))


def _misplaced(bare: Sequence[str], words: Sequence[str]) -> str:
    """What is wrong with words behind the image that are no key=value."""
    said = " ".join(word.removeprefix("phrase=") for word in words if word in bare or word.startswith("phrase="))
    remedy = f'options are key=value, and a phrase of several words has quotes around it: phrase="{said}"'
    if all(Path(word).exists() for word in bare):
        remedy = "several images go into a folder, which is named in their place"
    return f"vprune segment takes one image or folder, and not {bare[0]!r} behind it; {remedy}"


def configured(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration that the overrides ask for.

    Raises:
        VPruneError: one that does not compose.
    """
    from vprune.amounts import checked_options
    from vprune.eval.overrides import compose_all

    # Phrases hold whatever people say; none of it is Hydra's.
    said: dict[str, str | None] = {"phrase": None, "background": None, "refer": None}
    rest = []
    for word in overrides:
        key, equals, value = word.partition("=")
        if key in said and equals:
            said[key] = value.strip("\"'")
        else:
            rest.append(word)
    config = compose_all(rest, primary="segment")[0].config
    checked_options(keep=config["keep"])
    return config | {key: value or None for key, value in said.items() if value is not None and value != "null"}


def run(source: Path, config: Mapping[str, Any]) -> int:
    """Segment an image or all images of a folder; returns the exit code.

    Raises:
        VPruneError: nothing to segment, a mistake in the configuration, an only image that cannot be read.
    """
    from vprune.eval.benchmarks.images import check_image
    from vprune.eval.console import make_console
    from vprune.segmentation.segment import refuse_size

    paths = images_in(source)
    if not source.is_dir():
        refuse_size(check_image(source), f"image {source}")
    said = re.sub(r"[^\w.+-]+", "_", str(config["phrase"])) if config["phrase"] else None
    name = source.resolve().stem if said is None else f"{source.resolve().stem}-{said}"
    out = Path(str(config["out"])).expanduser() if config["out"] else Path("runs") / "segment" / name
    folder = Results(out, source, config)

    from transformers.utils import logging  # takes seconds, and mistakes are told by now

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    left = [path for path in paths if folder.name_of(path) not in folder.rows]
    console = make_console()
    failed: list[str] = []
    if left:
        work = Work(config)
        failed = _each(work, folder, left, console, bool(config["overlay"]), alone=not source.is_dir())
    folder.write(config)
    found = sum(len(row["annotations"]) for row in folder.rows.values())
    masks, images = (
        f"{count} {one}{'s' * (count != 1)}" for count, one in ((found, "mask"), (len(folder.rows), "image"))
    )
    console.print(f"{masks} in {images}, written to {out / _RESULT}", soft_wrap=True)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _each(work: Work, folder: Results, left: Sequence[Path], console: Any, overlay: bool, alone: bool) -> list[str]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vprune.eval.console import SECONDS_BETWEEN_LINES

    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    said, shown = time.monotonic(), console.is_terminal and len(left) > 1
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        for number, path in enumerate(bar.track(left, description="segment")):
            if not console.is_terminal and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                console.print(f"segment: {number} of {len(left)} images", soft_wrap=True)
            try:
                picture, masks, labels = work(path)
                drawn = masks.overlay(picture) if overlay else None
            except (VPruneError, OSError, ValueError, RuntimeError, MemoryError) as error:
                if alone:
                    raise
                failed.append(f"{folder.name_of(path)}: {error or type(error).__name__}")
                continue
            folder.add(path, masks, labels, drawn)
    return failed


def images_in(source: Path) -> list[Path]:
    """The images to segment: the file itself, or those of a folder and the folders in it, by name.

    Raises:
        VPruneError: there is no such file, or none in the folder.
    """
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file())
        if not found:
            raise VPruneError(f"{source} holds no images ({', '.join(sorted(_ENDINGS))})")
        return found
    if not source.is_file():
        raise VPruneError(f"{source} does not exist: name an image or a folder of images")
    return [source]


class Work:
    """The models, loaded once, and what is done with each image."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from hydra.utils import instantiate

        from vprune.eval.models import ModelChoice, load, pick_device, resolve
        from vprune.models.foreseen import foresee
        from vprune.segmentation.labels import Labeller, read_categories
        from vprune.segmentation.segment import Session
        from vprune.segmentation.words import refuse_unsayable

        device = pick_device(config["device"])
        self.recipe = recipe_of(config)
        self.phrase, pruner, model = config["phrase"], method_of(config), config["model"]
        if pruner is not None:
            foresee(resolve(model["path"]), model["revision"]).refuse(pruner)
        categories = read_categories(config["categories"])
        segmenter = _made(instantiate, {**config["segmenter"], "device": str(device)})
        self.labeller = None if categories is None else Labeller(categories, config["clip"], device)
        # The largest comes last, so that what is wrong with the others is told soon.
        loaded = load(
            ModelChoice(model["path"], model["revision"], model["trust_remote_code"], config["dtype"], config["device"])
        )
        if self.phrase is not None:
            refuse_unsayable(self.phrase, loaded.processor.tokenizer)
        self.session = Session((loaded.model, loaded.processor), segmenter, self.recipe, pruner, config["device"])

    def __call__(self, path: Path) -> tuple[Any, Any, list[str]]:
        """The picture, its masks, and the category of each."""
        from vprune.eval.benchmarks.images import load_image

        picture = load_image(path)
        masks = self.session(picture, self.phrase)
        return picture, masks, list(masks.names) if self.labeller is None else self.labeller(masks.names)


def method_of(config: Mapping[str, Any]) -> Any:
    """The `Pruner` of a configuration; None for method=full.

    Raises:
        VPruneError: a value out of range.
    """
    from vprune.eval.settings import changes
    from vprune.method_files import read_method
    from vprune.pruner import load_method

    method = config["method"]
    if method["name"] == "full":
        return None
    source = method.get("file", method["name"])
    return load_method(source, **{**dict(changes(method, read_method(source))), "keep": config["keep"]})


def recipe_of(config: Mapping[str, Any]) -> Any:
    """The `Recipe` of a configuration.

    Raises:
        VPruneError: a value out of range.
    """
    from dataclasses import fields

    from hydra.utils import instantiate

    from vprune.segmentation.recipe import Recipe

    own = {one.name: config[one.name] for one in fields(Recipe) if one.name not in ("maps", "prompting")}
    return Recipe(**own, maps=_made(instantiate, config["maps"]), prompting=_made(instantiate, config["prompting"]))


def _made(instantiate: Any, part: Mapping[str, Any]) -> Any:
    from hydra.errors import InstantiationException

    try:
        return instantiate(dict(part))
    except InstantiationException as error:
        if isinstance(error.__cause__, VPruneError):
            raise error.__cause__ from None
        raise VPruneError(" ".join(str(error.__cause__ or error).split())) from error


class Results:
    """The folder of one command: a journal of what is done, and the COCO file made of it.

    Nothing is written before the first image is done, so a mistake that shows up only then leaves the folder as it was.

    Raises:
        VPruneError: another configuration's results are there, or it cannot be written.
    """

    def __init__(self, out: Path, source: Path, config: Mapping[str, Any]) -> None:
        import yaml

        self.out, self.source = out, source
        self.rows: dict[str, dict[str, Any]] = {}
        told = {"source": str(source.resolve()), **{k: v for k, v in config.items() if k not in _ELSEWHERE}}
        self._told = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
        self._whole: list[bytes] | None = []  # lines of the journal to go on from, None once the folder is begun
        file, journal = out / _CONFIG, out / _JOURNAL
        if journal.is_file() and not config["overwrite"]:
            if file.is_file() and yaml.safe_load(file.read_text(encoding="utf-8")) != told:
                raise VPruneError(
                    f"{out} holds the results of another command: give another out=DIR, or overwrite=true"
                )
            # (The kill may have come in the middle of a line.)
            self._whole = [line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        place = next(one for one in (out, *out.resolve().parents) if one.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            why = "no permission" if place.is_dir() else f"{place} is a file"
            raise VPruneError(f"out={out} cannot be written ({why}); choose another folder with out=DIR")
        self.rows |= {row["file_name"]: row for row in map(json.loads, self._whole)}

    def _begin(self) -> None:
        """Make the folder what `config.yaml` says of it, once."""
        if self._whole is None:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / _CONFIG).write_text(self._told, encoding="utf-8")
            (self.out / _JOURNAL).write_bytes(b"".join(self._whole))
        except OSError as error:
            raise VPruneError(
                f"out={self.out} cannot be written ({error}); choose another folder with out=DIR"
            ) from error
        self._whole = None

    def name_of(self, path: Path) -> str:
        """An image's name in the COCO file: its path below the folder."""
        return path.relative_to(self.source).as_posix() if self.source.is_dir() else path.name

    def add(self, path: Path, masks: Any, labels: Sequence[str], drawn: Any) -> None:
        """Write one image's results down."""
        self._begin()
        name = self.name_of(path)
        height, width = masks.size
        annotations = [{**one, "label": label} for one, label in zip(masks.to_coco(), labels, strict=True)]
        if drawn is not None:
            # a.jpg and a.png may lie side by side: then the ending stays in the name.
            twins = [one for one in path.parent.iterdir() if one.stem == path.stem and one.suffix.lower() in _ENDINGS]
            shown = Path(name) if len(twins) > 1 and self.source.is_dir() else Path(name).with_suffix("")
            target = self.out / "overlay" / shown.with_name(f"{shown.name}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(target)
        self.rows[name] = {"file_name": name, "width": width, "height": height, "annotations": annotations}
        with (self.out / _JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[name], ensure_ascii=False) + "\n")

    def write(self, config: Mapping[str, Any]) -> None:
        """Write `annotations.json`: images by name, categories in the order of the list, or of their first mask."""
        from vprune.segmentation.labels import read_categories

        self._begin()
        given = read_categories(config["categories"]) or []
        said = [one["label"] for name in sorted(self.rows) for one in self.rows[name]["annotations"]]
        categories = {name: number for number, name in enumerate(dict.fromkeys([*given, *said]), start=1)}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, name in enumerate(sorted(self.rows), start=1):
            row = self.rows[name]
            images.append({"id": number, "file_name": name, "width": row["width"], "height": row["height"]})
            for one in row["annotations"]:
                own = {key: value for key, value in one.items() if key != "label"}
                place = {"id": len(annotations) + 1, "image_id": number, "category_id": categories[one["label"]]}
                annotations.append({**own, **place})
        content = {
            "info": {"description": "vprune segment", "phrase": config["phrase"]},
            "images": images,
            "categories": [{"id": number, "name": name} for name, number in categories.items()],
            "annotations": annotations,
        }
        draft = self.out / f".{_RESULT}.draft"
        draft.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.out / _RESULT)
