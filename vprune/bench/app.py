"""The command `vprune bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from vprune.bench.results import DEVICES, options_text, read_words, write
from vprune.errors import VPruneError

DONE, SOME_FAILED, MISTAKE = 0, 1, 2

# what is timed -> (a sentence, where its main lives)
SUBJECTS: dict[str, tuple[str, str]] = {
    "kernels": (
        "every operation of vprune.kernels, against plain torch and the copy of as many bytes",
        "vprune.bench.app",
    ),
    "model": ("a whole model, pruned, unpruned, and as short as the pruned one from the start", "vprune.bench.model"),
    "segment": ("every stage of `vprune segment`", "vprune.bench.segment"),
    "automatic": ("masks prompted by attention against SAM's automatic mask generator", "vprune.bench.automatic"),
}
_USAGE = """\
usage: vprune bench SUBJECT [key=value ...]

subjects:
{subjects}

options of `vprune bench kernels`:
{kernels}

On a CUDA device the operations run at the sizes of 7B models (about 40 GiB of its memory), inputs taking turns so that
no cache flatters the numbers. On a CPU the torch references are timed, at tiny sizes: a trial of the bench, not of the
kernels. An operation whose result is not that of its reference is named and not timed.

options of `vprune bench model`:
{model}

Architectures are true and at full size on a CUDA device, their weights random: nothing is downloaded. All three sides,
the pruned model, the unpruned one and the oracle (as many tokens from the start as pruning leaves, nothing hooked),
share their weights and take turns. A prefill is timed from the decoder's entry, the device idle, to the first token,
the hooks before it added; an answer around `generate`, vision tower included. What does not fit into memory is named.

options of `vprune bench segment`:
{segment}

The embedded models look at scenes of the shipped split. Of any other model the architecture is true and the weights are
random, and so are SAM's; they find nothing sensible, so the picture, the length of the answer, the number of words that
maps are made of and where those maps point are given, and what each stage takes is measured.

options of `vprune bench automatic`:
{automatic}

Both sides have the same SAM and see the same images, in turns; accuracy is that of benchmark=scenes_segment. With its
defaults the generator drops whatever its SAM is not sure of: pred_iou=0 stability=0 keeps it.

exit codes: 0 done, 1 a check failed, 2 a mistake in the command"""


@dataclass(frozen=True)
class Options:
    """What `vprune bench kernels` is asked to do; None = by what the machine has."""

    out: str = "runs/bench"
    ops: str = "all"
    device: str | None = None
    size: str | None = None
    dtype: str = "bfloat16"
    backend: str = "auto"
    compile: str | None = None
    repeats: int = 50
    commit: str | None = None


OPERATIONS = ("column_mass", "compact", "compact_batch", "compact_kv", "modulate", "recycle", "rotate", "select")
_MEANINGS = {
    "out": "the folder for bench.csv and bench.json",
    "ops": f"all, or some of {','.join(OPERATIONS)}",
    "device": "cuda where there is one",
    "size": "full on cuda",
    "dtype": "of the inputs",
    "backend": "one asked for by name never falls back",
    "compile": "also time torch.compile of the torch expression; true on cuda",
    "repeats": "how often every call is timed",
    "commit": "what to record in place of what git says of the source",
}
_CHOICES = {**DEVICES, "backend": ("auto", "triton", "torch"), "compile": ("true", "false")}


@dataclass(frozen=True)
class Row:
    """A line of bench.csv. Times are microseconds.

    `to_copy`, `to_torch`, `to_compiled` are shares, the operation's median of another's, as they always were in this
    file; whatever is printed or drawn tells their inverse, how many times faster the operation is.
    """

    op: str
    shape: str
    dtype: str
    backend: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    timed_as: str | None = None
    launched_us: float | None = None
    bytes: int | None = None
    tb_per_s: float | None = None
    tflop_per_s: float | None = None
    copy_us: float | None = None
    to_copy: float | None = None
    torch: str | None = None
    torch_us: float | None = None
    torch_timed_as: str | None = None
    to_torch: float | None = None
    compiled_us: float | None = None
    to_compiled: float | None = None
    problem: str | None = None


def main(argv: Sequence[str]) -> int:
    """Run `vprune bench` with these arguments and return its exit code; VPruneError for a user's mistake."""
    asked = [word for word in argv if word not in ("-h", "--help")]
    if not asked:
        print(help_text())
        return DONE if len(argv) > len(asked) else MISTAKE
    subject, rest = asked[0], asked[1:]
    if subject not in SUBJECTS:
        raise VPruneError(f"vprune bench knows no {subject!r}; there is {', '.join(SUBJECTS)}. Try vprune bench --help")
    if len(argv) > len(asked):
        print(help_text())
        return DONE
    if subject == "kernels":
        return bench_kernels(read_options(rest))
    code: int = import_module(SUBJECTS[subject][1]).main(rest)
    return code


def help_text() -> str:
    """The subjects, and every option with its default and meaning."""
    subjects = [f"  {name:<10}{text}" for name, (text, _) in SUBJECTS.items()]
    kernels = options_text(Options, _MEANINGS, _CHOICES)
    others = {name: import_module(SUBJECTS[name][1]).help_text() for name in SUBJECTS if name != "kernels"}
    return _USAGE.format(subjects="\n".join(subjects), kernels=kernels, **others)


def read_options(words: Sequence[str]) -> Options:
    """Options from key=value.

    Raises:
        VPruneError: a word is no key=value, a key is unknown, or a value is none of those allowed.
    """
    return Options(**read_words("kernels", words, _MEANINGS, _CHOICES, ("repeats",)))


def bench_kernels(options: Options) -> int:
    """Time the operations, print a table, write bench.csv and bench.json; 1 if one failed its check."""
    import torch

    from vprune.bench.kernels import SIZES, Maker
    from vprune.bench.measuring import measured
    from vprune.eval.environment import describe

    ops = OPERATIONS if options.ops == "all" else tuple(options.ops.split(","))
    unknown = [op for op in ops if op not in OPERATIONS]
    if unknown:
        raise VPruneError(f"ops={options.ops}: there is no {unknown[0]!r}; choose some of {', '.join(OPERATIONS)}")
    on_cuda = torch.cuda.is_available()
    device = torch.device(options.device or ("cuda" if on_cuda else "cpu"))
    if device.type == "cuda" and not on_cuda:
        raise VPruneError("device=cuda: torch sees no CUDA device here; leave device out to try the bench on the CPU")
    size = options.size or ("full" if device.type == "cuda" else "tiny")
    if device.type == "cpu":
        chosen = "torch" if options.backend == "auto" else options.backend
        print(f"no CUDA device is used: this times the {chosen} backend on the CPU, at {size} sizes")
    compiling = device.type == "cuda" if options.compile is None else options.compile == "true"
    dtype = getattr(torch, options.dtype)
    maker = Maker(SIZES[size], device, dtype, options.backend)
    rows = []
    print("x the copy, x torch: the other's time over the operation's; above 1x the operation is the faster one")
    for op in ops:
        for case in maker.cases(op):
            rows.append(measured(case, device, options, compiling))
            print(line_of(rows[-1]), flush=True)
    environment = describe(device, options.dtype, None)
    environment["git_commit"] = options.commit or environment["git_commit"]
    folder = Path(options.out)
    write(folder, Row, rows, environment | {"options": asdict(options) | {"device": str(device), "size": size}})
    print(f"wrote {folder / 'bench.csv'} and {folder / 'bench.json'}")
    return SOME_FAILED if any(row.problem for row in rows) else DONE


def line_of(row: Row) -> str:
    """A line of the printed table; `to_...` upside down, so that more is faster everywhere."""
    head = f"{row.op:<14}{row.shape}"
    if row.p50_us is None:
        return f"{head}\n    NOT TIMED: {row.problem}"
    parts = [f"{row.p50_us:.1f} us ({row.p20_us:.1f}-{row.p80_us:.1f}, launched {row.launched_us:.1f})"]
    parts += [f"{row.tb_per_s:.2f} TB/s", f"{_faster(row.to_copy)} the copy"]
    if row.tflop_per_s:
        parts.append(f"{row.tflop_per_s:.0f} TFLOP/s")
    parts.append(f"{_faster(row.to_torch)} torch ({row.torch}, {row.torch_us:.1f} us)")
    if row.to_compiled is not None:
        parts.append(f"{_faster(row.to_compiled)} torch.compile of it")
    if row.problem:
        parts.append(row.problem)
    return f"{head}\n    " + ", ".join(parts)


def _faster(share: float | None) -> str:
    """How many times faster an operation is that takes a share of another's time."""
    assert share is not None, "a row that was timed has all of its shares"
    return f"{1 / share:.2f}x"
