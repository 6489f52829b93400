"""The command `vprune`: one verb a job, mistakes told in a line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.resources import files

from vprune import __version__
from vprune.errors import VPruneError

DONE, SOME_FAILED, MISTAKE = 0, 1, 2
_INTERRUPTED = 130
# What Hydra raises about overrides; by name, because importing Hydra would slow `vprune --help` down.
_COMPOSITION_ERRORS = ("ConfigCompositionException", "MissingConfigException", "OverrideParseException")

# verb -> (what it does, where its main lives; None: not built yet)
_VERBS: dict[str, tuple[str, str | None]] = {
    "eval": ("ask a model the questions of a benchmark, with its visual tokens pruned", "vprune.eval.app"),
    "report": ("gather runs into leaderboard.md, leaderboard.json and index.html", "vprune.eval.report"),
    "train": ("train a part that vprune ships: vlm, scorer, clip, sam", None),
    "bench": ("time kernels or a whole model", "vprune.bench.app"),
    "segment": ("turn what a model attends to into masks", "vprune.segmentation.app"),
    "tune": ("search the parameters of a method", "vprune.training.tune_app"),
}
_RECIPES: dict[str, tuple[str, str | None]] = {
    "vlm": ("the embedded vision-language model, from scratch", "vprune.training.cli"),
    "scorer": ("the network that learns which tokens matter", "vprune.training.cli"),
    "clip": ("the embedded CLIP, which names crops and compares words", "vprune.training.cli"),
    "sam": ("the embedded SAM, which draws masks from points, boxes and masks", "vprune.training.cli"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 some samples failed, 2 a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except VPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
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
    if verb == "train":
        return _train(rest)
    return _find("vprune", verb, _VERBS, rest)


def _train(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage("vprune train", "RECIPE [key=value ...]", "recipes", _RECIPES))
        return DONE if arguments else MISTAKE
    recipe, rest = arguments[0], arguments[1:]
    if recipe in _RECIPES and _RECIPES[recipe][1] and any(word in ("-h", "--help") for word in rest):
        print(_recipe_help(recipe))
        return DONE
    return _find("vprune train", recipe, _RECIPES, rest, passed=arguments)


def _recipe_help(recipe: str) -> str:
    options = (files("vprune.conf") / "train" / f"{recipe}.yaml").read_text(encoding="utf-8")
    return f"usage: vprune train {recipe} [key=value ...]\n\n{_RECIPES[recipe][0]}\n\n{options}"


def _find(
    command: str,
    word: str,
    known: dict[str, tuple[str, str | None]],
    rest: list[str],
    passed: list[str] | None = None,
) -> int:
    if word not in known:
        close = get_close_matches(word, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise VPruneError(f"{command} knows no {word!r}{hint}; there is {', '.join(known)}. Try {command} --help")
    summary, home = known[word]
    if home is None:
        asked_for_help = any(word in ("-h", "--help") for word in rest)
        if asked_for_help:
            print(f"{command} {word}: {summary} (not built yet)")
            return DONE
        raise VPruneError(
            f"{command} {word} is not built yet in vprune {__version__}; see {command} --help for what is"
        )
    try:
        run: Callable[[list[str]], int | None] = import_module(home).main
    except ModuleNotFoundError as error:
        if error.name is None or not home.startswith(error.name):
            raise
        raise VPruneError(f"{command} {word} is not built yet in vprune {__version__}") from error
    return run(rest if passed is None else passed) or DONE


def _help() -> str:
    usage = _usage("vprune", "VERB [arguments]", "verbs", _VERBS)
    return (
        "vprune shortens what a vision-language model reads: visual tokens scored, selected, recycled, in generate.\n\n"
        f"{usage}\n\nvprune VERB --help tells more; vprune --version tells the version."
    )


def _usage(command: str, arguments: str, title: str, known: dict[str, tuple[str, str | None]]) -> str:
    unbuilt = {name for name, (_, home) in known.items() if home is None and name != "train"}
    lines = [
        f"  {name:<9}{summary}{' (not built yet)' if name in unbuilt else ''}" for name, (summary, _) in known.items()
    ]
    return "\n".join([f"usage: {command} {arguments}", "", f"{title}:", *lines])


if __name__ == "__main__":
    sys.exit(main())
