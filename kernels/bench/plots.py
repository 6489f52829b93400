"""Figures and tables from measurements that were committed, each a folder as `vprune bench` writes it.

    python kernels/bench/plots.py                          # reads kernels/bench/results/*/, writes beside them
    python kernels/bench/plots.py --readme README.md       # and puts the tables between the README's marks

Writes kernels.svg (terabytes a second of every operation, against a copy), models.svg (speed-up over visual tokens,
pruned and oracle) and tables.md. Drawn by hand: a figure is some lines, and needs no package.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HOME = Path(__file__).parent / "results"
MARKS = ("<!-- bench-tables -->", "<!-- /bench-tables -->")
COLOURS = ("#1b6ca8", "#d1495b", "#2a9d6f", "#8a5fbf")
GREY, DARK = "#9aa5b1", "#22313f"
PANEL = {"prefill": "prefill of the decoder", "first_token": "first token, tower included"}

WHO = ("model", "method")
STEPS = ("end_to_end", "decode_token")

Record = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One folder: rows of bench.csv, numbers as float, and what they were measured on."""

    rows: list[Record]
    environment: Record

    @property
    def where(self) -> str:
        """The machine, in a line."""
        hardware, versions = self.environment["hardware"], self.environment["versions"]
        parts = [hardware.get("gpu") or f"CPU ({hardware['processor']})", f"PyTorch {versions['torch']}"]
        parts += [f"{name} {versions[name]}" for name in ("transformers", "triton") if name in versions]
        commit = self.environment.get("git_commit")
        return ", ".join([*parts, *([f"commit {commit[:9]}"] if commit else [])])


def read(folder: Path) -> Measured:
    """What a folder holds."""
    with (folder / "bench.csv").open(encoding="utf-8", newline="") as file:
        rows = [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]
    return Measured(rows, json.loads((folder / "bench.json").read_text(encoding="utf-8"))["environment"])


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return {"": None, "True": True, "False": False}.get(text, text)


class Canvas:
    """An SVG picture that grows line by line; sizes in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.parts = [f'<rect width="{width}" height="{height}" fill="white"/>']

    def text(self, x: float, y: float, words: str, size: int = 12, anchor: str = "start", colour: str = DARK) -> None:
        """A line of text from (x, y)."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">'
            f"{escape(words)}</text>"
        )

    def line(self, points: Iterable[tuple[float, float]], colour: str, width: float = 1, dash: str = "") -> None:
        """A line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>')

    def bar(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle."""
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}"/>')

    def dot(self, x: float, y: float, colour: str, hollow: bool) -> None:
        """A point."""
        fill = "white" if hollow else colour
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2"/>')

    def save(self, path: Path) -> None:
        """Write the file."""
        width, height = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        body = "\n".join(self.parts)
        path.write_text(f'{head} height="{height}" font-family="sans-serif">\n{body}\n</svg>\n', encoding="utf-8")


def draw_kernels(found: Sequence[Measured], path: Path) -> None:
    """Terabytes a second of every operation, of the best torch expression, and of a copy of as many bytes."""
    rows = [(one, row) for one in found for row in one.rows if row["p50_us"]]
    most = max(row["bytes"] / row[name] / 1e6 for _, row in rows for name in ("p50_us", "copy_us", "torch_us"))
    left, wide, tall = 240, 460, 46
    canvas = Canvas(left + wide + 190, 70 + tall * len(rows) + 30)
    canvas.text(16, 26, "Memory traffic that each operation needs, over the time it takes (TB/s)", 15)
    for x, (words, colour) in zip(
        (16, 130, 330), (("vprune", COLOURS[0]), ("best torch expression", GREY)), strict=False
    ):
        canvas.bar(x, 40, 12, 12, colour)
        canvas.text(x + 18, 50, words)
    canvas.line([(330, 40), (330, 52)], COLOURS[1], 3)
    canvas.text(340, 50, "copy of as many bytes")
    for number, (_, row) in enumerate(rows):
        y = 70 + tall * number
        mine, torch, copy = (row["bytes"] / row[name] / 1e6 for name in ("p50_us", "torch_us", "copy_us"))
        canvas.text(left - 10, y + 14, str(row["op"]), 13, "end")
        canvas.text(left - 10, y + 28, short(str(row["shape"])), 9, "end", GREY)
        canvas.bar(left, y, mine / most * wide, 16, COLOURS[0])
        canvas.bar(left, y + 18, torch / most * wide, 10, GREY)
        canvas.line([(left + copy / most * wide, y - 3), (left + copy / most * wide, y + 31)], COLOURS[1], 3)
        canvas.text(left + wide + 12, y + 18, f"{mine:.2f} TB/s, {mine / copy:.0%} of the copy", 11)
    canvas.text(16, canvas.size[1] - 12, places(found), 10, colour=GREY)
    canvas.save(path)


def places(found: Sequence[Measured]) -> str:
    """All machines, each once."""
    return "; ".join(dict.fromkeys(one.where for one in found))


def short(words: str, most: int = 38) -> str:
    """As much as fits."""
    return words if len(words) <= most else words[: most - 1] + "…"


def draw_models(found: Sequence[Measured], path: Path) -> None:
    """Speed-up over visual tokens at batch 1: pruned (filled) and the oracle (hollow), a colour for every budget."""
    rows = [row for one in found for row in one.rows if row["batch"] == 1 and row["kind"] == "image"]
    rows = [row for row in rows if row["measure"] in PANEL and row["pruned_speedup"] and row["oracle_speedup"]]
    # A cell that was measured twice (with other ways of decoding, say) is drawn once.
    rows = list({tuple(row[key] for key in (*WHO, "measure", "keep", "tokens")): row for row in rows[::-1]}.values())
    models = sorted({tuple(row[key] for key in WHO) for row in rows})
    panels = [name for name in PANEL if _of(rows, measure=name)]
    wide, tall, gap = 330, 230, 70
    canvas = Canvas(gap + (wide + gap) * len(panels), 70 + (tall + gap + 10) * len(models) + 20)
    canvas.text(16, 26, "Speed-up over the unpruned model, batch 1", 15)
    keeps = sorted({row["keep"] for row in rows})
    x = 16.0
    for number, keep in enumerate(keeps):
        canvas.line([(x, 46), (x + 24, 46)], COLOURS[number % 4], 2)
        canvas.text(x + 30, 50, f"{keep:.0%} kept")
        x += 110
    canvas.dot(x + 8, 46, DARK, False)
    canvas.text(x + 18, 50, "pruned")
    canvas.dot(x + 88, 46, DARK, True)
    canvas.text(x + 98, 50, "oracle: that short from the start")
    for line, (model, method) in enumerate(models):
        for column, measure in enumerate(panels):
            here = _of(rows, model=model, method=method, measure=measure)
            if here:
                corner = (gap + (wide + gap) * column, 90 + (tall + gap + 10) * line)
                _panel(canvas, corner, (wide, tall), here, keeps, f"{model}, {method}: {PANEL[measure]}")
    canvas.text(16, canvas.size[1] - 12, places(found), 10, colour=GREY)
    canvas.save(path)


def _of(rows: Sequence[Record], **wanted: Any) -> list[Record]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _panel(
    canvas: Canvas,
    corner: tuple[float, float],
    size: tuple[float, float],
    rows: Sequence[Record],
    keeps: Sequence[float],
    title: str,
) -> None:
    (left, top), (wide, tall) = corner, size
    tokens = sorted({row["tokens"] for row in rows})
    low, high = math.log(tokens[0]) - 0.3, math.log(tokens[-1]) + 0.3
    most = max(1.0, *(row[f"{side}_speedup"] for row in rows for side in ("pruned", "oracle"))) * 1.1

    def at(row: Record, side: str) -> tuple[float, float]:
        along = (math.log(row["tokens"]) - low) / (high - low)
        return left + along * wide, top + tall - row[f"{side}_speedup"] / most * tall

    canvas.text(left, top - 8, title, 12)
    step = max(1, round(most / 6))
    for level in range(0, math.floor(most) + 1, step):
        y = top + tall - level / most * tall
        canvas.line([(left, y), (left + wide, y)], "#e3e8ee")
        canvas.text(left - 8, y + 4, f"{level}x", 11, "end")
    for count in tokens:
        x = left + (math.log(count) - low) / (high - low) * wide
        canvas.text(x, top + tall + 18, f"{count:,.0f}", 11, "middle")
    canvas.text(left + wide / 2, top + tall + 36, "visual tokens", 11, "middle")
    for number, keep in enumerate(keeps):
        line = sorted(_of(rows, keep=keep), key=lambda row: float(row["tokens"]))
        colour = COLOURS[number % 4]
        for side, dash in (("oracle", "5 4"), ("pruned", "")):
            points = [at(row, side) for row in line]
            canvas.line(points, colour, 2, dash)
            for x, y in points:
                canvas.dot(x, y, colour, side == "oracle")


def tables(
    kernels: Sequence[Measured],
    models: Sequence[Measured],
    segmented: Sequence[Measured] = (),
    automatic: Sequence[Measured] = (),
    whole: bool = True,
) -> str:
    """Markdown: every operation, every measure that has a bound, the stages of a segmentation, and its rival.

    `whole`: with prefills that no bound was set for, with answers decoded eagerly, whose steps wait for the host, and
    with what every cell stores, which is the same share everywhere.
    """
    parts = []
    for one in kernels:
        head = f"Operations, {one.where}; above 1 they are faster than the copy, or than torch:"
        lines = [head, "", "| operation | µs | TB/s | of the copy | best torch | faster |"]
        lines += ["|---|---:|---:|---:|---|---:|"]
        for row in one.rows:
            if row["p50_us"]:
                lines.append(
                    f"| `{row['op']}` {row['shape']} | {row['p50_us']:.1f} | {row['tb_per_s']:.2f} | "
                    f"{1 / row['to_copy']:.2f} | {row['torch']} | {1 / row['to_torch']:.1f}x |"
                )
        parts.append("\n".join(lines))
    for one in models:
        rows = [row for row in one.rows if row["bound"] or (whole and row["measure"] == "prefill")]
        rows = [row for row in rows if whole or row["decode"] != "eager" or row["measure"] not in STEPS]
        if not whole:
            stored = [row for row in rows if row["measure"] == "kv_visual"]
            rows = [row for row in rows if row not in stored[1:]]
        if all(row["measure"] == "kv_visual" for row in rows):
            continue
        name, method, decode = (one.rows[0][key] for key in ("model", "method", "decode"))
        way = "" if decode == "eager" else f", decoding {'compiled' if decode == 'compiled' else 'as CUDA graphs'}"
        lines = [f"{name}, `{method}`{way}, {one.where}; above 1x is faster (or smaller) than the unpruned model:", ""]
        lines += [
            "| | samples x visual tokens | kept | unpruned | pruned | speed-up | oracle | of the oracle | asked |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---|"]
        lines += [model_line(row) for row in rows if row["pruned"] is not None]
        parts.append("\n".join(lines))
    parts += ["\n".join(stage_lines(one)) for one in segmented]
    parts += ["\n".join(rival_lines(one)) for one in automatic]
    return "\n\n".join(parts) + "\n"


def stage_lines(one: Measured) -> list[str]:
    """The stages of a segmentation side by side, a line for the whole image and one with crops."""
    cells: dict[bool, dict[str, Record]] = {}
    for row in one.rows:
        if row["p50"] is not None:
            cells.setdefault(row["crops"], {})[row["stage"]] = row
    stages = list(dict.fromkeys(stage for cell in cells.values() for stage in cell))
    first = one.rows[0]
    lines = [f"`vprune segment`, {first['model']} model, {first['segmenter']} SAM, {one.where}; seconds an image:", ""]
    lines += ["| | prompts | " + " | ".join(stages) + " |", "|---|" + "---:|" * (len(stages) + 1)]
    for crops, cell in cells.items():
        row = next(iter(cell.values()))
        prompts = "as it finds" if row["prompts"] is None else f"{row['prompts']:.0f}"
        numbers = [f"{cell[stage]['p50']:.3f}" if stage in cell else "" for stage in stages]
        lines.append(f"| {'with crops' if crops else 'whole image'} | {prompts} | " + " | ".join(numbers) + " |")
    return lines


def rival_lines(one: Measured) -> list[str]:
    """The prompted masks and those of the automatic mask generator."""
    options, images = one.environment["options"], one.rows[0]["images"]
    grid = f"{options['points']} x {options['points']} points, predicted IoU >= {options['pred_iou']:g}"
    head = f"The same {options['segmenter']} SAM, prompted by attention and by its automatic mask generator ({grid}, "
    head += f"stability >= {options['stability']:g}), {images:.0f} scenes, {one.where}:"
    lines = [head, "", "| | AR@100 | AP50 | masks | s an image | faster | SAM alone | faster |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in one.rows:
        ar, ap50 = ("-" if row[key] is None else f"{row[key]:.3f}" for key in ("ar100", "ap50"))
        own = row["side"] == "automatic"
        faster, alone = ("", "") if own else (f"{row['times']:.1f}x", f"{row['sam_times']:.1f}x")
        lines.append(
            f"| {row['side']} | {ar} | {ap50} | {row['masks']:.1f} | {row['seconds']:.2f} | {faster} | "
            f"{row['sam_seconds']:.2f} | {alone} |"
        )
    return lines


def model_line(row: Record) -> str:
    """One measure of one cell."""
    name = str(row["measure"]).replace("_", " ")
    if row["new_tokens"]:
        name += f", {row['new_tokens']:.0f} new"
    if row["kind"] == "video":
        name += " of a video"
    scale, unit = (2**20, "MiB") if row["unit"] == "bytes" else (1, "ms")
    lacking = "does not fit" if str(row["problem"]).endswith("unpruned") else "-"
    before = f"{row['unpruned'] / scale:.1f} {unit}" if row["unpruned"] is not None else lacking
    faster, ideal, quotient = (
        f"{row[key]:.2f}x" if row[key] is not None else "-" for key in ("pruned_speedup", "oracle_speedup", "quotient")
    )
    if row["measure"] == "plan":
        faster, ideal, quotient = f"{row['share']:.2%} of the prefill", "-", "-"
    elif row["quotient"] is not None:
        paired = [row.get(f"quotient_{quantile}") for quantile in ("p25", "p50", "p75")]  # (older files lack p50)
        quotient = f"{row['quotient']:.3f} [{' '.join(f'{one:.3f}' for one in paired if one is not None)}]"
    mark = {True: " ✓", False: " ✗", None: ", not known"}[row["met"]]
    asked = str(row["bound"]).replace("_", " ") + mark if row["bound"] else ""
    return (
        f"| {name} | {row['batch']:.0f} x {row['tokens']:,.0f} | {row['keep']:.0%} | {before} | "
        f"{row['pruned'] / scale:.1f} {unit} | {faster} | {ideal} | {quotient} | {asked} |"
    )


def put_between_marks(text: str, put: str) -> str:
    """A README with other tables between its marks.

    Raises:
        SystemExit: it has no marks.
    """
    first, last = (text.find(mark) for mark in MARKS)
    if not 0 <= first < last:
        raise SystemExit(f"the README has no place for the tables: a line {MARKS[0]}, and after it one {MARKS[1]}")
    return f"{text[: first + len(MARKS[0])]}\n{put}{text[last:]}"


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=HOME, help="the folder of folders with bench.csv and bench.json"
    )
    parser.add_argument("--readme", type=Path, help="a file with the marks between which the tables go")
    options = parser.parse_args()
    found = [read(path.parent) for path in sorted(options.results.glob("*/bench.csv"))]
    kernels = [one for one in found if one.rows and "op" in one.rows[0]]
    models = [one for one in found if one.rows and "measure" in one.rows[0]]
    models.sort(key=lambda one: one.rows[0]["decode"] != "eager")  # prefills first
    segmented = [one for one in found if one.rows and "stage" in one.rows[0]]
    automatic = [one for one in found if one.rows and "side" in one.rows[0]]
    if not (kernels or models or segmented or automatic):
        parser.error(f"{options.results} holds no measurements: run `vprune bench` with out={options.results}/NAME")
    if kernels:
        draw_kernels(kernels, options.results / "kernels.svg")
    if models:
        draw_models(models, options.results / "models.svg")
    text = tables(kernels, models, segmented, automatic)
    (options.results / "tables.md").write_text(text, encoding="utf-8")
    if options.readme is not None:
        asked = [one for one in models if one.rows[0]["model"] == "onevision-7b"]
        asked_for = tables(kernels, asked, segmented, automatic, whole=False)
        readme = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(put_between_marks(readme, asked_for), encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
