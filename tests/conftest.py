"""A tiny model of a true class with random weights, and a processor made on the spot: everything runs offline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from tests import compatibility

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", metavar="FILE", help="write the matrix of families and scenarios into FILE")


def pytest_configure(config: pytest.Config) -> None:
    compatibility.configure(config)


GRID = 6
PATCH = 8
WORDS = [
    "what",
    "where",
    "is",
    "the",
    "a",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "number",
    "count",
    "left",
    "right",
    "above",
    "of",
    "?",
    ".",
    "user",
    "assistant",
    ":",
    "yes",
    "no",
    "two",
]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def build_processor() -> Any:
    """A word-level tokenizer and an image processor for GRID x GRID patches."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), "<image>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", additional_special_tokens=["<image>"], **SPECIAL
    )
    side = GRID * PATCH
    pixels = SiglipImageProcessor(size={"height": side, "width": side})
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token="<image>",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )


def build_model(
    tower: str = "siglip", attention: str = "sdpa", dtype: torch.dtype = torch.float32, width: int = 32
) -> Any:
    """A random LLaVA: three layers of tower (`clip`: with a class token), a projector, three of grouped-query
    decoder."""
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    pixels = {"image_size": GRID * PATCH, "patch_size": PATCH}
    vision: Any = (
        SiglipVisionConfig(**sizes, **pixels, vision_use_head=False)
        if tower == "siglip"
        else CLIPVisionConfig(**sizes, **pixels)
    )
    vocabulary = 5 + len(WORDS)
    text = Qwen2Config(
        vocab_size=vocabulary,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=4,
        vision_feature_layer=-1 if tower == "siglip" else -2,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        image_seq_length=GRID * GRID,
        pad_token_id=0,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():  # lively enough that attention is far from flat
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.35)
    model.generation_config.eos_token_id = None  # every answer has the length asked for
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def picture(seed: int = 0, size: tuple[int, int] = (64, 80)) -> Image.Image:
    """A random picture with some structure."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def tiny_vlm() -> Callable[..., Any]:
    """`tiny_vlm(tower="siglip", attention="sdpa", dtype=torch.float32)` -> a model; the same arguments give the same
    object."""
    made: dict[tuple[Any, ...], Any] = {}

    def make(tower: str = "siglip", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        key = (tower, attention, dtype)
        if key not in made:
            made[key] = build_model(tower, attention, dtype)
        return made[key]

    return make


@pytest.fixture(scope="session", autouse=True)
def stand_in_scorers() -> Iterator[None]:
    """For models with random weights, `method=learned` gets a network with random weights: what it computes is tested,
    not how well it chooses."""
    from vprune.scoring import learned
    from vprune.scoring.network import ScorerConfig, ScorerNetwork

    shipped_for, patch = learned._shipped_for, pytest.MonkeyPatch()

    def stand_in(own: dict[str, Any], drops: bool) -> Any:
        network = shipped_for(own, drops)
        if network is None and own["hidden_size"] <= 64:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(own["hidden_size"])
                shape: Any = {"channels": (16, 16), "kernels": (3, 3), "dilations": (1, 1), "matches": 2, "contents": 8}
                heads, width = own["num_attention_heads"], own["hidden_size"]
                network = ScorerNetwork(ScorerConfig(heads=heads, width=width, model=own, **shape)).eval()
        return network

    patch.setattr(learned, "_shipped_for", stand_in)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_processor() -> Any:
    """The processor of `tiny_vlm`."""
    return build_processor()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its processor, as from_pretrained loads them."""
    folder = tmp_path_factory.mktemp("tiny_vlm")
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder
