from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

WORDS = "is there a red blue circle star yes no what colour list the objects where , x00 x01 y00 y01"
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}answer {% endif %}"
)
SIDE = 32
TOKENS = 16


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of 16 visual tokens, saved with its processor and chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
        Qwen2Config,
        SiglipVisionConfig,
    )

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<image>", "answer", *WORDS.split()])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": SIDE, "width": SIDE}, do_center_crop=False, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHAT,
        num_additional_image_tokens=0,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=8,
        ),
        text_config=Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        ),
        image_token_id=vocabulary["<image>"],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():  # random weights of the usual scale answer everything alike
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_benchmark(folder: Path, rows: list[dict[str, Any]], images: int = 4, evidence: bool = True) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    annotations = []
    for i in range(images):
        Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"images/{i}.png")
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
        mask[:8, 8 : 16 + i] = 1
        rle = coco_mask.encode(mask)
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "segmentation": segmentation, "area": 1, "iscrowd": 0}
        )
    if evidence:
        sizes = [{"id": i, "file_name": f"images/{i}.png", "height": SIDE, "width": SIDE} for i in range(images)]
        content = {"images": sizes, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        (folder / "objects.json").write_text(json.dumps(content))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sample_rows(count: int = 12, images: int = 4, evidence: bool = True) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        kind = ("exists", "colour", "list", "refer")[i % 4]
        question, answer = {
            "exists": ("is there a red circle", "yes"),
            "colour": ("what colour is the star", "blue"),
            "list": ("list the objects", "red circle , blue star"),
            "refer": ("where is the star", "x00 y01"),
        }[kind]
        row: dict[str, Any] = {"id": f"s{i}", "image": f"images/{i % images}.png", "kind": kind}
        row |= {"question": question, "answer": answer}
        row |= {"box": [0, 16, 16, 32]} if kind == "refer" else {}
        row |= {"evidence": [i % images]} if evidence and i % 3 else {}
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("benchmarks") / "made", sample_rows())
