"""Questions with the model's own answers behind them, as its decoder is about to read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vprune.attach import prune
from vprune.errors import VPruneError
from vprune.models.anatomy import dissect
from vprune.pruner import Pruner
from vprune.records import Prefill


@dataclass(frozen=True)
class Answered:
    """A batch of questions and answers in one left-padded sequence.

    `inputs` as the model's forward takes them; `answer` bool [B, L], the tokens of the answers; `begins` LongTensor
    [B], the column of the first of them. Each image stands there `repeats` times in a row: it need be seen only once.
    """

    inputs: dict[str, Tensor]
    answer: Tensor
    repeats: int = 1

    @property
    def begins(self) -> Tensor:
        """The column at which each answer begins."""
        return self.answer.int().argmax(-1)

    def __len__(self) -> int:
        return int(self.answer.shape[0])


_LOADERS: list[Any] = []
"""Loaders with workers, kept until the process ends. Let go of earlier, each worker is waited for, 5 seconds on a GPU's
host, in the midst of the training; and workers that were forked later complain of those."""


class _Reached(Exception):  # noqa: N818 - a signal that is always caught, no error
    def __init__(self, prefill: Prefill) -> None:
        super().__init__("a prompt was read and not used")
        self.prefill = prefill


class _Reader(Pruner):
    """A method that prunes nothing: it tells what it was shown, and the model goes no further."""

    @property
    def keeps_all(self) -> bool:
        return False  # it wants to be shown the prompt before the decoder runs

    def score(self, prefill: Prefill) -> NoReturn:
        raise _Reached(prefill)


def read_prompt(model: Any, inputs: dict[str, Tensor], repeats: int = 1) -> Prefill:
    """What the decoder would read for `inputs`; its layers do not run.

    `repeats`: how often each image stands in a row, for towers that take images one by one.

    Raises:
        VPruneError: there is no image in it, or the model is no vision-language model.
    """
    with torch.no_grad(), prune(model, _Reader(keep=1.0, name="reader")), _seen_once(model, repeats):
        try:
            model(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.prefill
    raise VPruneError("these inputs hold no image: a scorer is trained on questions about images")


@contextmanager
def _seen_once(model: Any, repeats: int) -> Iterator[None]:
    """Have the vision tower run over every `repeats`-th image, and repeat what it made of them."""
    tower = dissect(model).tower
    if repeats == 1 or tower is None:
        yield
        return

    def fewer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "pixel_values" in kwargs:
            return args, {**kwargs, "pixel_values": kwargs["pixel_values"][::repeats]}
        return (args[0][::repeats], *args[1:]), kwargs

    def more(module: nn.Module, args: Any, output: Any) -> None:
        for name, value in output.items():
            if isinstance(value, Tensor):
                output[name] = value.repeat_interleave(repeats, 0)
            elif isinstance(value, tuple):
                output[name] = tuple(None if part is None else part.repeat_interleave(repeats, 0) for part in value)

    handles = [tower.register_forward_pre_hook(fewer, with_kwargs=True), tower.register_forward_hook(more)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_untrainable(prefill: Prefill) -> None:
    """Refuse models that no scorer can be trained for: neither effect nor relevance can be followed through them.

    Raises:
        VPruneError: the model adds features between its layers, or some of its layers look back a limited way.
    """
    anatomy = prefill.anatomy
    if prefill.deepstack or anatomy.has_windows:
        layers = len(anatomy.layers)
        windows = sum(anatomy.window_of(layer) is not None for layer in range(layers))
        raise VPruneError(
            f"{type(anatomy.base).__name__} adds features after {prefill.deepstack} of its {layers} layers, and "
            f"{windows} of them look back a limited way: no scorer can be trained for it yet; choose a method that "
            "needs no training, such as attention_max or vision"
        )


def with_answers(inputs: dict[str, Tensor], answers: Sequence[Sequence[int]], pad: int) -> Answered:
    """Put answers (token ids) behind left-padded prompts, and pad on the left again.

    `inputs` as a processor makes them: `input_ids` and `attention_mask` [B, L], and whatever else belongs to them.
    """
    longest = max(map(len, answers))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    batch, length = ids.shape
    joined = ids.new_full((batch, length + longest), pad)
    seen, answer = torch.zeros_like(joined), torch.zeros_like(joined, dtype=torch.bool)
    # What a processor tells of every token beside its id: an answer is text, which is 0 in all of them.
    kinds = {key: value for key, value in inputs.items() if key.endswith("token_type_ids")}
    typed = {key: torch.zeros_like(joined) for key in kinds}
    for row, words in enumerate(answers):
        prompt = slice(longest - len(words), joined.shape[1] - len(words))
        joined[row, prompt], seen[row, prompt] = ids[row], mask[row]
        for key, value in kinds.items():
            typed[key][row, prompt] = value[row]
        joined[row, prompt.stop :] = torch.tensor(words, dtype=ids.dtype)
        seen[row, prompt.stop :], answer[row, prompt.stop :] = 1, True
    rest = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    return Answered({**rest, **typed, "input_ids": joined, "attention_mask": seen}, answer)


class Painted:
    """An endless stream of questions about scenes that are painted on the fly, with the answers that are true.

    Draws the same batches for the same seed.

    Args:
        seed: of the world. batch_size: questions a batch; `questions` of them about each scene.
        photographs: the set of backgrounds, "train" or "test".
        device: where to paint.
        workers: processes that draw scenes. skip: batches to leave out.
        weights: how often each kind is asked, in the order of KINDS; None = all alike.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        photographs: str,
        device: torch.device,
        questions: int = 1,
        workers: int = 0,
        skip: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        from vprune.eval.scenes.render import Painter, photograph_names

        self.painter = Painter(photographs, device)
        self.device, self.workers = device, workers
        self._stream = _Drawn(seed, batch_size, questions, len(photograph_names(photographs)), skip, weights)

    def __iter__(self) -> Iterator[Answered]:
        from torch.utils.data import DataLoader

        loader: Any = DataLoader(
            self._stream, batch_size=None, num_workers=self.workers, prefetch_factor=4 if self.workers else None
        )
        drawn = iter(loader)
        if self.workers:
            _LOADERS.append(drawn)
        if self.device.type == "cpu":
            while True:
                yield self._painted(next(drawn))
        # Painting is many small kernels: a thread launches the next batch's while the loss of this one goes backward.
        pool = ThreadPoolExecutor(1, thread_name_prefix="vprune-paint")
        try:
            ahead = pool.submit(lambda: self._painted(next(drawn)))
            while True:
                painted = ahead.result()
                ahead = pool.submit(lambda: self._painted(next(drawn)))
                yield painted
        finally:  # (whoever lets go of the batches last may be the thread itself, which cannot wait for its own end)
            pool.shutdown(wait=False, cancel_futures=True)

    def _painted(self, drawn: tuple[Any, int, Tensor, Tensor, Tensor]) -> Answered:
        scenes, repeats, ids, mask, answer = drawn
        images, _ = self.painter.render(scenes.to(self.device))
        pixels = (images.float() / 127.5 - 1).repeat_interleave(repeats, 0)
        inputs = {"input_ids": ids, "attention_mask": mask}
        moved = {key: value.to(self.device, non_blocking=True) for key, value in inputs.items()}
        return Answered({**moved, "pixel_values": pixels}, answer.to(self.device), repeats)


class _Drawn(torch.utils.data.IterableDataset[Any]):
    """The scenes and the token ids of `Painted`, drawn on the CPU; workers take turns."""

    def __init__(
        self, seed: int, batch_size: int, questions: int, photographs: int, skip: int, weights: Sequence[float] | None
    ) -> None:
        self.seed, self.batch_size, self.questions, self.photographs = seed, batch_size, questions, photographs
        self.skip, self.weights = skip, weights

    def __iter__(self) -> Iterator[tuple[Any, int, Tensor, Tensor, Tensor]]:
        from torch.utils.data import get_worker_info

        from vprune.eval.scenes import layout, questions
        from vprune.eval.scenes.render import pack
        from vprune.eval.scenes.world import GRID, KINDS
        from vprune.training.architecture import ASSISTANT, END, IMAGE, PAD, USER
        from vprune.training.packing import Vocabulary

        vocabulary = Vocabulary()
        worker = get_worker_info()
        turn, step = (worker.id, worker.num_workers) if worker else (0, 1)
        turn += self.skip
        each = self.batch_size // self.questions
        while True:
            scenes, prompts, answers = [], [], []
            for index in range(turn * each, (turn + 1) * each):
                rng = layout.stream(self.seed, index)
                scene = layout.sample_scene(rng, self.photographs)
                scenes.append(scene)
                for _ in range(self.questions):
                    question = None
                    while question is None:  # (a kind that the scene allows no question of gives way to another)
                        question = questions.ask(rng.choices(KINDS, self.weights)[0], scene, rng)
                    text = vocabulary.encode(question.question)
                    prompts.append([USER, *[IMAGE] * GRID**2, *text, ASSISTANT])
                    answers.append([*vocabulary.encode(question.answer), END])
            longest = max(map(len, prompts))
            padded = [[PAD] * (longest - len(one)) + one for one in prompts]
            seen = [[0] * (longest - len(one)) + [1] * len(one) for one in prompts]
            inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(seen)}
            batch = with_answers(inputs, answers, PAD)
            yield pack(scenes), self.questions, batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.answer
            turn += step
