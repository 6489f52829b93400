"""The command `vprune eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vprune.arguments import Parser
from vprune.errors import VPruneError
from vprune.eval.options import help_text

_DESCRIPTION = """\
Ask a model every question of a benchmark, with visual tokens pruned, and score its answers.

  vprune eval method=attention keep=0.1
  vprune eval -m method=full,random,attention keep=0.5,0.25,0.1 limit=200
  vprune eval model=llava-hf/llava-1.5-7b-hf benchmark=my/folder method=attention keep=64

A killed run goes on where it was when the same command is given again; a finished one prints its table again."""
_LAST = (
    "Keys of an entry can be set too: model.revision=main benchmark.template='{question} Answer with one word.'",
    "exit codes: 0 done, 1 some samples failed (they are named), 2 a mistake in the command or in a file",
)


def main(argv: Sequence[str]) -> int:
    """Run `vprune eval` with these arguments and return its exit code; VPruneError for a user's mistake."""
    takes, told = "[-m] [key=value ...]", help_text("eval", _LAST)
    parser = Parser("eval", takes, description=_DESCRIPTION, epilog=told)
    what = "what to run; groups, options and defaults below"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=what)
    parser.add_argument("-m", "--multirun", action="store_true", help="sweep: run every combination of comma lists")
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and run nothing")
    arguments = parser.parse_intermixed_args(list(argv))
    if arguments.cfg:
        return _print_configurations(arguments.overrides, arguments.multirun)
    return _run(arguments.overrides, arguments.multirun)


def _print_configurations(overrides: Sequence[str], sweep: bool) -> int:
    import yaml

    from vprune.eval.settings import read_jobs

    _, overrides = _launched(overrides, sweep)
    for job in read_jobs(overrides, sweep):
        print(f"# {job.folder}\n{yaml.safe_dump(job.config, sort_keys=False, allow_unicode=True)}")
    return 0


def _launched(overrides: Sequence[str], sweep: bool) -> tuple[list[str], list[str]]:
    """The overrides that choose and set a launcher, and the others."""
    from vprune.eval.launching import split_launcher

    launcher, others = split_launcher(overrides)
    if launcher and not sweep:
        raise VPruneError(f"{launcher[0]} launches the runs of a sweep: add -m")
    return launcher, others


def _run(overrides: Sequence[str], sweep: bool) -> int:
    # What is wrong with the command is told before torch and transformers are imported, which takes seconds.
    from vprune.eval.launching import launch
    from vprune.eval.models import resolve
    from vprune.eval.settings import read_jobs

    launcher, overrides = _launched(overrides, sweep)
    jobs = read_jobs(overrides, sweep)
    for path in dict.fromkeys(job.config["model"]["path"] for job in jobs):
        resolve(path)

    from transformers.utils import logging

    from vprune.eval.console import complain, failures, make_console, table
    from vprune.eval.run import carry_out, forget, plan

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    forget()
    console = make_console()
    plans = [plan(job) for job in jobs]
    runs = []
    mistakes = 0
    if launcher:
        wrong = launch(jobs, launcher)
        for job, message in zip(jobs, wrong, strict=True):
            if message is not None:
                complain(f"{job.folder.name}: {message}")
                mistakes += 1
        # What is done is read from the folders, and never done again here.
        plans = [plan(replace(job, overwrite=False)) for job, message in zip(jobs, wrong, strict=True) if not message]
    for number, planned in enumerate(plans, start=1):
        try:
            runs.append(carry_out(planned, console, f"{number}/{len(plans)}" if len(plans) > 1 else ""))
        except VPruneError as error:
            if len(plans) == 1:
                raise
            complain(f"{planned.job.folder.name}: {error}")
            mistakes += 1
    if runs:
        console.print(table(runs))
        console.print(f"written to {runs[0].folder if len(runs) == 1 else runs[0].folder.parent}", soft_wrap=True)
    failed = [run for run in runs if run.metrics["failed"]]
    for run in failed:
        for line in failures(run):
            complain(line)
    return 2 if mistakes else 1 if failed else 0
