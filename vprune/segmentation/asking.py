"""What a model says of the views of a picture, and where it looks for it: names or a phrase -> maps over the views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vprune.attach import prune
from vprune.eval.models import visual_token_ids
from vprune.pruner import Pruner
from vprune.segmentation.marked import with_marked
from vprune.segmentation.prompting import Candidate
from vprune.segmentation.reading import Reading, read
from vprune.segmentation.recipe import Recipe
from vprune.segmentation.stages import Stages
from vprune.segmentation.words import TokenText, names_in, plain, refuse_unsayable, unaligned

_AT_ONCE = 8  # prompts answered in one batch


class Respondent:
    """A model that is asked about the views of one picture.

    `tokens` tells for each view asked about how many visual tokens it has, and how many of them the layers read.
    """

    def __init__(
        self, model: Any, processor: Any, recipe: Recipe, method: Pruner | None, stages: Stages | None = None
    ) -> None:
        self.model, self.processor, self.recipe, self.method = model, processor, recipe, method
        self.stages = stages if stages is not None else Stages(model.device)
        self.tokens: dict[int, tuple[int, int]] = {}

    def listed(self, views: Sequence[Image.Image]) -> list[Candidate]:
        """A map for everything that the model says it sees; the questions about all views go in batches."""
        asked = [(view, question) for view in range(len(views)) for question in self.recipe.questions]
        found = []
        for start in range(0, len(asked), _AT_ONCE):
            part = asked[start : start + _AT_ONCE]
            with self.stages.timed("answer"):
                answers = self._answers(views, part)
            with self.stages.timed("maps"):
                for (view, question), answer in zip(part, answers, strict=True):
                    found += self._named(view, views[view], question, answer)
        return found

    def referred(self, views: Sequence[Image.Image], phrase: str) -> list[Candidate]:
        """A map for a phrase in every view.

        Raises:
            VPruneError: it names nothing, or nothing that the tokenizer can say.
        """
        refuse_unsayable(phrase, self.processor.tokenizer)
        wanted, found = plain(phrase), []
        for number, view in enumerate(views):
            inputs = self._inputs([view], [self.recipe.refer.format(phrase=wanted)])
            text, ids = self._text(inputs)
            at = text.find(wanted, last=True)
            if at is None:
                raise unaligned(phrase)
            rows = self._rows(text, wanted, at[0]) + ([len(ids) - 1] if self.recipe.final else [])
            with self.stages.timed("maps"):
                (heat,) = self._heats(number, view, inputs, [rows])
            found.append(Candidate(number, wanted, heat))
        return found

    # -- what is said -----------------------------------------------------------------------------------------------

    def _inputs(self, views: Sequence[Image.Image], questions: Sequence[str]) -> Any:
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        # (A single prompt needs no pad token, which some tokenizers lack.)
        padding = {"padding": True, "padding_side": "left"} if len(texts) > 1 else {}
        inputs = self.processor(images=list(views), text=texts, return_tensors="pt", **padding)
        return inputs.to(self.model.device, dtype=self.model.dtype)

    @torch.no_grad()
    def _answers(self, views: Sequence[Image.Image], asked: Sequence[tuple[int, str]]) -> list[Tensor]:
        """The ids of what the model answers to each question about a view, up to the first that ends it."""
        inputs = self._inputs([views[view] for view, _ in asked], [question for _, question in asked])
        attached: AbstractContextManager[Any] = nullcontext() if self.method is None else prune(self.model, self.method)
        with attached as pruning:
            said = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.recipe.max_new_tokens,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        ids = inputs["input_ids"]
        visual = torch.tensor(visual_token_ids(self.model), device=ids.device)
        for row, (view, _) in enumerate(asked):
            whole = int(torch.isin(ids[row], visual).sum())
            left = whole if pruning is None else sum(one.tokens_after for one in pruning.last if one.sample == row)
            self.tokens[view] = (whole, left)
        ends = self.model.generation_config.eos_token_id
        known = torch.tensor([] if ends is None else ends, device=said.device).flatten()
        return [_until_end(row, known) for row in said[:, ids.shape[1] :]]

    def _named(self, number: int, view: Image.Image, question: str, answer: Tensor) -> list[Candidate]:
        tokenizer = self.processor.tokenizer
        names = names_in(tokenizer.decode(answer, skip_special_tokens=True))
        if not names:
            return []
        inputs = self._inputs([view], [question])
        length = inputs["input_ids"].shape[1]
        whole = with_answer(inputs, answer[None])
        text = TokenText.of(tokenizer, whole["input_ids"][0].tolist(), length)
        groups, kept, after = [], [], 0
        for name in names:
            at = text.find(name, after)
            if at is not None:
                after = at[1]
                groups.append(self._rows(text, name, at[0]))
                kept.append(name)
        heats = self._heats(number, view, whole, groups)
        return [Candidate(number, name, heat) for name, heat in zip(kept, heats, strict=True)]

    def _text(self, inputs: Any) -> tuple[TokenText, list[int]]:
        ids = inputs["input_ids"][0].tolist()
        images = {getattr(self.model.config, key, None) for key in ("image_token_id", "video_token_id")}
        last = max((place for place, one in enumerate(ids) if one in images), default=-1)
        return TokenText.of(self.processor.tokenizer, ids, last + 1), ids

    def _rows(self, text: TokenText, name: str, places: list[int]) -> list[int]:
        if self.recipe.rows == "all":
            return places
        content = text.content(name, places)
        return content[-1:] if self.recipe.rows == "last" else content

    # -- what is attended to ----------------------------------------------------------------------------------------

    def _read(self, inputs: Any, groups: Sequence[Sequence[int]]) -> Reading:
        method, rows = self.method, [row for group in groups for row in group]
        if method is not None and self.recipe.marked:
            method = with_marked(method, groups, self.recipe.marked)
        return read(self.model, inputs, rows, self.recipe.maps, method)

    def _heats(
        self, number: int, view: Image.Image, inputs: Any, groups: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32]]:
        """One map a group of rows, float32 [h, w] over the view, less that of the background."""
        if not groups:
            return []
        reading = self._read(inputs, groups)
        self.tokens[number] = reading.visual_tokens
        maps = whole_view(reading)
        heats, start = [], 0
        for group in groups:
            heats.append(maps[start : start + len(group)].mean(0))
            start += len(group)
        if self.recipe.background is not None:
            nothing = self._background(view)
            heats = [(one / one.sum().clamp(min=1e-12) - nothing).clamp(min=0) for one in heats]
        return [one.float().numpy() for one in heats]

    def _background(self, view: Image.Image) -> Tensor:
        assert self.recipe.background is not None
        inputs = self._inputs([view], [self.recipe.refer.format(phrase=self.recipe.background)])
        text, ids = self._text(inputs)
        at = text.find(self.recipe.background, last=True)
        rows = ([] if at is None else self._rows(text, self.recipe.background, at[0])) or [len(ids) - 1]
        heat = whole_view(self._read(inputs, [rows])).mean(0)
        return heat / heat.sum().clamp(min=1e-12)


def whole_view(reading: Reading) -> Tensor:
    """One map [R, h, w] of a view that the model reads as one grid, or as a grid first and finer tiles after it.

    The tiles of models that cut pictures up are left out: the first grid of them shows the whole picture, or is the
    only one. Frames are averaged.
    """
    return reading.on_grid(0).mean(1)


def _until_end(answer: Tensor, ends: Tensor) -> Tensor:
    """An answer [T] up to the first token of `ends`; what stands behind it is padding."""
    at = torch.isin(answer, ends).nonzero()
    return answer[: int(at[0]) + 1] if len(at) else answer


def with_answer(inputs: Any, answer: Tensor) -> dict[str, Any]:
    """The inputs of a prompt with the ids [1, T] of what was answered behind it."""
    said = torch.cat([inputs["input_ids"], answer], 1)
    whole = {**inputs, "input_ids": said, "attention_mask": torch.ones_like(said)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in whole:
            whole[name] = torch.cat([whole[name], whole[name].new_zeros(answer.shape)], 1)
    return whole


def counted(tokens: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The sums over views."""
    pairs = list(tokens)
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)
