"""What pruning the embedded model costs and brings on this machine: planning, the prefill, a one-word answer.

    PYTHONPATH=. python kernels/bench/embedded.py [--methods learned,attention_max] [--batch 1,16] [--threads 1,2]

Prompts of 576 visual tokens and a question from the shipped scenes, a tenth of the tokens kept. Pruned and unpruned
models take turns over the same weights. For each line: planning (scoring, selection, recycling, shortening), its share
of the unpruned decoder's prefill and of all the time to the unpruned model's first token; the decoder's prefill,
from its entry to its end, planning in it, and how many times faster it is; `generate` of one token, vision tower
included, and how many times faster that is. Medians in milliseconds. Threads count on a CPU alone. Writes a JSON file
with `--out`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vprune
from vprune.bench.passes import sharing
from vprune.errors import VPruneError
from vprune.eval.environment import describe
from vprune.eval.models import ModelChoice, load
from vprune.models.anatomy import dissect

SCENES = Path(vprune.__file__).parent / "assets" / "scenes"
KEEP = 0.1


def prompts(processor: Any, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The first `count` questions of the benchmark that are as long as the first, as one batch.

    Raises:
        VPruneError: there are not so many.
    """
    lines = (SCENES / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    texts: list[str] = []
    images: list[Image.Image] = []
    length = 0
    for sample in map(json.loads, lines):
        content = [{"type": "image"}, {"type": "text", "text": sample["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        tokens = len(processor.tokenizer(text).input_ids)
        length = length or tokens
        if tokens == length:
            texts.append(text)
            images.append(Image.open(SCENES / sample["image"]).convert("RGB"))
        if len(texts) == count:
            break
    if len(texts) < count:
        raise VPruneError(f"batch={count}: only {len(texts)} questions of the benchmark are as long as its first")
    return dict(processor(images=images, text=texts, return_tensors="pt").to(device))


class Timed:
    """A copy of a model over the same weights, whose decoder is timed from its entry to its end."""

    def __init__(self, model: Any) -> None:
        self.model = sharing(model)
        self.device = next(model.parameters()).device
        self.prefill = 0.0
        self.decoder = dissect(self.model).decoder

    def watch(self) -> None:
        """Time the decoder from now on, around all hooks that are on."""
        self.decoder.register_forward_pre_hook(self._enter, prepend=True)
        self.decoder.register_forward_hook(self._leave)

    def now(self) -> float:
        """The time when the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _enter(self, *_: Any) -> None:
        self._since = self.now()

    def _leave(self, *_: Any) -> None:
        self.prefill = self.now() - self._since

    @torch.no_grad()
    def answer(self, inputs: dict[str, torch.Tensor]) -> float:
        """Seconds to the first token."""
        start = self.now()
        self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return self.now() - start


def measured(model: Any, inputs: dict[str, torch.Tensor], method: str, repeats: int, graphs: bool) -> dict[str, float]:
    """Medians in milliseconds."""
    whole, pruned = Timed(model), Timed(model)
    found: dict[str, list[float]] = {name: [] for name in ("plan", "prefill", "unpruned", "answer", "unpruned_answer")}
    with vprune.prune(pruned.model, method=method, keep=KEEP, graphs=graphs) as pruning:
        for side in (whole, pruned):
            side.watch()
        for repeat in range(repeats + 3):
            taken = {"unpruned_answer": whole.answer(inputs), "answer": pruned.answer(inputs)}
            assert pruning.last is not None
            taken |= {"plan": pruning.last.seconds, "prefill": pruned.prefill, "unpruned": whole.prefill}
            if repeat >= 3:
                for name, seconds in taken.items():
                    found[name].append(1e3 * seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="learned,attention_max")
    parser.add_argument("--batch", default="1,16", help="prompts at a time")
    parser.add_argument("--threads", default=None, help="numbers of threads; as torch has it if left out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--graphs", action="store_true", help="planning as CUDA graphs")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    loaded = load(ModelChoice("embedded", device=options.device))
    rows = []
    print(
        f"{torch.__version__=} on {loaded.device}; one line: plan, its share of the unpruned prefill and of the "
        "unpruned answer; prefill, unpruned; answer, unpruned (ms)"
    )
    for threads in map(int, options.threads.split(",")) if options.threads else (torch.get_num_threads(),):
        torch.set_num_threads(threads)
        for count in map(int, options.batch.split(",")):
            inputs = prompts(loaded.processor, count, loaded.device)
            for method in options.methods.split(","):
                repeats = max(3, options.repeats // (1 if count == 1 else 3))
                one = measured(loaded.model, inputs, method, repeats, options.graphs)
                rows.append({"method": method, "batch": count, "threads": threads, **one})
                print(
                    f"{method:<14} {count} x 576, {threads} threads: plan {one['plan']:.2f}, "
                    f"{one['plan'] / one['unpruned']:.2%}, {one['plan'] / one['unpruned_answer']:.2%}; "
                    f"prefill {one['prefill']:.1f}, {one['unpruned']:.1f}, "
                    f"{one['unpruned'] / one['prefill']:.2f}x; answer {one['answer']:.1f}, "
                    f"{one['unpruned_answer']:.1f}, {one['unpruned_answer'] / one['answer']:.2f}x",
                    flush=True,
                )
    if options.out is not None:
        environment = describe(loaded.device, loaded.dtype, None)
        options.out.write_text(
            json.dumps({"rows": rows, "environment": environment}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
