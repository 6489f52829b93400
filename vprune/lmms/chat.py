"""A chat model of lmms-eval: any Hugging Face vision-language model with its visual tokens pruned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from vprune.attach import prune
from vprune.errors import VPruneError
from vprune.eval.models import LoadedModel, ModelChoice, load, visual_token_ids
from vprune.lmms.generation import cut, generation_of, without_effect
from vprune.pruner import load_method


@dataclass(frozen=True)
class Turn:
    """One request: its place among all, the prompt as the chat template writes it, its images, how to generate."""

    place: int
    prompt: str
    images: Sequence[Any]
    wishes: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What turns of one batch share: the wishes, and how many images each brings."""
        return json.dumps([len(self.images), self.wishes], sort_keys=True, default=str)


class VPrune(lmms):  # type: ignore[misc]  # lmms-eval is no dependency where types are checked
    """`--model vprune --model_args pretrained=...,method=...,keep=...`.

    Args:
        pretrained: "embedded", a folder or a hub id.
        method: a name in conf/method/; full prunes nothing.
        keep: a fraction in (0, 1], or tokens per image; None: the method's own. lmms-eval reads keep=1 as one token.
        batch_size, max_batch_size, device: as lmms-eval passes them; `device` also takes "auto".
        dtype, attention, revision, trust_remote_code: see `vprune.eval.models.ModelChoice`.
        system_prompt: a text, or a file that holds it.
        options: the method's own: layer, recycle, size_aware, stages, seed ...

    Token counts are those that the decoder reads: input_tokens is the prompt's after pruning.

    Raises:
        VPruneError: an unknown method or option, a model that cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "embedded",
        method: str = "learned",
        keep: float | int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        revision: str | None = None,
        trust_remote_code: bool = False,
        system_prompt: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise VPruneError(f"batch_size={batch_size}: expected an integer >= 1")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{self.accelerator.local_process_index}"
        pruner = None if method == "full" else load_method(method, keep=keep, **options)
        choice = ModelChoice(pretrained, revision, trust_remote_code, dtype, device or "auto", attention)
        self._loaded: LoadedModel | None = load(choice)
        self._system_prompt = self._resolve_system_prompt(system_prompt or "")
        self._pruning = None if pruner is None else prune(self._loaded.model, method=pruner)
        self.device = self._loaded.device
        self.visual_tokens_before = self.visual_tokens_after = 0

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer a request, in their order, with its token counts."""
        results: dict[int, GenerationResult] = {}
        turns = [self._turn(place, request) for place, request in enumerate(requests)]
        before, after = self.visual_tokens_before, self.visual_tokens_after
        for wish in sorted({wish for turn in turns for wish in without_effect(turn.wishes)}):
            logger.warning(f"vprune: generation_kwargs {wish} has no effect here")
        with (
            self._pruned(),
            tqdm(total=len(requests), disable=self.rank != 0, desc="vprune") as bar,
        ):
            for batch in self._batches(turns):
                for turn, result in zip(batch, self._answers(batch), strict=True):
                    results[turn.place] = result
                    self.cache_hook.add_partial("generate_until", (turn.prompt, turn.wishes), result.text)
                bar.update(len(batch))
        read = self.visual_tokens_after - after, self.visual_tokens_before - before
        logger.info(f"vprune: the decoder read {read[0]} of {read[1]} visual tokens in {len(requests)} requests")
        return [results[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not what lmms-eval asks of chat models."""
        raise NotImplementedError("the model vprune is a chat model: it generates; use a task of generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there yet: a later round would need the cache of the one before."""
        raise NotImplementedError("the model vprune answers single rounds; use a task of generate_until")

    def clean(self) -> None:
        """Let go of the model."""
        self._pruning = self._loaded = None
        super().clean()

    def _pruned(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._pruning is None else self._pruning

    def _turn(self, place: int, request: Instance) -> Turn:
        _, doc_to_messages, wishes, doc_id, task, split = request.args
        said = doc_to_messages(self.task_dict[task][split][doc_id])
        messages = ChatMessages(messages=self._apply_system_prompt(said, self._system_prompt))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise VPruneError(f"task {task} brings {'video' if videos else 'audio'}; the model vprune reads images")
        assert self._loaded is not None
        prompt = self._loaded.processor.apply_chat_template(
            messages.to_hf_messages(), add_generation_prompt=True, tokenize=False
        )
        return Turn(place, prompt, [image.convert("RGB") for image in images], wishes)

    def _batches(self, turns: Sequence[Turn]) -> Iterator[list[Turn]]:
        by_kind: dict[str, list[Turn]] = {}
        for turn in turns:
            by_kind.setdefault(turn.kind, []).append(turn)
        for alike in by_kind.values():
            yield from (alike[start : start + self.batch_size] for start in range(0, len(alike), self.batch_size))

    @torch.no_grad()
    def _answers(self, batch: Sequence[Turn]) -> list[GenerationResult]:
        assert self._loaded is not None
        model, processor = self._loaded.model, self._loaded.processor
        images: Any = [turn.images for turn in batch]
        if all(len(own) == 1 for own in images):
            images = [own[0] for own in images]  # what every processor takes; lists of lists not all of them
        given = {"images": images} if any(turn.images for turn in batch) else {}
        inputs = processor(**given, text=[turn.prompt for turn in batch], padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, dtype=model.dtype)
        generation = generation_of(model, batch[0].wishes, processor.tokenizer.pad_token_id)
        output = model.generate(**inputs, generation_config=generation)
        answers = output[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        before, after = self._visual_tokens(inputs["input_ids"]) if given else ([0] * len(batch),) * 2
        self.visual_tokens_before += sum(before)
        self.visual_tokens_after += sum(after)
        read = [int(n) - b + a for n, b, a in zip(inputs["attention_mask"].sum(-1), before, after, strict=True)]
        wrote = (answers != generation.pad_token_id).sum(-1).tolist()
        return [
            GenerationResult(cut(text, batch[0].wishes), TokenCounts(input_tokens=i, output_tokens=o))
            for text, i, o in zip(texts, read, wrote, strict=True)
        ]

    def _visual_tokens(self, input_ids: torch.Tensor) -> tuple[list[int], list[int]]:
        """Visual tokens of each sample before and after pruning; in stages, the mean over the layers."""
        assert self._loaded is not None
        if self._pruning is None or self._pruning.last is None:
            known = torch.tensor(visual_token_ids(self._loaded.model), device=input_ids.device)
            counts = torch.isin(input_ids, known).sum(-1).tolist()
            return counts, counts
        before, after = [0] * len(input_ids), [0.0] * len(input_ids)
        for report in self._pruning.last:
            before[report.sample] += report.tokens_before
            after[report.sample] += report.mean_tokens
        return before, [round(tokens) for tokens in after]
