"""The network that learns which tokens matter, and its checkpoint: a small CNN over what the question attends to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, silu

from vprune import kernels
from vprune.errors import VPruneError
from vprune.records import Grid

MOST_PARAMETERS = 300_000
FINISHED = "scorer"
"""Where in the folder of its run a finished scorer lies."""
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_REMEDY = f"give the folder of a scorer: what `vprune train scorer out=DIR` leaves in DIR/{FINISHED}"
Read = tuple[list[Tensor], Tensor]
_RANGE = 8.0  # of the scores: beyond it, differences between tokens far from any border would be lost in rounding


@dataclass(frozen=True)
class ScorerConfig:
    """What a scorer is built of, and which model it was trained for.

    Args:
        layer: the decoder layer whose attention maps it reads; `heads`: how many that layer has.
        width: of the model's hidden rows; 0 = the rows themselves are not read.
        layout: "grid" convolves over rows and columns (and frames), "line" over the order of the tokens.
        channels: of each convolution, first to last; `kernels`: their sizes; `dilations`: their spacings.
        matches: learned heads that compare question rows with visual rows, `match_width` wide each.
        contents: channels read off the visual rows.
        levels: shares of an image's tokens, rising, for each of which the network tells how likely a word of the answer
            is to stay; none = it does not.
        prices: (keep, price) pairs, keep rising: what a token must be worth where `keep` of all tokens stay in the mean
            over questions, see `shares_at`.
        model: what the scorer was trained for, as `vprune.scoring.learned.identity_of` tells it.
        recipe: how it was trained, for the record.
    """

    layer: int = 0
    heads: int = 1
    width: int = 0
    layout: str = "grid"
    channels: tuple[int, ...] = (96, 96, 96, 96, 96)
    kernels: tuple[int, ...] = (5, 5, 5, 5, 5)
    dilations: tuple[int, ...] = (1, 1, 2, 1, 1)
    matches: int = 8
    match_width: int = 16
    contents: int = 24
    levels: tuple[float, ...] = ()
    prices: tuple[tuple[float, float], ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("channels", "kernels", "dilations"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
        object.__setattr__(self, "prices", tuple((float(keep), float(price)) for keep, price in self.prices))
        if self.layout not in ("grid", "line"):
            raise VPruneError(f"layout={self.layout!r}: choose grid or line")
        if not len(self.channels) == len(self.kernels) == len(self.dilations) >= 1:
            raise VPruneError(
                f"channels, kernels and dilations name {len(self.channels)}, {len(self.kernels)} and "
                f"{len(self.dilations)} convolutions: give one of each per convolution"
            )
        if any(size % 2 == 0 for size in self.kernels):
            raise VPruneError(f"kernels={list(self.kernels)}: give odd sizes, so that a token lies in the middle")
        if any(not low < high for low, high in pairwise((0.0, *self.levels))) or max(self.levels, default=0) > 1:
            raise VPruneError(f"levels={list(self.levels)}: give rising shares of the tokens, in (0, 1]")


class Convolution(nn.Module):
    """A depthwise and a pointwise convolution with a residual; frames meet in a depthwise one of their own.

    The taps of other frames start at nothing, so that training on pictures leaves a video's frames apart.
    """

    def __init__(self, before: int, after: int, kernel: int, dilation: int, line: bool) -> None:
        super().__init__()
        sides = (1, kernel) if line else (kernel, kernel)
        around = ((sides[0] - 1) // 2 * dilation, (sides[1] - 1) // 2 * dilation)
        self.depthwise = nn.Conv2d(before, before, sides, padding=around, dilation=dilation, groups=before)
        self.frames = nn.Parameter(torch.zeros(2, before))
        self.pointwise = nn.Conv2d(before, after, 1)
        self.residual = before == after

    def forward(self, x: Tensor, gain: Tensor, offset: Tensor, frames: int) -> Tensor:
        """[I * t, h, w, C] -> the same with other channels; `gain` and `offset` [I or 1, C] of what is normed."""
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if frames > 1:
            apart = y.unflatten(0, (-1, frames))
            earlier, later = torch.zeros_like(apart), torch.zeros_like(apart)
            earlier[:, 1:], later[:, :-1] = apart[:, :-1], apart[:, 1:]
            y = (apart + earlier * self.frames[0] + later * self.frames[1]).flatten(0, 1)
            gain, offset = (one.repeat_interleave(frames, 0) for one in (gain, offset))
        y = pointwise(self.pointwise, kernels.modulate(y, gain, offset))
        return y.add_(x) if self.residual else y


def pointwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution of rows [..., C]: as the linear layer that it is, it takes a CPU a third of the time."""
    return linear(x, convolution.weight.flatten(1), convolution.bias)


class Demand(nn.Module):
    """Tells from the summary of an image and its question what of the answer is likely to stay, budget by budget."""

    def __init__(self, inputs: int, levels: Sequence[float], width: int = 96) -> None:
        super().__init__()
        self.center = nn.Buffer(torch.zeros(inputs))
        self.spread = nn.Buffer(torch.ones(inputs))
        self.entry = nn.Linear(inputs, width)
        self.drop = nn.Dropout(0.1)
        self.exit = nn.Linear(width, len(levels))

    def forward(self, summary: Tensor) -> Tensor:
        """[I, S] -> the log odds [I, J] that a token of the answer stays at each of J levels."""
        odds: Tensor = self.exit(self.drop(silu(self.entry((summary - self.center) / self.spread))))
        return odds


def summary(scores: Tensor, channels: Tensor, asked: Tensor | None) -> Tensor:
    """What `Demand` reads, [I, S]: the question, and mean, mean under softmax(scores) and maximum of the channels."""
    weighted = (channels * scores.softmax(-1)[:, None]).sum(-1)
    parts = [channels.mean(-1), weighted, channels.amax(-1)]
    return torch.cat(parts if asked is None else [asked, *parts], -1)


def shares_at(odds: Tensor, levels: Sequence[float], price: float) -> Tensor:
    """The share of its tokens that each of I images gets, [I], where a token must be worth `price`.

    argmax_j p_j - price * level_j over the J levels, p_j = max_{i <= j} sigmoid(odds_i): more tokens do no harm. With
    one price for all, no token could move from one question to another and raise the sum of all p.
    """
    likely = odds.sigmoid().cummax(-1).values
    steps = torch.tensor(levels, dtype=likely.dtype, device=likely.device)
    return steps[(likely - price * steps).argmax(-1)]


class ScorerNetwork(nn.Module, PyTorchModelHubMixin):
    """Scores the visual tokens of an image from the attention that a question pays to them.

    Input channels on the grid: per head of decoder layer `layer`, log(N a_j + 1/100) of the mean and of the maximum
    over instruction rows i of a_ij; and where `width` is given, `contents` linear channels of the visual row x_j and,
    for `matches` learned heads, mean and maximum over i of (W_q [x_i, x_i-1, x_i-2]) . (W_k x_j) / sqrt(match_width),
    rows normalised to unit variance.

    Raises:
        VPruneError: more than 300,000 parameters, or a setting that contradicts another.

    Example:
        >>> network = ScorerNetwork(ScorerConfig(heads=4))
        >>> network(torch.rand(1, 8, 36) / 36, (1, 6, 6)).shape
        torch.Size([1, 36])
    """

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.config = config
        asked = config.matches * config.match_width if config.width else 0
        inputs = 2 * config.heads
        if config.width:
            inputs += config.contents + 2 * config.matches
            self.keys = nn.Linear(config.width, asked + config.contents)  # and contents: the rows are read once
            self.queries = nn.Linear(3 * config.width, asked)
            self.question = nn.Linear(asked, config.channels[0])
        self.floor = nn.Buffer(torch.tensor(0.01), persistent=False)  # lest an attention of zero have no logarithm
        self.entry = nn.Conv2d(inputs, config.channels[0], 1)
        befores = (config.channels[0], *config.channels[:-1])
        # Gains, then offsets of what each convolution norms, and what the question adds to them.
        self._widths = [width for width in befores for _ in ("gains", "offsets")]
        self.norms = nn.Parameter(torch.cat([torch.tensor([1.0, 0.0]).repeat_interleave(width) for width in befores]))
        if config.width:
            self.modulation = nn.Linear(config.channels[0], len(self.norms), bias=False)
            nn.init.zeros_(self.modulation.weight)
        self.convolutions = nn.ModuleList(
            Convolution(before, after, kernel, dilation, config.layout == "line")
            for before, after, kernel, dilation in zip(
                befores, config.channels, config.kernels, config.dilations, strict=True
            )
        )
        self.exit = nn.Conv2d(config.channels[-1], 1, 1)
        if config.levels:
            self.demand = Demand((config.channels[0] if config.width else 0) + 3 * config.channels[-1], config.levels)
        count = sum(part.numel() for part in self.parameters())
        if count > MOST_PARAMETERS:
            raise VPruneError(
                f"this scorer would have {count} parameters, at most {MOST_PARAMETERS} are meant: fewer channels, "
                "matches or contents"
            )

    def forward(
        self,
        maps: Tensor,
        grid: Grid,
        visual: Tensor | None = None,
        text: Tensor | None = None,
        text_valid: Tensor | None = None,
    ) -> Tensor:
        """The scores alone, as `seen` gives them, of rows as `read` takes them."""
        return self.seen(maps, grid, self.read(visual, text, text_valid))[0]

    def seen(self, maps: Tensor, grid: Grid, read: Read | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores of I images of one grid (t, h, w), N = t h w tokens each, and what `summary` takes beside them.

        Args:
            maps: [I, 2 * heads, N] attention, means then maxima.
            grid: of every image.
            read: what `read` makes of the rows, where the network reads them.

        Returns:
            The scores [I, N] between -8 and 8, what the last convolution made of every token [I, C, N], and the
            question [I, C'], None where the network does not read it.
        """
        t, h, w = grid
        tokens = t * h * w
        channels, asked = ([], None) if read is None else read
        attention = torch.add(self.floor, maps, alpha=tokens).log()
        x = pointwise(self.entry, torch.cat([attention.transpose(1, 2), *channels], -1))
        x = x.reshape(-1, *((1, h * w) if self.config.layout == "line" else (h, w)), x.shape[-1])
        norms = self.norms[None] if asked is None else linear(asked, self.modulation.weight, self.norms)
        gains_and_offsets = iter(torch.split(norms, self._widths, -1))
        for convolution in self.convolutions:
            x = convolution(x, next(gains_and_offsets), next(gains_and_offsets), t)
        x = x.reshape(-1, tokens, x.shape[-1])
        scores = pointwise(self.exit, x).squeeze(-1)
        return _RANGE * torch.tanh(scores / _RANGE), x.transpose(1, 2), asked

    def read(self, visual: Tensor | None, text: Tensor | None, valid: Tensor | None = None) -> Read | None:
        """What `seen` takes of the rows of I images and their questions; None where the network reads no rows.

        Args:
            visual: [I, N, D] rows of the tokens.
            text: [I, R, D] instruction rows.
            valid: bool [I, R], those that count; None = all.

        Returns:
            Channels of every token, each [I, N, ...], and the question [I, C'].
        """
        if not self.config.width:
            return None
        assert visual is not None and text is not None
        visual, text = (layer_norm(rows, rows.shape[-1:]) for rows in (visual, text))
        nothing = text.new_zeros((len(text), 2, text.shape[-1]))
        text = torch.cat([nothing, text if valid is None else text * valid[..., None]], 1)
        queries = self.queries(torch.cat([text[:, 2:], text[:, 1:-1], text[:, :-2]], -1))
        question = mean_of_valid(queries, None if valid is None else valid[..., None], 1)
        heads, width = self.config.matches, self.config.match_width
        keys, contents = torch.split(self.keys(visual), [heads * width, self.config.contents], -1)
        # (The mean over rows of what they find is what their mean finds.)
        asking = torch.cat([question, queries], 1).view(len(text), -1, heads, width).transpose(1, 2) / width**0.5
        found = asking @ keys.view(*keys.shape[:2], heads, width).permute(0, 2, 3, 1)
        ones = found[:, :, 1:] if valid is None else found[:, :, 1:].masked_fill(~valid[:, None, :, None], -1e4)
        channels = [contents, found[:, :, 0].transpose(1, 2), ones.amax(2).transpose(1, 2)]
        return channels, silu(self.question(question[:, 0]))

    def price_of(self, keep: float) -> float | None:
        """What a token must be worth where `keep` of all tokens stay; None where every question gets `keep`.

        Straight lines between the logarithms of `config.prices`; None below the first of these, and beyond the last,
        from where on the network sees no use in more tokens.
        """
        known = self.config.prices
        for (low, dear), (high, cheap) in pairwise(known):
            if low <= keep <= high:
                part = math.log(keep / low) / math.log(high / low)
                return math.exp(math.log(dear) * (1 - part) + math.log(cheap) * part)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        text = json.dumps(asdict(self.config), indent=2, sort_keys=True)
        (save_directory / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ScorerNetwork:
        """Read a scorer from a folder that `save_pretrained` wrote, on the CPU.

        Raises:
            VPruneError: no folder, no scorer in it, or one that is cut short.
        """
        folder = scorer_folder(folder)
        known = {one.name for one in fields(ScorerConfig)}
        try:
            content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            network = cls(ScorerConfig(**{key: value for key, value in content.items() if key in known}))
            state = load_file(folder / _WEIGHTS)
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            raise VPruneError(
                f"checkpoint={folder} holds no whole scorer: {_CONFIG} or {_WEIGHTS} is broken ({error}); {_REMEDY}"
            ) from error
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            wanted, held = (sum(part.numel() for part in one.values()) for one in (network.state_dict(), state))
            raise VPruneError(
                f"checkpoint={folder} does not fit its own config.json: {held} numbers for {wanted}"
            ) from error
        return network.eval()


def scorer_folder(folder: str | Path, option: str = "checkpoint") -> Path:
    """The folder of a scorer, which `option` named, and whose files are there, whatever is in them.

    Raises:
        VPruneError: one of them is not, or the folder itself.
    """
    folder = Path(folder).expanduser()
    missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
    if not folder.is_dir():
        raise VPruneError(f"{option}={folder}: there is no such folder; {_REMEDY}")
    if missing:
        inside = folder / FINISHED
        remedy = f"did you mean {inside}?" if (inside / _CONFIG).is_file() else _REMEDY
        raise VPruneError(f"{option}={folder} holds no whole scorer: {' and '.join(missing)} missing; {remedy}")
    return folder


def mean_of_valid(rows: Tensor, valid: Tensor | None, dim: int) -> Tensor:
    """The mean over the rows along `dim` that are valid (bool, 1 where a dimension is not theirs; None = all)."""
    if valid is None:
        return rows.mean(dim, keepdim=True)
    return (rows * valid).sum(dim, keepdim=True) / valid.sum(dim, keepdim=True).clamp(min=1)


def attention_statistics(weights: Tensor, row_valid: Tensor | None) -> Tensor:
    """Mean and maximum over instruction rows: [B, H, R, N], bool [B, R] (None = all) -> [B, 2 H, N]."""
    if row_valid is None:
        return torch.cat([weights.mean(2), weights.amax(2)], 1)
    valid = row_valid[:, None, :, None]
    return torch.cat([mean_of_valid(weights, valid, 2).squeeze(2), (weights * valid).amax(2)], 1)


def same_grid(grids: Sequence[Grid]) -> dict[Grid, list[int]]:
    """The numbers of the images of each grid."""
    groups: dict[Grid, list[int]] = {}
    for number, grid in enumerate(grids):
        groups.setdefault(grid, []).append(number)
    return groups
