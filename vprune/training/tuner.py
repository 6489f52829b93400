"""The search for a progressive method's settings: what is said last should come out as without pruning."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vprune.amounts import RECYCLERS
from vprune.attach import prune
from vprune.errors import VPruneError
from vprune.eval.models import LoadedModel
from vprune.models.anatomy import dissect
from vprune.progressive import Progressive
from vprune.pruner import load_method

_MOST_AT_FIRST = 2.8  # times the mean budget, so that something is left for the two other thirds
_THRESHOLDS = (0.0, 150.0)
_ALPHAS = (0.0, 1000.0)
_CELLS_A_SIDE = (1, 6)
CHOICES = {"recycle": RECYCLERS, "size_aware": (False, True)}
"""Options that are searched among a few values, unless they are fixed."""
_STARTUP_TRIALS = 10  # drawn at random before the Gaussian process has something to go by


@dataclass(frozen=True)
class Trial:
    """One setting that was tried: its options as the method takes them, and the flow that came out."""

    number: int
    options: dict[str, Any]
    flow: float


@dataclass
class LastTokenFlow:
    """How much of what the last prompt token has gathered survives pruning (VFlowOpt, arXiv 2508.05211).

    flow = mean over samples of cos(z, z'), z [D] the last prompt token's final hidden state in the full model, z' in
    the pruned one. No answers are looked at.

    Args:
        loaded: the model. batches: its inputs, left-padded, as its processor makes them.

    Raises:
        VPruneError: no batch.

    Example:
        >>> LastTokenFlow(loaded, batches)(load_method("vflowopt", keep=1.0))  # doctest: +SKIP
        1.0
    """

    loaded: LoadedModel
    batches: Sequence[Any]

    def __post_init__(self) -> None:
        if not self.batches:
            raise VPruneError("there is no sample to tune on: give samples >= 1")
        self._full = self._states(None)

    def __call__(self, method: Any) -> float:
        """The flow under a method."""
        return float(torch.cosine_similarity(self._states(method), self._full, dim=-1).mean())

    @torch.no_grad()
    def _states(self, method: Any) -> Tensor:
        model = self.loaded.model
        base = dissect(model).base
        states = []
        with nullcontext() if method is None else prune(model, method):
            for inputs in self.batches:
                on_device = inputs.to(self.loaded.device, dtype=model.dtype)
                states.append(base(**on_device).last_hidden_state[:, -1].double().cpu())
        return torch.cat(states)


def search(
    flow: Callable[[Any], float],
    source: str,
    options: dict[str, Any],
    trials: int,
    seed: int,
    fixed: Collection[str] = (),
) -> Iterator[Trial]:
    """Try `trials` settings, the method's own first, each where the last ones promise most.

    A Gaussian process with expected improvement chooses first and second (what each third keeps), the threshold of the
    calibration, the weight of the entropies, what becomes of pruned tokens, how many cells recycle, and whether sizes
    count; the last third follows from the budget.

    Args:
        flow: what is maximised, of a method.
        source: the method's name or file.
        options: where the search begins, with `keep` a fraction below 1.
        trials: how many settings.
        seed: of the search; the same one tries the same.
        fixed: which of `CHOICES` stay as they are there.

    Raises:
        VPruneError: optuna is not installed, or the method has no thirds.
    """
    try:
        import optuna
    except ImportError as error:
        raise VPruneError("vprune tune needs optuna, and it is not installed: pip install 'vprune[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    own = tunable(source, options)
    keep = float(own.keep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS, deterministic_objective=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(told(own, fixed))
    for number in range(trials):
        trial = study.ask()
        found = suggested(trial, keep, fixed)  # at first the study only learns where the method's own setting lies
        asked = found if number else own_options(own, fixed)
        value = flow(load_method(source, **{**options, **asked}))
        study.tell(trial, value)
        yield Trial(number, asked, value)


def tunable(source: str, options: dict[str, Any]) -> Progressive:
    """The method that is to be tuned, as it comes.

    Raises:
        VPruneError: it has no thirds, or `keep` is no fraction below 1.
    """
    own = load_method(source, **options)
    if not isinstance(own, Progressive):
        raise VPruneError(f"method={own.name} has no thirds to tune: choose vflowopt, or a file that vprune tune wrote")
    if isinstance(own.keep, int) or own.keep >= 1:
        raise VPruneError(f"keep={own.keep}: give a fraction below 1, the mean of what is left over all layers")
    return own


def suggested(trial: Any, keep: float, fixed: Collection[str] = ()) -> dict[str, Any]:
    """Options within the budget, from where the search looks in the unit cube of feasible thirds.

    Every parameter is asked for in every trial, also where the others make it idle: the Gaussian process leaves those
    that some trials lack to chance.
    """
    most = min(_MOST_AT_FIRST, 1 / keep)
    first = 1 + trial.suggest_float("first", 0.0, 1.0) * (most - 1)
    even = (3 - first) / 2
    second = even + trial.suggest_float("second", 0.0, 1.0) * (min(first, 3 - first) - even)
    return {
        "first": round(first, 4),
        "second": round(min(second, first, 3 - first), 4),
        "threshold": round(trial.suggest_float("threshold", *_THRESHOLDS), 3),
        "alpha": round(trial.suggest_float("alpha", *_ALPHAS), 3),
        "cells": trial.suggest_int("side", *_CELLS_A_SIDE) ** 2,
        **{key: trial.suggest_categorical(key, values) for key, values in CHOICES.items() if key not in fixed},
    }


def own_options(method: Progressive, fixed: Collection[str] = ()) -> dict[str, Any]:
    """The setting that a method comes with, in the terms of `suggested`."""
    scorer: Any = method.scorer
    return {
        "first": method.first,
        "second": method.second,
        "threshold": getattr(scorer, "threshold", 0.0),
        "alpha": getattr(scorer, "alpha", 0.0),
        "cells": method.cells,
        **{key: getattr(method, key) for key in CHOICES if key not in fixed},
    }


def told(method: Progressive, fixed: Collection[str] = ()) -> dict[str, Any]:
    """Where a method's own setting lies in the space that `suggested` searches, as near as it reaches."""
    own, keep = own_options(method, fixed), float(method.keep)
    most = min(_MOST_AT_FIRST, 1 / keep)
    even = (3 - own["first"]) / 2
    room = min(own["first"], 3 - own["first"]) - even
    low, high = _CELLS_A_SIDE
    return {
        "first": _within((own["first"] - 1) / (most - 1), 0.0, 1.0),
        "second": _within((own["second"] - even) / room if room > 0 else 0.0, 0.0, 1.0),
        "threshold": _within(own["threshold"], *_THRESHOLDS),
        "alpha": _within(own["alpha"], *_ALPHAS),
        "side": int(_within(math.isqrt(own["cells"]), low, high)),
        **{key: own[key] for key in CHOICES if key in own},
    }


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def write_method(folder: Path, name: str, config: dict[str, Any], best: Trial, own: Trial, says: str) -> Path:
    """Write the YAML that `method=` accepts; returns its path.

    Raises:
        VPruneError: the folder cannot be written to.
    """
    tuned = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for key, value in best.options.items():
        owner = tuned["scorer"] if key in tuned["scorer"] else tuned
        owner[key] = value
    text = f"# {says}\n# Last-token flow {best.flow:.6f} (trial {best.number}); {own.flow:.6f} before.\n"
    path = folder / f"{name}.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text + yaml.safe_dump(tuned, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise VPruneError(f"{path} cannot be written ({error})") from error
    return path


def line(trial: Trial) -> str:
    """A trial as a line of `trials.jsonl`."""
    return json.dumps({"trial": trial.number, **trial.options, "flow": trial.flow}) + "\n"
