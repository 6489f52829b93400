"""What a network has learned to look for: the attention of the instruction, and the rows themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy
from vprune.models.aside import beside, numbers_on, sent
from vprune.models.probe import keys_valid, layer_attention, past_bias
from vprune.places import rows_of, some_rows
from vprune.records import Grid, Prefill, VisualTokens, instruction_rows
from vprune.scoring.network import (
    ScorerConfig,
    ScorerNetwork,
    attention_statistics,
    same_grid,
    scorer_folder,
    shares_at,
    summary,
)

_SIGNATURE = 16  # numbers of the embedding table that tell one model from another of the same shape
_ALIKE = 0.05  # how far they may differ, as a share of their size: rounding to 8 bits passes, other weights do not
_NUMBERS_AT_ONCE = 2**27  # attention weights held at a time, 0.5 GB


@dataclass
class Learned:
    """The scores of a small network that was trained for the model at hand (`vprune train scorer`).

    Task-related token compression from explainability (arXiv 2506.01097): I = f(a), a the attention that instruction
    rows of decoder layer l pay to the visual tokens, f a CNN on their grid. Here f also reads the rows themselves, and
    learns which tokens the model's answer cannot do without (see `vprune.training.effect`). The map is the softmax of
    the network's scores over the tokens of an image.

    Args:
        checkpoint: the folder of a scorer, as `save_pretrained` writes it; None = the one that ships with vprune and
            was trained for this model, and for tokens that are dropped where they are (`recycle=none`) rather than
            merged: the others look for what no merged row can stand for.

    Raises:
        VPruneError: there is none for this model, or the folder holds none, or one of another model.

    Example:
        >>> Learned().bound(dissect(model)).network.config.layer  # doctest: +SKIP
        0
    """

    checkpoint: str | None = None

    needs_evidence: ClassVar[bool] = False
    reads_rows_only: ClassVar[bool] = True
    minds_dropping: ClassVar[bool] = True
    tower_layer: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        self.network: ScorerNetwork | None = None
        self._demand: list[Tensor] | None = None  # log odds of every image of the last prefill, where they are wanted
        if self.checkpoint is not None:
            scorer_folder(self.checkpoint)  # told before a large model is loaded, not after

    @property
    def layer(self) -> int:
        """The decoder layer whose attention is read: the one map serves every stage after it."""
        return 0 if self.network is None else self.network.config.layer

    def bound(self, anatomy: Anatomy, demand: bool = False, drops: bool = False) -> Learned:
        """The same with its network loaded, beside the decoder's input embeddings.

        `demand`: `shares` will be asked for; `drops`: what is pruned will be dropped, not merged.

        Raises:
            VPruneError: there is no scorer for this model, or it cannot tell what it is asked for.
        """
        own = identity_of(anatomy)
        network = _shipped_for(own, drops) if self.checkpoint is None else ScorerNetwork.load(self.checkpoint)
        if network is None:
            raise VPruneError(
                f"method=learned: no scorer ships for {own['name']}. Train one with `vprune train scorer model=ID` and "
                "give its folder as checkpoint= (on the command line method.scorer.checkpoint=), or choose a method "
                "that needs no training: attention_max, random, uniform ..."
            )
        differing = difference(network.config.model, own)
        if differing:
            raise VPruneError(
                f"checkpoint={self.checkpoint}: this scorer was trained for another model: {differing}. "
                "Train one with `vprune train scorer model=ID`"
            )
        if demand and not network.config.prices:
            raise VPruneError(
                "budget=question: this scorer was trained to say which tokens matter, but not how many a question "
                "needs; teach it with `vprune train scorer objective=demand start_from=FOLDER`, or give budget=image"
            )
        other = Learned(self.checkpoint)
        other.network, other._demand = network.float(), [] if demand else None
        return other

    def __call__(self, prefill: Prefill) -> list[Tensor]:
        """Score all images of a prefill, those of one grid at once.

        Raises:
            VPruneError: a sample without instruction tokens, or `bound` was not called; on a CPU, where a look costs no
                waiting, also scores that are no numbers.
        """
        if not prefill.images:
            return []
        network = self.network
        if network is None:
            raise VPruneError("method=learned was not bound to a model: use it through vprune.prune(model, ...)")
        if network.exit.weight.device != prefill.hidden.device:
            network.to(prefill.hidden.device)
        features = read_features(prefill, network.config.layer)
        found: dict[int, Tensor] = {}
        odds: dict[int, Tensor] = {}
        for grid, numbers in same_grid([image.grid for image in prefill.images]).items():
            images = [prefill.images[number] for number in numbers]
            with torch.inference_mode():  # (a twentieth off the host's time)
                read = beside(partial(network.read, *features.rows(images)), prefill.hidden.device)
                scores, channels, asked = network.seen(features.maps(images), grid, read())
                told = network.demand(summary(scores, channels, asked)) if self._demand is not None else ()
            # What leaves the block is made outside of it, or nobody could change it.
            found |= dict(zip(numbers, scores.softmax(-1), strict=True))
            odds |= dict(zip(numbers, told, strict=self._demand is not None))
        self._demand = None if self._demand is None else [odds[number] for number in sorted(odds)]
        if not prefill.hidden.is_cuda:  # (a look at what a GPU is still working at would hold the decoder up)
            _refuse_nonsense(prefill, found)
        return [found[number] for number in range(len(prefill.images))]

    def shares(self, keep: float) -> list[float]:
        """What every image of the last prefill gets of its tokens, where `keep` of all stay in the mean over questions.

        The network tells what of the answer is likely to stay at each of some budgets, and tokens go to where they do
        most, see `vprune.scoring.network.shares_at`. The host waits for the device here.
        """
        assert self.network is not None and self._demand is not None
        price = self.network.price_of(keep)
        if price is None or not self._demand:
            return [keep] * len(self._demand)
        return shares_at(torch.stack(self._demand), self.network.config.levels, price).tolist()


@dataclass(frozen=True)
class Features:
    """What a scorer reads of a batch: rows [B, L, D], instruction rows [B, R, D], bool [B, R], and their attention.

    `text_valid` is None where no sample has fewer of them than another.
    """

    hidden: Tensor
    text: Tensor
    text_valid: Tensor | None
    attend: Callable[[], Tensor]

    @cached_property
    def attention(self) -> Tensor:
        """That of the instruction rows at one layer, [B, 2 H, L]: for each head the mean over them, then the maxima."""
        return self.attend()

    def maps(self, images: Sequence[VisualTokens]) -> Tensor:
        """The attention that images of one grid receive, [I, 2 H, N]."""
        return rows_of(self.attention.transpose(1, 2), images).transpose(1, 2)

    def of(self, images: Sequence[VisualTokens], grid: Grid) -> tuple[Tensor, Grid, Tensor, Tensor, Tensor | None]:
        """The arguments of `ScorerNetwork` for images of one grid."""
        return self.maps(images), grid, *self.rows(images)

    def rows(self, images: Sequence[VisualTokens]) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `ScorerNetwork.read` takes, of images of as many tokens each."""
        text, valid, samples = self.text, self.text_valid, tuple(image.sample for image in images)
        if samples != tuple(range(text.shape[0])):
            sample = numbers_on(self.hidden.device, samples)
            text, valid = text[sample], None if valid is None else valid[sample]
        return rows_of(self.hidden, images).float(), text.float(), valid


def read_features(prefill: Prefill, layer: int, until: Tensor | None = None) -> Features:
    """What a scorer reads of a prefill.

    `until` LongTensor [B]: the column at which the answer begins, where the prompt holds one; None = it holds none.

    Raises:
        VPruneError: a sample with images but without a token of text after them.
    """
    valid = prefill.valid
    if until is not None:
        valid = valid & (torch.arange(valid.shape[1], device=valid.device) < until[:, None])
    rows, row_valid = prefill.instruction_on_device if until is None else instruction_rows(valid, prefill.visual)
    _refuse_silence(prefill, None if until is None else rows[:, 0].tolist())
    tail = prefill.instruction_tail if until is None else 0
    counted = None if tail else row_valid
    attend = partial(_attention, prefill, layer, rows, counted, tail)
    return Features(prefill.hidden, some_rows(prefill.hidden, tail or rows), counted, attend)


def _attention(prefill: Prefill, layer: int, rows: Tensor, counted: Tensor | None, tail: int) -> Tensor:
    """What all columns receive from the rows [B, R] at a layer, [B, 2 H, L]; `tail`: R where they are the last ones."""
    caught = layer_attention(prefill, layer, tail or rows)
    batch, heads, _, width = caught.query.shape
    held = caught.key.shape[2]
    stored = held - prefill.valid.shape[1]
    query = caught.query.float() * caught.scale
    key = caught.key.float().transpose(-1, -2)
    bias, unseen = past_bias(prefill), _unseen(prefill, layer, rows + stored if stored else rows, counted, held)
    # Samples in parts: a long prompt of a large model would fill the memory otherwise.
    at_once = max(1, _NUMBERS_AT_ONCE // (heads * rows.shape[1] * held))
    found = []
    for first in range(0, batch, at_once):
        part = slice(first, first + at_once)
        grouped = query[part].reshape(-1, key.shape[1], heads // key.shape[1] * rows.shape[1], width)
        logits = (grouped @ key[part]).view(-1, heads, rows.shape[1], held)
        if bias is not None:
            logits = logits + bias[part, None, None, -held:]
        logits[..., -unseen.shape[-1] :].masked_fill_(unseen[part] if unseen.shape[0] > 1 else unseen, -torch.inf)
        weights = logits.softmax(-1)[..., stored:]
        found.append(attention_statistics(weights, None if counted is None else counted[part]))
    return found[0] if len(found) == 1 else torch.cat(found)


def _unseen(prefill: Prefill, layer: int, rows: Tensor, counted: Tensor | None, held: int) -> Tensor:
    """Which of the last M of `held` keys each of the rows [B, R] does not see, bool [1 or B, 1, R, M].

    `counted` bool [B, R] marks rows that are no padding; None: they are the last R, and each sees all before it.
    """
    key_valid, window = keys_valid(prefill), prefill.anatomy.window_of(layer)
    if counted is None and key_valid is None and window is None:
        return _later(rows.shape[1], rows.device)
    columns, own = torch.arange(held, device=rows.device), rows[:, None, :, None]
    unseen = columns > own
    if key_valid is not None:
        unseen = unseen | ~key_valid[:, None, None, -held:]
    if window is not None:
        unseen = unseen | (columns <= own - window)
    # A row that sees nothing would be not-a-number.
    return unseen if counted is None else unseen & counted[:, None, :, None]


@lru_cache(maxsize=64)
def _later(count: int, device: torch.device) -> Tensor:
    """Which of the last `count` keys lie after each of the last `count` rows, bool [1, 1, count, count], made once."""
    with torch.inference_mode(False):  # else a model that learns could not use it later
        return sent(torch.ones((count, count), dtype=torch.bool).triu(1)[None, None], device)


def _refuse_nonsense(prefill: Prefill, maps: Mapping[int, Tensor]) -> None:
    for number, one in maps.items():
        if not math.isfinite(float(one.sum())):  # (a sum of shares: no number in it is too large)
            image = prefill.images[number]
            raise VPruneError(
                f"sample {image.sample}, image {image.image}: {int((~one.isfinite()).sum())} of {one.numel()} "
                "scores are no numbers; is the model's attention (or the picture) finite?"
            )


def _refuse_silence(prefill: Prefill, first: Sequence[int] | None) -> None:
    """`first`: the column of each sample's first instruction row, where the host cannot tell without it."""
    for image in prefill.images:
        if not image.after if first is None else first[image.sample] <= int(image.columns[-1]):
            raise VPruneError(
                f"sample {image.sample} has no instruction tokens after its last image ({len(image)} visual tokens, "
                f"{prefill.counts[image.sample]} tokens in all): method=learned needs a question there; "
                "put the text after the image, or choose a method that is blind to the question, such as vision"
            )


def identity_of(anatomy: Anatomy) -> dict[str, Any]:
    """What tells a model from others, for the config of a scorer: shapes, and a few of its input embeddings."""
    text: Any = anatomy.decoder.config
    decoder: Any = anatomy.decoder
    table = decoder.get_input_embeddings()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    vocabulary = int(text.vocab_size)
    weight: Tensor = table.weight
    ids = torch.arange(1, _SIGNATURE + 1, device=weight.device) * (vocabulary // (_SIGNATURE + 2))
    with torch.no_grad():  # (an offloaded table cannot be read here: its model is told by its shape alone)
        some = table(ids).float().diagonal() if weight.device.type != "meta" else torch.zeros(0)
    return {
        "name": type(anatomy.base).__name__,
        **{name: getattr(text, name) for name in names if hasattr(text, name)},
        "signature": [float(f"{number:.4g}") for number in some.tolist()],
    }


def difference(trained: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """How the model that a scorer was trained for differs from another, in words; empty if it does not."""
    told = [
        f"{name}={trained.get(name)}, this one has {name}={value}"
        for name, value in own.items()
        if name != "signature" and trained.get(name) != value
    ]
    if told:
        return "; ".join(told)
    mine, theirs = (torch.tensor(list(one.get("signature", []))) for one in (own, trained))
    if mine.numel() and (mine.shape != theirs.shape or (mine - theirs).norm() > _ALIKE * theirs.norm()):
        return "the same shape with other weights"
    return ""


def shipped() -> Iterator[Path]:
    """The folders of the scorers that ship with vprune."""
    folder = resources.files("vprune") / "assets" / "models" / "scorers"
    home = Path(str(folder))
    yield from sorted(one.parent for one in home.glob("*/config.json")) if home.is_dir() else ()


def _shipped_for(own: Mapping[str, Any], drops: bool) -> ScorerNetwork | None:
    fitting = [one for one in map(ScorerNetwork.load, shipped()) if not difference(one.config.model, own)]
    return next((one for one in fitting if trained_to_drop(one.config) == drops), fitting[0] if fitting else None)


def trained_to_drop(config: ScorerConfig) -> bool:
    """True of a scorer that learned which tokens have to stand alone: `vprune train scorer effect.share=0`."""
    return bool(config.recipe.get("objective") == "effect" and config.recipe["effect"]["share"] == 0)
