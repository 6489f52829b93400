"""A sweep's runs through a Hydra launcher: processes by joblib, cluster jobs by submitit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode

from vprune.errors import VPruneError
from vprune.eval.settings import Job

_EXTRA = "pip install 'vprune[launchers]'"
_QUIET = ("hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null", "hydra.job.chdir=false")


def split_launcher(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides that choose and set a launcher, and the others, which the runs are made of."""
    chosen = [text for text in overrides if text.startswith(("hydra/launcher=", "hydra.launcher."))]
    return chosen, [text for text in overrides if text not in chosen]


def launch(jobs: Sequence[Job], launcher: Sequence[str]) -> list[str | None]:
    """Carry out every job by the launcher that `launcher` overrides choose; per job None, or what was wrong with it.

    Its own logs go below the sweep's folder, into `.launcher`.

    Raises VPruneError for a launcher that is not installed or an option that it does not have.
    """
    absolute = [replace(job, folder=job.folder.resolve(), shared=job.shared.resolve()) for job in jobs]
    told = [*launcher, *_QUIET, f"hydra.sweep.dir='{absolute[0].shared / '.launcher'}'"]
    with initialize_config_module("vprune.conf", version_base="1.3", job_name="vprune"):
        hydra: Any = GlobalHydra.instance().hydra
        try:
            config = hydra.compose_config(
                config_name="eval", overrides=told, run_mode=RunMode.MULTIRUN, with_log_configuration=False
            )
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
            task = partial(_carry_out_one, absolute)
            chosen = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
        except (HydraException, ImportError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise VPruneError(
                f"{' '.join(launcher)} is no launcher that can be used here ({_EXTRA}): {reason}"
            ) from error
        # Which job it is, each finds by its number; its configuration is its own already.
        returned = chosen.launch([[] for _ in absolute], initial_job_idx=0)
    return [_told(one) for one in returned]


def _carry_out_one(jobs: Sequence[Job], config: Any) -> str | None:
    """What a launched process does: the job of its number."""
    from rich.console import Console

    from vprune.eval.run import carry_out, plan

    del config
    number = HydraConfig.get().job.num
    take_turns(number, jobs[number].config["device"])
    try:
        with Path("/dev/null").open("w") as nowhere:
            carry_out(plan(jobs[number]), Console(file=nowhere))
    except VPruneError as error:
        return str(error)
    return None


def take_turns(number: int, device: str) -> None:
    """Have the runs of a sweep take a machine's GPUs in turn, where `device` names none of them."""
    import torch

    if device in ("auto", "cuda") and (count := torch.cuda.device_count()) > 1:
        torch.cuda.set_device(number % count)


def _told(returned: Any) -> str | None:
    if returned.status == JobStatus.COMPLETED:
        value = returned.return_value
        return None if value is None else str(value)
    try:
        error: object = returned.return_value
    except Exception as raised:  # noqa: BLE001 - whatever ended the process of this run is told beside the others
        error = raised
    return f"{type(error).__name__}: {error}"
