"""The command `vprune`: one verb a job, mistakes told in a line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.resources import files

from vprune import __version__
from vprune.errors import VPruneError

DONE, SOME_FAILED, MISTAKE = 0, 1, 2
_INTERRUPTED = 130
# What Hydra raises about overrides; by name, because importing Hydra would slow `vprune --help` down.
_COMPOSITION_ERRORS = ("ConfigCompositionException", "MissingConfigException", "OverrideParseException")

_RECIPES = {
    "vlm": "the embedded vision-language model, from scratch",
    "scorer": "the network that learns which tokens matter",
    "clip": "the embedded CLIP, which names crops and compares words",
    "sam": "the embedded SAM, which draws masks from points, boxes and masks",
}
_TRAINING = "vprune.training.cli"
# verb -> (what it does, where its main lives)
_VERBS: dict[str, tuple[str, str]] = {
    "eval": ("ask a model the questions of a benchmark, with its visual tokens pruned", "vprune.eval.app"),
    "report": ("gather runs into leaderboard.md, leaderboard.json and index.html", "vprune.eval.report"),
    "train": (f"train a part that vprune ships: {', '.join(_RECIPES)}", _TRAINING),
    "bench": ("time kernels or a whole model", "vprune.bench.app"),
    "segment": ("turn what a model attends to into masks", "vprune.segmentation.app"),
    "tune": ("search the parameters of a method", "vprune.training.tune_app"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 some samples failed, 2 a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except VPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except BrokenPipeError:  # `vprune ... | head` has read enough; nothing more can be said, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("\ninterrupted; nothing written is lost, the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if type(error).__name__ not in _COMPOSITION_ERRORS:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except SystemExit as leaving:  # argparse, after --help or a usage error
        return leaving.code if isinstance(leaving.code, int) else DONE


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return DONE if arguments else MISTAKE
    if arguments[0] == "--version":
        print(f"vprune {__version__}")
        return DONE
    verb, rest = arguments[0], arguments[1:]
    _known("vprune", verb, _VERBS)
    if verb == "train":
        return _train(rest)
    return _run(_VERBS[verb][1], rest)


def _train(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage("vprune train", "RECIPE [key=value ...]", "recipes", _RECIPES))
        return DONE if arguments else MISTAKE
    recipe, rest = arguments[0], arguments[1:]
    _known("vprune train", recipe, _RECIPES)
    if any(word in ("-h", "--help") for word in rest):
        options = (files("vprune.conf") / "train" / f"{recipe}.yaml").read_text(encoding="utf-8")
        print(f"usage: vprune train {recipe} [key=value ...]\n\n{_RECIPES[recipe]}\n\n{options}")
        return DONE
    return _run(_TRAINING, arguments)


def _run(home: str, arguments: list[str]) -> int:
    run: Callable[[list[str]], int | None] = import_module(home).main
    return run(arguments) or DONE


def _known(command: str, word: str, known: Collection[str]) -> None:
    if word not in known:
        close = get_close_matches(word, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise VPruneError(f"{command} knows no {word!r}{hint}; there is {', '.join(known)}. Try {command} --help")


def _help() -> str:
    usage = _usage("vprune", "VERB [arguments]", "verbs", {verb: told for verb, (told, _) in _VERBS.items()})
    return (
        "vprune shortens what a vision-language model reads: visual tokens scored, selected, recycled, in generate.\n\n"
        f"{usage}\n\nvprune VERB --help tells more; vprune --version tells the version."
    )


def _usage(command: str, arguments: str, title: str, known: Mapping[str, str]) -> str:
    lines = [f"  {name:<9}{told}" for name, told in known.items()]
    return "\n".join([f"usage: {command} {arguments}", "", f"{title}:", *lines])


if __name__ == "__main__":
    sys.exit(main())
