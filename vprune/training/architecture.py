"""The embedded vision-language model: a true LLaVA of 11.6 M parameters with tokenizer, processor and chat template."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from vprune.eval.scenes.questions import words
from vprune.eval.scenes.world import CELL, SIDE

SPECIAL = ("<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>")
PAD, UNKNOWN, USER, ASSISTANT, END, IMAGE = range(len(SPECIAL))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-case word-level tokenizer over the words of the scenes world; numbers are read digit by digit."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words()])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL[UNKNOWN], max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        unk_token=SPECIAL[UNKNOWN],
        eos_token=SPECIAL[END],
        additional_special_tokens=[SPECIAL[USER], SPECIAL[ASSISTANT], SPECIAL[IMAGE]],
        padding_side="left",
        model_max_length=4096,
    )


def build_processor() -> LlavaProcessor:
    """Image processor (384 x 384, scaled to -1..1), tokenizer and chat template in one."""
    size = {"height": SIDE, "width": SIDE}
    image_processor = SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(  # type: ignore[no-untyped-call]  # the same
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=SPECIAL[IMAGE],
        num_additional_image_tokens=0,
    )


def build_model(vision: dict[str, Any], text: dict[str, Any], seed: int = 0) -> LlavaForConditionalGeneration:
    """An untrained embedded model.

    Args:
        vision: fields of SiglipVisionConfig beside image and patch size.
        text: fields of Qwen2Config beside the vocabulary.
        seed: seed of the initial weights.
    """
    vision_config = SiglipVisionConfig(image_size=SIDE, patch_size=CELL, vision_use_head=False, **vision)
    vocabulary = -(-(len(SPECIAL) + len(words())) // 32) * 32
    text_config = Qwen2Config(
        vocab_size=vocabulary,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
        tie_word_embeddings=True,
        **text,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(SIDE // CELL) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    model.generation_config.do_sample = False
    return model
