"""Pruned images for engines that take features in place of pixels: docs/serving.md says which, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vprune.attach import Pruning
from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy, dissect
from vprune.pruner import Pruner, load_method


@dataclass(frozen=True)
class ImageEmbeds:
    """One prompt with its pictures pruned already.

    `prompt_ids` LongTensor [L]: the prompt, each picture's placeholder as often as rows are left of it; `image_embeds`:
    float [K, D] a picture, what stands at its placeholders; `positions` LongTensor [1, L], or [3, L] where a model
    rotates by time, row and column: the original positions, with gaps where tokens were dropped; `kept`: LongTensor [K]
    a picture, which of its placeholders they had; `tokens_before`, `tokens_after`: visual tokens, in all.
    """

    prompt_ids: Tensor
    image_embeds: tuple[Tensor, ...]
    positions: Tensor
    kept: tuple[Tensor, ...]
    tokens_before: int
    tokens_after: int
    placeholder: int

    @property
    def next_position(self) -> int:
        """The position, in each of its rows, of the first token that is generated."""
        return int(self.positions[:, -1].max()) + 1

    @property
    def unexpanded_ids(self) -> Tensor:
        """The prompt with one placeholder a picture, which engines expand by the number of rows that they are given."""
        visual = self.prompt_ids == self.placeholder
        again = torch.cat([visual.new_zeros(1), visual[1:] & visual[:-1]])
        return self.prompt_ids[~again]

    def inputs_embeds(self, table: Any) -> Tensor:
        """What the decoder reads, [1, L, D]: the words by `table`, the model's input embeddings, and the pictures."""
        rows: Tensor = table(self.prompt_ids.to(table.weight.device))
        visual = (self.prompt_ids == self.placeholder).to(rows.device)
        return rows.masked_scatter(visual[:, None], torch.cat(self.image_embeds).to(rows))[None]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: image_embeds.0, image_embeds.1 ..., kept.0 ..., prompt_ids and positions."""
        from safetensors.torch import save_file

        tensors = {"prompt_ids": self.prompt_ids, "positions": self.positions}
        for name, parts in (("image_embeds", self.image_embeds), ("kept", self.kept)):
            tensors |= {f"{name}.{number}": part for number, part in enumerate(parts)}
        told = {key: getattr(self, key) for key in ("tokens_before", "tokens_after", "placeholder")}
        save_file(
            {key: value.cpu().contiguous() for key, value in tensors.items()}, path, {"image_embeds": json.dumps(told)}
        )

    @classmethod
    def load(cls, path: str | Path) -> ImageEmbeds:
        """Read what `save` wrote; VPruneError if the file is something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                told = json.loads((file.metadata() or {})["image_embeds"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise VPruneError(f"{path} holds no exported image embeddings ({error})") from error

        def parts(name: str) -> tuple[Tensor, ...]:
            return tuple(tensors[f"{name}.{n}"] for n in range(sum(key.startswith(f"{name}.") for key in tensors)))

        return cls(tensors["prompt_ids"], parts("image_embeds"), tensors["positions"], parts("kept"), **told)


def export_image_embeds(
    model: Any,
    inputs: Mapping[str, Any],
    method: str | Pruner = "learned",
    keep: float | int | None = None,
    **options: Any,
) -> ImageEmbeds:
    """Prune the pictures of one prompt, and return what is left of them; the decoder does not run.

    Args:
        model: a vision-language model instance, as for `vprune.prune`.
        inputs: what the processor makes of one prompt with its pictures.
        method: a name in conf/method/, or a `Pruner`.
        keep: what stays of every picture: a fraction in (0, 1], or a number of tokens; None = the method's default.
        options: the method's own, as for `vprune.prune`.

    Raises:
        VPruneError: what features alone cannot carry: stages behind the first layer, sizes in attention, DeepStack
            features, pictures that see themselves both ways; several prompts at once, a prompt without pictures, video.

    Example:
        >>> exported = export_image_embeds(model, inputs, method="attention", keep=64)
        >>> [tuple(rows.shape) for rows in exported.image_embeds]
        [(64, 4096)]
    """
    anatomy = dissect(model)
    ids, placeholder = _checked(anatomy, inputs)
    pruning = Pruning(model, method if isinstance(method, Pruner) else load_method(method, keep=keep, **options))
    later = [layer for layer, _ in pruning.pruner.schedule if layer > 0]
    if later:
        raise VPruneError(
            f"stages: layer {later[0]} prunes what earlier layers have read, which no exported rows can do; "
            "use a method that prunes before the first layer"
        )
    caught = _caught(model, anatomy, pruning, inputs)
    # Pictures of a prompt lie apart; placeholders that lie together are one, its tiles and line breaks included.
    visual = ids == placeholder
    begins = visual & ~torch.cat([visual.new_zeros(1), visual[:-1]])
    picture, starts = begins.cumsum(0) - 1, torch.nonzero(begins).flatten()
    left = caught.columns[visual[caught.columns]]
    rows = caught.embeds[visual[caught.columns].to(caught.embeds.device)]
    of_each = [picture[left] == number for number in range(len(starts))]
    return ImageEmbeds(
        prompt_ids=ids[caught.columns],
        image_embeds=tuple(rows[own.to(rows.device)] for own in of_each),
        positions=caught.positions.cpu(),
        kept=tuple(left[own] - start for own, start in zip(of_each, starts, strict=True)),
        tokens_before=int(visual.sum()),
        tokens_after=len(left),
        placeholder=placeholder,
    )


def _checked(anatomy: Anatomy, inputs: Mapping[str, Any]) -> tuple[Tensor, int]:
    """The prompt's ids [L] on the CPU, and the placeholder of pictures."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        shape = list(ids.shape) if isinstance(ids, Tensor) else ids
        raise VPruneError(f"input_ids has shape {shape}: give one prompt, [1, L], without padding")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise VPruneError("attention_mask hides parts of the prompt: give one prompt without padding")
    own, ids = anatomy.token_ids, ids[0].cpu()
    present = [token for token in own if bool((ids == token).any())]
    if present != [own[0]] or inputs.get("pixel_values") is None:
        what = "holds no picture" if not present else "holds a video" if present != [own[0]] else "brings no pixels"
        raise VPruneError(f"the prompt {what}: pictures are exported, and nothing else")
    return ids, own[0]


class _CaughtError(Exception):
    """What the decoder was given: rows [L, D], positions [1 or 3, L], and the columns [L] that they stand for.

    No failure: it ends the forward where the decoder would begin.
    """

    def __init__(self, embeds: Tensor, positions: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.embeds, self.positions, self.columns = embeds, positions, columns


def _caught(model: Any, anatomy: Anatomy, pruning: Pruning, inputs: Mapping[str, Any]) -> _CaughtError:
    name = type(model).__name__

    def catch(decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
        passage = pruning._passage
        if kwargs.get("deepstack_visual_embeds") is not None:
            raise VPruneError(
                f"{name} adds visual features behind its first layers too (DeepStack): image_embeds do not carry them"
            )
        if isinstance(kwargs.get("attention_mask"), dict) or (passage is not None and passage.own_masks is not None):
            raise VPruneError(f"the pictures of {name} see themselves both ways: the rows alone do not tell an engine")
        if passage is not None and passage.here.bias is not None:
            raise VPruneError(
                "size_aware=True weighs merged rows in every layer's attention, which exported rows cannot: "
                "set size_aware=False"
            )
        embeds, positions = kwargs["inputs_embeds"][0].detach(), kwargs.get("position_ids")
        every = torch.arange(embeds.shape[0])
        index = None if passage is None else passage.here.index
        positions = every[None] if positions is None else positions[:, 0] if positions.ndim == 3 else positions[:1]
        raise _CaughtError(
            embeds,
            positions[-3:],  # [4, L] begins with a row of its own for masks
            every if index is None else index[0].cpu(),
        )

    with torch.no_grad(), pruning:
        handle = anatomy.decoder.register_forward_pre_hook(catch, with_kwargs=True)  # behind the pruning's own
        try:
            model(**inputs)
        except _CaughtError as caught:
            return caught
        finally:
            handle.remove()
    raise VPruneError(f"{name} does not call its decoder: its pictures cannot be exported")
