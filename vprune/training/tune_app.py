"""The command `vprune tune`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vprune.arguments import Parser
from vprune.errors import VPruneError
from vprune.eval.options import help_text

if TYPE_CHECKING:
    from rich.console import Console

    from vprune.training.tuner import Trial

TRIALS = "trials.jsonl"

_DESCRIPTION = """\
Search the settings of a progressive method for one model and one budget, without looking at a single answer.

  vprune tune keep=0.1
  vprune tune keep=0.25 model=llava-hf/llava-onevision-qwen2-7b-ov-hf benchmark=my/folder trials=30
  vprune tune keep=0.1 recycle=weighted size_aware=false   (as VFlowOpt recycles; else that is searched, too)

It maximises the last-token flow (the cosine between the last prompt token's final hidden state in the full and in the
pruned model) by Gaussian-process optimisation, and writes a YAML: vprune eval method=PATH_OF_THAT_FILE keep=0.1"""


def main(argv: Sequence[str]) -> int:
    """Run `vprune tune`; 0. VPruneError for a user's mistake."""
    told = help_text("tune", ["exit codes: 0 done, 2 a mistake in the command or in a file"])
    parser = Parser("tune", "[key=value ...]", description=_DESCRIPTION, epilog=told)
    what = "what to search; options below"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=what)
    tune(parser.parse_args(list(argv)).overrides)
    return 0


def tune(overrides: Sequence[str] = ()) -> Path:
    """Search as `overrides` of conf/tune.yaml ask, and say what came of it; returns the path of the YAML written.

    Raises:
        VPruneError: a value out of range, a method without thirds, or optuna is not installed.

    Example:
        >>> tune(["trials=5", "samples=2"])  # doctest: +SKIP
        PosixPath('runs/tune/embedded-vflowopt-0.1/vflowopt_tuned.yaml')
    """
    # What is wrong with the command is told before the search imports torch, which takes seconds.
    from vprune.amounts import checked_options
    from vprune.eval.models import resolve
    from vprune.eval.overrides import compose_all

    config = compose_all(overrides, primary="tune")[0].config
    for key, least in (("samples", 1), ("trials", 1), ("seed", 0), ("batch_size", 1)):
        if isinstance(config[key], bool) or not isinstance(config[key], int) or config[key] < least:
            raise VPruneError(f"{key}={config[key]}: expected an integer >= {least}")
    checked_options(config["keep"], config["recycle"], config["size_aware"])
    resolve(config["model"]["path"])

    from rich.progress import Progress

    from vprune.eval.console import make_console
    from vprune.models.anatomy import dissect
    from vprune.models.masks import takes_bias
    from vprune.training.tuner import LastTokenFlow, line, search, tunable, write_method

    method = {key: value for key, value in config["method"].items() if key not in ("name", "file")}
    name, source = config["method"]["name"], config["method"].get("file", config["method"]["name"])
    fixed = {key: config[key] for key in ("keep", "recycle", "size_aware") if config[key] is not None}
    model_name = str(config["model"]["name"]).rsplit("/", 1)[-1]
    folder = Path(str(config["out"] or f"runs/tune/{model_name}-{name}-{config['keep']}")).expanduser()
    console = make_console()
    options = {**_changed(method, source), **fixed}
    own = tunable(source, options)  # told before a large model is loaded, not after
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VPruneError(f"out={folder} cannot be written to ({error})") from error
    loaded, batches, samples = _samples(config, folder, console)
    backend = dissect(loaded.model).backend
    if "size_aware" not in fixed and not takes_bias(backend):
        fixed["size_aware"] = own.size_aware
        console.print(f"size_aware={str(own.size_aware).lower()} in all settings: {backend} takes no additive mask")
    tried, total = [], config["trials"]
    console.print(f"tuning {name} for keep={config['keep']}: {total} settings, each on {samples} samples")
    flow = LastTokenFlow(loaded, batches)
    with (folder / TRIALS).open("w", encoding="utf-8") as log, Progress(console=console) as bar:
        task = bar.add_task("tuning", total=total)
        for trial in search(flow, source, options, total, config["seed"], fixed):
            tried.append(trial)
            log.write(line(trial))
            log.flush()
            best = max(tried, key=lambda one: one.flow)
            bar.update(task, advance=1, description=f"flow {best.flow:.5f} (own {tried[0].flow:.5f})")
    says = (
        f"Tuned by `vprune tune` for model={config['model']['name']} keep={config['keep']}: {total} settings tried on "
        f"{samples} samples, seed {config['seed']}."
    )
    tuned = name if name.endswith("_tuned") else f"{name}_tuned"
    path = write_method(folder, tuned, {**method, **fixed}, best, tried[0], says)
    for sentence in _outcome(config, tried, best, path):
        console.print(sentence, soft_wrap=True, markup=False)
    return path


def _outcome(config: dict[str, Any], tried: Sequence[Trial], best: Trial, path: Path) -> list[str]:
    """What was found, what is gained over the method's own setting, where it is, and what to do with it."""
    own, settings = tried[0], ", ".join(f"{key} {value}" for key, value in best.options.items())
    if best.number:
        found = f"trial {best.number} of {len(tried)} ({settings}) keeps a last-token flow of {best.flow:.5f}"
        gain = f"{best.flow - own.flow:.5f} above that of the method's own, {own.flow:.5f}"
    else:
        found = f"of {len(tried)} trials none is better than the method's own setting ({settings})"
        gain = f"whose last-token flow is {own.flow:.5f}"
    model = [] if config["model"]["name"] == "embedded" else [f"model={config['model']['path']}"]
    following = ["vprune", "eval", *model, f"method={path}", f"keep={config['keep']}", "limit=256"]
    return [
        f"{found}, {gain} (1 is the unpruned model's)",
        f"written to {path}, all settings tried to {path.with_name(TRIALS)}",
        f"how many answers it gets right: {shlex.join(following)}",
    ]


def _changed(method: dict[str, Any], source: str) -> dict[str, Any]:
    """What overrides changed of the method's own configuration, as options of `load_method`."""
    from vprune.eval.settings import changes
    from vprune.method_files import read_method

    return dict(changes(method, read_method(source)))


def _samples(config: dict[str, Any], folder: Path, console: Console) -> tuple[Any, list[Any], int]:
    """The model, the inputs of the questions drawn, and how many these are; scenes drawn for them go again."""
    if config["benchmark"].get("cache", "") is None:
        console.print(
            f"drawing {config['benchmark']['images']} scenes to ask about, a second or less each "
            "(benchmark.images=N: fewer; benchmark.cache=DIR: kept for the next time)",
            soft_wrap=True,
        )
    with TemporaryDirectory(prefix=".scenes-", dir=folder) as drawn:
        return _drawn(config, drawn)


def _drawn(config: dict[str, Any], cache: str) -> tuple[Any, list[Any], int]:
    from vprune.eval.batches import draw
    from vprune.eval.models import ModelChoice, load
    from vprune.eval.predictor import Predictor
    from vprune.eval.run import load_benchmark

    model, engine, size = config["model"], config["engine"], config["batch_size"]
    benchmark = load_benchmark(json.dumps(config["benchmark"]), cache)
    choice = ModelChoice(
        path=model["path"],
        revision=model["revision"],
        trust_remote_code=model["trust_remote_code"],
        dtype=config["dtype"],
        device=config["device"],
        attention=engine["attention"],
    )
    loaded = load(choice)
    drawn = draw(benchmark.samples, config["samples"], config["seed"])
    predictor = Predictor(loaded, benchmark, max_new_tokens=1)
    batches = [predictor.prepare(drawn[at : at + size]).inputs for at in range(0, len(drawn), size)]
    return loaded, batches, len(drawn)
