"""Processors of the true classes, as small as the models of `families`, and prompts for them."""

from __future__ import annotations

from typing import Any

from tests.conftest import SPECIAL, WORDS
from tests.exactness.families import END, IMAGE, QWEN, START, TEXT, VIDEO, _lined

TILE, PATCH = 32, 4  # pixels; families with line breaks take the tile of their own config
PER_TILE = 16  # tokens of a tile of 8 x 8 patches, 2 x 2 of which become one
# What a prompt holds in place of a picture or a video, where that is more or other than its token.
MARKS = {**dict.fromkeys(QWEN, "<start>{}<end>"), "gemma3": "<start>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% elif part['type'] == 'video' %}VIDEO "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def build_tokenizer() -> Any:
    """One token a word; visual tokens have the ids of `families` and every name that some processor asks for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    visual = {IMAGE: "<image>", VIDEO: "<video>", START: "<start>", END: "<end>"}
    tags = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tags += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    known = dict(enumerate([*SPECIAL.values(), *WORDS, *tags])) | visual
    vocabulary = {known.get(number, f"<unused_{number}>"): number for number in range(TEXT["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {
        **dict.fromkeys(["image_token", "context_image_token"], "<image>"),
        "video_token": "<video>",
        **dict.fromkeys(["vision_start_token", "start_image_token", "boi_token"], "<start>"),
        **dict.fromkeys(["vision_end_token", "end_image_token", "eoi_token"], "<end>"),
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", extra_special_tokens=names, **SPECIAL
    )
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    return tokenizer


def build_processor(family: str) -> Any:
    """The true processor of a family, for its model in `families`."""
    import transformers as hf

    template = TEMPLATE.replace("IMAGE", mark(family)).replace("VIDEO", mark(family, video=True))
    common: dict[str, Any] = {"tokenizer": build_tokenizer(), "chat_template": template}
    tile = {"height": TILE, "width": TILE}
    if family in QWEN:
        shape = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
        edges = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}  # pixels of a picture, or of one frame
        images = hf.Qwen2VLImageProcessor(size=edges, **shape)
        if family == "qwen3_vl":  # of all frames together
            frames = {**edges, "longest_edge": 4 * edges["longest_edge"]}
            videos = hf.Qwen3VLVideoProcessor(size=frames, do_sample_frames=False, **shape)
            return hf.Qwen3VLProcessor(images, video_processor=videos, **common)
        videos = hf.Qwen2VLVideoProcessor(size=edges, **shape)
        kind = hf.Qwen2VLProcessor if family == "qwen2_vl" else hf.Qwen2_5_VLProcessor
        return kind(images, video_processor=videos, **common)
    if family in ("idefics3", "smolvlm"):
        sides = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
        common["image_seq_len"] = PER_TILE
        if family == "idefics3":
            return hf.Idefics3Processor(hf.Idefics3ImageProcessor(**sides), **common)
        videos = hf.SmolVLMVideoProcessor(**sides)
        return hf.SmolVLMProcessor(hf.SmolVLMImageProcessor(**sides), video_processor=videos, **common)
    if family == "internvl":
        images, videos = hf.GotOcr2ImageProcessor(size=tile, max_patches=4), hf.InternVLVideoProcessor(size=tile)
        return hf.InternVLProcessor(images, video_processor=videos, image_seq_length=PER_TILE, **common)
    if family == "gemma3":
        return hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=tile), image_seq_length=PER_TILE, **common)
    side = lined_side()
    tile = {"height": side, "width": side}
    points = _lined()["image_grid_pinpoints"]
    common["vision_feature_select_strategy"] = "default"  # the tower has a class token, which the model drops
    if family == "llava_next":
        images = hf.LlavaNextImageProcessor(size={"shortest_edge": side}, crop_size=tile, image_grid_pinpoints=points)
        return hf.LlavaNextProcessor(images, patch_size=PATCH, num_additional_image_tokens=1, **common)
    images = hf.LlavaOnevisionImageProcessor(size=tile, image_grid_pinpoints=points)
    videos = hf.LlavaOnevisionVideoProcessor(size=tile)
    tokens = (side // PATCH) ** 2 + 1
    return hf.LlavaOnevisionProcessor(images, video_processor=videos, num_image_tokens=tokens, **common)


def lined_side() -> int:
    """The side, in pixels, of a tile of the families with line breaks."""
    side: int = _lined()["vision_config"]["image_size"]
    return side


def mark(family: str, video: bool = False) -> str:
    """What the family's processor exchanges for the tokens of a picture (or of a video)."""
    return MARKS.get(family, "{}").format("<video>" if video else "<image>")
