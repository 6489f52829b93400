"""What a run is told: a checked configuration, and the folder that follows from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vprune.amounts import checked_options
from vprune.errors import VPruneError
from vprune.eval.models import ATTENTIONS, DTYPES, ModelChoice
from vprune.eval.overrides import Composed, compose_all, unknown
from vprune.method_files import method_label, method_names, read_method

PRUNING_OPTIONS = ("layer", "recycle", "size_aware", "stages", "budget", "minimum")
_TOLD_ELSEWHERE = ("model", "method", "benchmark", "keep", "limit", "seed", "blank", "out", "overwrite")


@dataclass(frozen=True)
class Job:
    """One run: `config` goes into its `config.yaml`, `folder` is its own, `shared` that of the whole sweep."""

    config: dict[str, Any]
    folder: Path
    shared: Path
    overwrite: bool

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.config["method"]["name"])

    @property
    def method_source(self) -> str:
        """What `load_method` knows the method by: its name, or the path of its file."""
        return str(self.config["method"].get("file", self.method))

    @property
    def method_options(self) -> dict[str, Any]:
        """What `load_method` should take in place of the method's defaults."""
        changed = dict(changes(self.config["method"], read_method(self.method_source)))
        given = {key: self.config[key] for key in PRUNING_OPTIONS if self.config[key] is not None}
        return {"seed": self.config["seed"]} | changed | given | {"keep": self.config["keep"]}

    @property
    def model_choice(self) -> ModelChoice:
        """Which model to load, and how."""
        model, engine = self.config["model"], self.config["engine"]
        return ModelChoice(
            path=model["path"],
            revision=model["revision"],
            trust_remote_code=model["trust_remote_code"],
            dtype=self.config["dtype"],
            device=self.config["device"],
            attention=engine["attention"],
        )


def read_jobs(overrides: Sequence[str], sweep: bool = False) -> list[Job]:
    """The runs that command-line overrides ask for: one, or with `sweep` one for every combination of comma lists.

    `method=full` keeps everything, so it ignores keep and the pruning options and is asked for once only; full runs
    come first, for the others' retention. Raises VPruneError for anything that does not compose or is out of range.
    """
    composed = compose_all(overrides, sweep)
    for one in composed:
        _settle(one.config)
    several_tasks = len({_task_name(one.config) for one in composed}) > 1
    jobs = [_job(one, sweep, several_tasks) for one in composed]
    unique = {job.folder: job for job in jobs}
    for job in jobs:
        if unique[job.folder].config != job.config:
            remedy = "sweep them apart, each with its own out=DIR"
            raise VPruneError(f"two different runs of this sweep would share the folder {job.folder}; {remedy}")
    return sorted(unique.values(), key=lambda job: job.method != "full")


def _job(composed: Composed, sweep: bool, several_tasks: bool) -> Job:
    config = {key: value for key, value in composed.config.items() if key not in ("out", "overwrite")}
    out, overwrite = composed.config["out"], composed.config["overwrite"]
    task, name = _task_name(config), _run_name(config, composed.overrides)
    shared = Path("runs") / task if out is None else Path(str(out)).expanduser()
    if out is None:
        folder = shared / name
    elif not sweep:
        folder = shared
    else:
        folder = shared / task / name if several_tasks else shared / name
    return Job(config, folder, shared, overwrite)


def _settle(config: dict[str, Any]) -> None:
    """Check what no library checks for us, and fill in what follows from the method."""
    _check_integer(config, "limit", least=1, optional=True)
    _check_integer(config, "seed", least=0)
    _check_integer(config, "batch_size", least=1)
    _check_integer(config, "max_new_tokens", least=1)
    _check_integer(config["engine"], "workers", least=1, optional=True)
    _check_boolean("blank", config["blank"])
    _check_boolean("overwrite", config["overwrite"])
    _check_boolean("model.trust_remote_code", config["model"]["trust_remote_code"])
    for key, value, known in (
        ("dtype", config["dtype"], DTYPES),
        ("engine.attention", config["engine"]["attention"], ATTENTIONS),
    ):
        if value not in known:
            raise unknown(key, value, known)
    config["model"]["name"] = str(config["model"]["name"])
    if Path(config["model"]["name"]).is_absolute():  # a local folder, told in full by model.path
        config["model"]["name"] = Path(config["model"]["name"]).name
    if config["method"]["name"] == "full":
        config |= {"keep": 1.0, **dict.fromkeys(PRUNING_OPTIONS)}
        config["method"] = {"name": "full", **read_method("full")}
    elif config["keep"] is None:
        config["keep"] = config["method"].get("keep", 0.1)
    _tell_variation(config)
    for options in (config, config["method"]):
        checked_options(**{key: options.get(key) for key in ("keep", *PRUNING_OPTIONS)})
    for key in ("keep", "seed", *PRUNING_OPTIONS):
        _place(config["method"], key, config[key])


def _tell_variation(config: dict[str, Any]) -> None:
    """What a file says otherwise than the method that it names counts as given: tables tell it beside the name."""
    method = config["method"]
    if "file" in method and method["name"] in method_names():
        plain = read_method(method["name"])
        for key in PRUNING_OPTIONS:
            if config[key] is None and method.get(key) != plain.get(key):
                config[key] = method.get(key)


def _place(method: dict[str, Any], key: str, value: Any) -> None:
    """Put a common option where the method's own YAML has it, so that the configuration on disk tells what was run."""
    if value is None or (key == "seed" and value == 0):
        return
    for owner in (method, *(part for part in method.values() if isinstance(part, dict))):
        if key in owner:
            owner[key] = value
            return


def changes(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys (without those above them) and values in which configuration `here` differs from `there`."""
    for key, value in here.items():
        if isinstance(value, Mapping) and isinstance(there.get(key), Mapping):
            yield from changes(value, there[key])
        elif key not in ("name", "file") and value != there.get(key):
            yield key, value


def _check_integer(config: Mapping[str, Any], key: str, least: int, optional: bool = False) -> None:
    value = config[key]
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise VPruneError(f"{key}={value}: expected an integer >= {least}{' or null' if optional else ''}")


def _check_boolean(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise VPruneError(f"{key}={value}: say true or false")


def _task_name(config: Mapping[str, Any]) -> str:
    """What runs must share to be compared: model, benchmark and which samples of it."""
    benchmark = config["benchmark"]
    parts = [config["model"]["name"].rsplit("/", 1)[-1]]
    parts.append(str(benchmark.get("name") or Path(str(benchmark.get("path", "scenes_fresh"))).name))
    parts += [f"limit_{config['limit']}"] if config["limit"] is not None else []
    parts += [f"seed_{config['seed']}"] if config["seed"] else []
    parts += ["blank"] if config["blank"] else []
    return _slug("-".join(parts))


def _run_name(config: Mapping[str, Any], overrides: Sequence[tuple[str, str]]) -> str:
    """Method, keep, and every other override that says more than the folder above does."""
    method = config["method"]
    full = method["name"] == "full"
    parts = [method_label(str(method.get("file", method["name"]))), str(config["keep"])]
    for key, value in overrides:
        ignored_by_full = full and (key in PRUNING_OPTIONS or key.startswith("method."))
        if key not in _TOLD_ELSEWHERE and not key.startswith("hydra") and not ignored_by_full:
            parts.append(f"{key}_{value}")
    return _slug("-".join(parts))


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)  # nothing that Hydra would want quoted in out=
