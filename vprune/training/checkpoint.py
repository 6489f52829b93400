"""The folder of a training run: which recipe has begun in it, and the checkpoint that the run goes on from."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from vprune.errors import VPruneError
from vprune.training.named_values import values

FILE, LOG = "checkpoint.pt", "log.jsonl"
_ELSEWHERE = ("out", "device")  # where a run is done changes nothing of what it does


def claim(out: Path, config: DictConfig, made: Mapping[str, Sequence[str]] | None = None) -> None:
    """Make `out` the folder of this recipe's run, which a later run of the same recipe goes on with.

    `made` tells of files of the run which values of the recipe (or groups of them) they depend on; unless it says
    otherwise, a checkpoint depends on all of them but `out` and `device`. A run with other values that was broken off
    before anything depended on them makes way: it is told so, and its log is put aside.

    Raises:
        VPruneError: it holds something that was made with other values or by something else, or cannot be written to.
    """
    path = out / "config.yaml"
    own = dict(values(OmegaConf.to_container(config)))
    depends = {FILE: [key for key in map(str, config) if key not in _ELSEWHERE], **(made or {})}
    made_there = [file for file in depends if (out / file).exists()]
    keys = {key for file in made_there for key in depends[file]}
    aside = None
    if path.exists():
        before = _values_in(path)
        differing = {
            name: f"{name} ({before.get(name)} there, {own.get(name)} here)"
            for name in sorted(before.keys() | own.keys())
            if before.get(name) != own.get(name) and name.partition(".")[0] not in _ELSEWHERE
        }
        bound = [told for name, told in differing.items() if any(f"{name}.".startswith(f"{key}.") for key in keys)]
        if bound:
            raise VPruneError(
                f"{out} holds a run with other values of {', '.join(bound)}: give another folder with out=, or "
                "delete this one to start over"
            )
        if {name.partition(".")[0] for name in before} != set(map(str, config)):
            raise VPruneError(f"{path} is not of this recipe's making: give another folder with out=")
        if differing and FILE not in made_there:
            kept = f" and keeps {' and '.join(made_there)}" if made_there else ""
            print(
                f"{out} was begun with other values of {', '.join(differing.values())}, and broken off before its "
                f"first checkpoint: it starts anew{kept}",
                flush=True,
            )
            aside = out / LOG
    try:
        out.mkdir(parents=True, exist_ok=True)
        if aside is not None and aside.exists():
            aside.replace(aside.with_name(f"{LOG}.before"))
        OmegaConf.save(config, path)
    except OSError as error:
        raise VPruneError(f"out={out} cannot be written to ({error})") from error


def _values_in(path: Path) -> dict[str, Any]:
    try:
        before = OmegaConf.to_container(OmegaConf.load(path))
        return dict(values(before))
    except (OSError, YAMLError, OmegaConfBaseException, AttributeError) as error:
        raise VPruneError(f"{path} cannot be read ({' '.join(str(error).split())}): give another out=") from error


def save(
    out: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor],
    step: int,
    seconds: float,
) -> None:
    """Write the checkpoint that `resume` reads, whole or not at all."""
    state = {
        "model": module.state_dict(),
        "average": dict(average),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
    }
    part = out / "checkpoint.part"
    torch.save(state, part)
    part.replace(out / FILE)


def resume(
    out: Path, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[dict[str, Tensor], int, float] | None:
    """Put the last checkpoint into `module` and `optimizer`; returns the averaged weights, the step and the seconds.

    None where there is no checkpoint: the run begins.

    Raises:
        VPruneError: the checkpoint is cut short, or of something else.
    """
    path = out / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return dict(state["average"]), int(state["step"]), float(state["seconds"])
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VPruneError(
            f"{path} ({path.stat().st_size} bytes) is no checkpoint of this run ({reason}): delete it to start over"
        ) from error
