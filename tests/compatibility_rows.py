"""What the page of compatibility has rows and columns for: which tests show which scenario."""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "gemma3": "Gemma 3",
}
MORE = {
    "vipllava": "VipLLaVA",
    "llava_next_video": "LLaVA-NeXT-Video",
    "pixtral": "LLaVA with Pixtral's tower",
    "mistral3": "Mistral 3",
    "paligemma": "PaliGemma",
    "aya_vision": "Aya Vision",
    "cohere2_vision": "Cohere 2 Vision",
    "ovis2": "Ovis 2",
    "got_ocr2": "GOT-OCR 2",
}
BACKENDS = {
    "eager": r"[\[-]eager\b|test_eager",
    "flex (uncompiled)": r"flex_attention",
    "flash (emulated)": r"flash_attention",
}


@dataclass(frozen=True)
class Row:
    """A scenario, and a pattern of the tests that show it; of several rows that fit, the first one counts.

    `family`: of tests whose parameters name none. `everywhere`: a refusal that is no matter of families.
    """

    scenario: str
    pattern: str
    family: str = "llava"
    everywhere: bool = False


MASKED = r"test_families.py::test_pruned_is_the_masked_model\[.*"
UNHOOKED = r"test_families.py::test_keeping_all_is_the_unhooked_model\[.*"
ORACLE = r"test_masked_oracle.py::test_every_"
UNNAMED = r"test_more_families.py::test_families_that_nobody_named\w+\["
ROWS = (
    # One row a layout of the batch, pictures before videos.
    Row("one picture", rf"{MASKED}plain.*-single\]|{ORACLE}method\w+\[\w+-plain-single"),
    Row(
        "a left-padded batch",
        rf"{MASKED}plain.*-padded\]|{ORACLE}method\w+\[\w+-plain-padded|{UNNAMED}\w+-padded-plain",
    ),
    Row(
        "several pictures, of unequal sizes",
        rf"{MASKED}plain.*-several\]|{ORACLE}method\w+\[\w+-plain-several|{UNNAMED}\w+-several-plain",
    ),
    Row(
        "rows with 0, 1 and 2 pictures of unequal sizes",
        rf"{MASKED}plain.*-mixed\]|{ORACLE}method\w+\[\w+-plain-mixed|{UNNAMED}\w+-mixed-plain",
    ),
    Row("one video", rf"{MASKED}plain.*-single-video\]"),
    Row("a left-padded batch of videos", rf"{MASKED}plain.*-padded-video\]"),
    Row("several videos", rf"{MASKED}plain.*-several-video\]"),
    Row("rows with 0, 1 and 2 videos", rf"{MASKED}plain.*-mixed-video\]"),
    Row(
        "recycled into grid means, sizes counted",
        rf"{MASKED}sizes.*|{UNNAMED}.*sizes|{ORACLE}method\w+\[\w+-sizes-",
    ),
    Row("recycled in other ways", rf"{ORACLE}method|test_recycling.py::test_(recycled_in_stages|identical_copies)"),
    Row(
        "the true processor's batch, README's call", r"test_processors.py::test_(the_processors|the_snippet|a_tokeniz)"
    ),
    Row("the true processor's videos, with pictures", r"test_processors.py::test_(videos|pictures)"),
    Row(
        "keep=all is the unhooked model",
        rf"{UNHOOKED}|test_identity.py::test_every_method|test_processors.py::test_keep",
    ),
    Row("keep=all: beams and samples", r"test_families.py::test_keeping_all_in_other|test_identity.py::test_every_way"),
    Row("beam search", r"::test_beams_score|test_every_way_of_decoding\[\w+-beam|test_copies_of_several_images\[beam"),
    Row(
        "sampling",
        r"::test_sampled_words|test_every_way_of_decoding\[\w+-(sample|returns)|test_copies_of_several_images",
    ),
    Row("greedy, with and without sizes", r"test_masked_oracle.py::test_every_way_of_decoding"),
    Row("prompt lookup", r"::test_guessed_words\w+\[.*prompt|test_cache.py::test_prompt_lookup|test_guesses_after"),
    Row("assisted decoding", r"::test_guessed_words"),
    Row("a loop of one's own", r"::test_a_loop_of_ones_own"),
    Row("inputs_embeds: forward", r"::test_embeddings_in_place_of_ids"),
    Row("inputs_embeds: generate", r"::test_generating_from_embeddings"),
    Row("labels: loss and gradients", r"::test_training_learns"),
    Row("return_dict=False, logits_to_keep, hidden states", r"::test_every_kind_of_output|test_stages.py::test_hidden"),
    Row("attentions", r"::test_attentions_are"),
    Row("a row of text alone is the longest", r"::test_the_longest_row"),
    Row("a placeholder that the model says", r"::test_a_placeholder_that"),
    Row("a second turn of text", r"test_families.py::test_a_second_turn|oracle.py::test_a_second_turn\w+\[.*-text\]"),
    Row("padding in a second turn", r"::test_words_of_a_later_turn"),
    Row(
        "a second turn with pictures",
        r"::test_a_second_turn_brings|oracle.py::test_a_second_turn|_in_a_second_turn_with",
    ),
    Row("two turns at keep=all", r"::test_two_turns_that_keep_all"),
    Row("a second turn on a cache filled unpruned", r"::test_a_cache_that_was_filled_unpruned"),
    Row("caches copied and cropped", r"::test_copies_and_crops|test_cache.py::test_(crop_copy|rows_follow)"),
    Row("stages: middle", r"::test_every_layer_sees\w+\[\w+-middle"),
    Row("stages: input and middle", r"::test_every_layer_sees\w+\[\w+-input-middle"),
    Row("stages: every layer", r"::test_every_layer_sees\w+\[\w+-every"),
    Row("maps of layers that would have to run ahead", r"::test_maps_of_layers_that_would"),
    Row("stages, a second turn of text", r"::test_a_second_turn_of_text_after_stages"),
    Row("stages that keep all", r"::test_stages_that_keep_all"),
    Row("stages on eager attention", r"::test_eager_attention_agrees_after_stages"),
    Row("budgets per sample and per frame, minimum", r"::test_every_budget_equals"),
    Row(
        "other methods: random, uniform, pool, attention_max", r"::test_other_methods\w+\[\w+-(random|uniform|pool|att)"
    ),
    Row("method=vision", r"::test_other_methods\w+\[\w+-vision"),
    Row("method=resize", r"::test_other_methods\w+\[\w+-resize|::test_resize_equals"),
    Row("method=vflowopt (in stages)", r"test_vflow.py::test_it_equals_the_masked_model"),
    Row("static cache", r"test_static.py::test_(a_static_cache_(gives|under)|keeping_all|a_second_turn)"),
    Row("static cache, compiled decoding steps", r"test_static.py::test_(decoding_steps|steps_compiled)"),
    Row("input, stages and keep=all on another attention", r"backends.py::test_fl\w+_agrees\[\w+-(input|all|stages)-"),
    Row("sizes on another attention", r"backends.py::test_flex_attention_agrees|test_sizes_are_refused"),
    Row("static cache with sliding windows", r"test_static.py::test_a_static_cache_with_windows", "gemma3"),
    Row("sliding windows on another attention", r"test_backends.py::test_windows_are_refused", "gemma3"),
    Row("dispatched by accelerate: hooks, disk, offload", r"test_devices.py::test_a_dispatched_model"),
    Row("int8 linear layers", r"test_devices.py::test_a_quantised"),
    Row("adapters (PEFT)", r"test_wrapped.py::test_(pruning_through|an_adapter|peft)"),
    Row("leaving restores everything", r"::test_leaving_restores"),
    Row("videos without line breaks", r"::test_videos_without_line_breaks", "llava_next_video"),
    Row("patches merged in a way that no config names", r"::test_a_family_that_merges", "got_ocr2"),
    Row("the same, names of configs taken away", r"::test_(towers_that|pictures_are_never_taken_for_one_where)"),
    Row("four pictures never taken for one", r"::test_pictures_are_never_taken"),
    Row("method=vision on towers of one row", r"::test_the_attention_of_pictures_in_one_row", "pixtral"),
    Row("a prefix that sees itself both ways", r"test_more_families.py::test_a_prefix", "paligemma"),
    Row(
        "no vision-language model, or hidden in a wrapper", r"_mistakes.py::test_a_model_|wrapper_that_hides", "", True
    ),
    Row("callers' masks, chunked prefill", r"test_mistakes.py::test_what_cannot", "", True),
    Row("pruned already", r"::test_nesting_is_refused", "", True),
    Row("cropped into a picture", r"::test_cropping_into_a_picture", "", True),
    Row("compiled as a whole", r"::test_a_model_compiled_as_a_whole", "", True),
    Row("gradient checkpointing", r"::test_checkpointed_layers", "", True),
)
