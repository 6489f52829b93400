"""Prefills written out by hand, and a decoder deep enough for stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.conftest import build_model
from vprune.records import Grid, Prefill, Selection, TowerImage, VisualTokens


def prefill(
    tokens: list[list[float]],
    text: list[list[float]] | None = None,
    keys: list[list[float]] | None = None,
    grid: Grid | None = None,
) -> Prefill:
    """One sample: the visual tokens of one image, and the instruction behind them; keys of a single head."""
    rows = torch.tensor([*tokens, *(text or [[0.0] * len(tokens[0])])])
    count = len(tokens)
    visual = (torch.arange(len(rows)) < count)[None]
    grid = grid or (1, 1, count)
    watched = TowerImage(grid, keys=None if keys is None else torch.tensor(keys)[:, None])
    image = VisualTokens(0, 0, torch.arange(count), grid, origin=0)
    anything: Any = None
    valid, positions = torch.ones_like(visual), torch.arange(len(rows))
    return Prefill(anything, rows[None], positions, valid, visual, [image], [watched], None, None, 0, anything)


def rows_of(selection: Selection) -> dict[int, dict[int, float]]:
    """What every row is made of: where it stands -> {token: its share}."""
    made: dict[int, dict[int, float]] = {int(place): {} for place in selection.kept}
    for token, row in enumerate(selection.source.tolist()):
        if row >= 0 and float(selection.weights[token]):
            made[int(selection.kept[row])][token] = round(float(selection.weights[token]), 6)
    return made


def deep_vlm(layers: int = 8, tower: str = "siglip", dtype: torch.dtype = torch.float64) -> Any:
    """The tiny model of the tests with a decoder of so many layers."""
    from transformers import LlavaForConditionalGeneration

    config = build_model(tower).config
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def attentions(model: Any, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """The whole attention [B, H, L, L] of a layer of the model, unpruned."""
    own = model.get_decoder().config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen: Tensor = model(**inputs, output_attentions=True).attentions[layer]
    finally:
        model.set_attn_implementation(own)
    return seen
