"""What vprune takes for granted about the inside of transformers: one small test each, to be read first after an
upgrade of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tests.exactness.families import FAMILIES, batch, build
from tests.exactness.more_families import MORE, inputs_of

ATTACH, ANATOMY, TOWER = "vprune/attach.py", "vprune/models/anatomy.py", "vprune/models/tower.py"
CACHE, MASKS, PREFILL, PROBE = (f"vprune/models/{name}.py" for name in ("cache", "masks", "prefill", "probe"))
PASSAGE, MERGING = "vprune/passage.py", "vprune/models/merging.py"
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TILED = ("llava_next", "llava_onevision")


def stands(holds: Any, assumption: str, module: str) -> None:
    import transformers

    assert holds, f"transformers {transformers.__version__}: no longer true that {assumption}; {module} stands on it"


@pytest.fixture(scope="module")
def made() -> Callable[[str], Any]:
    models: dict[str, Any] = {}

    def make(family: str) -> Any:
        if family not in models:
            models[family] = build(family, torch.float32)
        return models[family]

    return make


def seen_by(module: nn.Module, run: Callable[[], Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of every call of a module during `run`."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    return calls


def named_caches(names: Iterable[str]) -> set[str]:
    """What the cache is called: `cache` from transformers 5.24 on, `past_key_values` before (vprune.models.cache)."""
    return {"cache", "past_key_values"} & set(names)


PARTS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "placeholder": (lambda m: isinstance(m.config.image_token_id, int), "config.image_token_id is a number", ANATOMY),
    "get_decoder": (lambda m: isinstance(m.get_decoder(), nn.Module), "get_decoder() gives a module", ANATOMY),
    "layers": (lambda m: len(m.get_decoder().layers) == 3, "the decoder has its blocks in .layers", ANATOMY),
    "base": (
        lambda m: any(child is m.get_decoder() for child in m.model.children()),
        "model.model holds the decoder itself",
        ANATOMY,
    ),
    "tower": (
        lambda m: any(
            isinstance(getattr(m.model, n, None), nn.Module) for n in ("vision_tower", "visual", "vision_model")
        ),
        "the tower is model.model.vision_tower, .visual or .vision_model",
        ANATOMY,
    ),
    "backend": (
        lambda m: m.get_decoder().config._attn_implementation == "sdpa",
        "the decoder's config tells its attention implementation in _attn_implementation",
        ANATOMY,
    ),
    "embeddings": (
        lambda m: m.get_decoder().get_input_embeddings()(torch.tensor([1])).shape[-1] == 32,
        "the decoder has get_input_embeddings()",
        ANATOMY,
    ),
    "attention-config": (
        lambda m: all(layer.self_attn.config is m.get_decoder().config for layer in m.get_decoder().layers),
        "layers[i].self_attn.config is the decoder's config",
        PROBE,
    ),
    "norm": (
        lambda m: all(isinstance(layer.input_layernorm, nn.Module) for layer in m.get_decoder().layers),
        "layers[i].input_layernorm comes before self_attn",
        PROBE,
    ),
    "rotary": (
        lambda m: {"x", "position_ids"} <= set(signature(m.get_decoder().rotary_emb.forward).parameters),
        "decoder.rotary_emb(x, position_ids) makes the rotations",
        PROBE,
    ),
    "attention-arguments": (
        lambda m: (
            {"hidden_states", "position_embeddings", "attention_mask"}
            <= set(signature(m.get_decoder().layers[0].self_attn.forward).parameters)
            and named_caches(signature(m.get_decoder().layers[0].self_attn.forward).parameters)
        ),
        "self_attn takes hidden_states, position_embeddings, attention_mask and cache (or past_key_values) by name",
        PROBE,
    ),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_names_its_parts(made: Any, family: str, part: str) -> None:
    holds, assumption, module = PARTS[part]
    stands(holds(made(family)), f"in {family} {assumption}", module)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_called_by_name(made: Any, family: str) -> None:
    model, inputs = made(family), batch(family, "padded", torch.float32)
    ((args, kwargs),) = seen_by(model.get_decoder(), lambda: model(**inputs))
    named = {"inputs_embeds", "attention_mask", "position_ids"}
    stands(not args and named <= set(kwargs), f"{family} calls its decoder with {sorted(named)} by name", ATTACH)
    stands(named_caches(kwargs), f"{family} calls its decoder with cache or past_key_values by name", CACHE)
    ((args, kwargs),) = seen_by(model.model, lambda: model(**inputs))
    stands("attention_mask" in kwargs and "pixel_values" in kwargs, f"{family} passes pixels on by name", ATTACH)
    masks = kwargs["attention_mask"]
    stands(torch.equal(masks, inputs["attention_mask"]), f"{family} passes the caller's mask on to its base", ATTACH)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_called_with_hidden_states_first(made: Any, family: str) -> None:
    model, inputs = made(family), batch(family, "padded", torch.float32)
    for layer in model.get_decoder().layers:
        ((args, kwargs),) = seen_by(layer, lambda: model(**inputs))
        stands(args and args[0].shape[:2] == inputs["input_ids"].shape, "args[0] of a layer is [B, L, D]", ATTACH)
        stands(named_caches(kwargs), f"{family} calls its layers with cache or past_key_values by name", CACHE)
        named = {"attention_mask", "position_embeddings"} - set(kwargs)
        stands(not named, f"{family} calls its layers with {sorted(named)} by name", PASSAGE)
        rope = kwargs["position_embeddings"]
        stands(isinstance(rope, tuple) and len(rope) == 2, "position_embeddings are (cosines, sines)", PASSAGE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_given_pixels(made: Any, family: str) -> None:
    model, inputs = made(family), batch(family, "padded", torch.float32)
    base = model.model
    tower = next(one for n in ("vision_tower", "visual", "vision_model") if (one := getattr(base, n, None)) is not None)
    args, kwargs = seen_by(tower, lambda: model(**inputs))[0]
    pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
    stands(
        pixels.ndim == (2 if family in QWEN else 4), f"{family}'s tower reads pixel_values or its first argument", TOWER
    )
    stands(family not in QWEN or "grid_thw" in kwargs, f"{family}'s tower is given grid_thw by name", TOWER)
    stands(family in QWEN or hasattr(tower.config, "patch_size"), f"{family}'s tower has config.patch_size", TOWER)


SIDES = {
    **{family: lambda c: c.vision_config.spatial_merge_size for family in QWEN},
    "mistral3": lambda c: c.spatial_merge_size,
    "aya_vision": lambda c: c.downsample_factor,
    "cohere2_vision": lambda c: c.downsample_factor,
    "ovis2": lambda c: c.vision_config.hidden_stride,
    "internvl": lambda c: c.downsample_ratio,
    "idefics3": lambda c: c.scale_factor,
    "smolvlm": lambda c: c.scale_factor,
    "gemma3": lambda c: c.mm_tokens_per_image,
}


@pytest.mark.parametrize("family", SIDES)
def test_the_config_tells_how_patches_merge(made: Any, family: str) -> None:
    with patch.dict(FAMILIES, MORE):
        config = made(family).config
    stands(isinstance(SIDES[family](config), (int, float)), f"{family}'s config has its merge side", MERGING)


@pytest.mark.parametrize("family", ["mistral3", "pixtral"])
def test_pictures_of_unequal_sizes_are_given_with_these(made: Any, family: str) -> None:
    with patch.dict(FAMILIES, MORE):
        model, inputs = made(family), inputs_of(family, "several", torch.float32)
    ((_, kwargs),) = seen_by(model.model.vision_tower, lambda: model(**inputs))
    sizes = kwargs.get("image_sizes")
    told = sizes is not None and torch.equal(torch.as_tensor(sizes), inputs["image_sizes"])
    stands(told, f"{family}'s tower is given image_sizes by name, in pixels", TOWER)


@pytest.mark.parametrize("family", TILED)
def test_line_breaks_are_a_parameter(made: Any, family: str) -> None:
    stands(isinstance(made(family).model.image_newline, Tensor), f"{family} has model.model.image_newline", ANATOMY)


def test_visual_features_between_layers(made: Any) -> None:
    model, inputs = made("qwen3_vl"), batch("qwen3_vl", "padded", torch.float32)
    ((_, kwargs),) = seen_by(model.get_decoder(), lambda: model(**inputs))
    marks, features = kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"]
    stands(marks.dtype == torch.bool and marks.ndim == 2, "visual_pos_masks is bool [B, L]", PREFILL)
    stands(all(len(one) == int(marks.sum()) for one in features), "deepstack_visual_embeds has a row a place", PREFILL)


def test_finished_masks_are_a_dictionary(made: Any) -> None:
    model, inputs = made("gemma3"), batch("gemma3", "padded", torch.float32)
    ((_, kwargs),) = seen_by(model.get_decoder(), lambda: model(**inputs))
    masks = kwargs["attention_mask"]
    stands(isinstance(masks, dict) and set(masks) == {"full_attention", "sliding_attention"}, "masks by kind", MASKS)
    stands(all(one.ndim == 4 for one in masks.values()), "Gemma 3 finishes masks [B, 1, L, L] itself", MASKS)
    config = model.get_decoder().config
    stands(
        config.layer_types and config.sliding_window, "config.layer_types and config.sliding_window tell windows", PROBE
    )
    rotary = signature(model.get_decoder().rotary_emb.forward).parameters
    stands("layer_type" in rotary, "Gemma 3's rotary_emb takes layer_type", PROBE)


def test_position_ids_of_four_rows_begin_with_the_text(made: Any) -> None:
    model, inputs = made("qwen2_vl"), batch("qwen2_vl", "single", torch.float32)
    calls = seen_by(model.get_decoder(), lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False))
    rows = {kwargs["position_ids"].shape[0] for _, kwargs in calls}
    stands(rows <= {3, 4}, "M-RoPE position ids have 3 rows, or 4 with those of the text first", PROBE)
    if 4 in rows:
        first = next(kwargs["position_ids"] for _, kwargs in calls if kwargs["position_ids"].shape[0] == 4)
        stands(torch.equal(first[0, 0], torch.arange(first.shape[-1])), "the first of 4 rows counts the text", PROBE)


def test_the_attention_interface_takes_newcomers(made: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    seen: list[dict[str, Any]] = []

    def stop(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append({"query": query, "key": key, **kwargs})
        raise InterruptedError

    AttentionInterface.register("made_up", stop)
    config = made("qwen2_vl").get_decoder().config
    try:
        stands("made_up" in AttentionInterface._global_mapping, "_global_mapping holds what was registered", PROBE)
        stands("made_up" in ALL_ATTENTION_FUNCTIONS, "ALL_ATTENTION_FUNCTIONS reads the global mapping", PROBE)
        config._attn_implementation = "made_up"
        with pytest.raises(InterruptedError), torch.no_grad():
            made("qwen2_vl").get_decoder()(inputs_embeds=torch.randn(1, 5, 32))
    finally:
        config._attn_implementation = "sdpa"
        AttentionInterface._global_mapping.pop("made_up", None)
    shapes = [tuple(seen[0][name].shape) for name in ("query", "key")]
    stands(shapes == [(1, 4, 5, 8), (1, 2, 5, 8)], "attention is given queries [B, H, L, D], keys [B, G, L, D]", PROBE)
    stands(seen[0].get("scaling") is not None, "attention is given its scale as `scaling`", PROBE)


def filled(kind: str) -> Any:
    """A cache layer that has seen two rows of five tokens."""
    from transformers import cache_utils

    layer = getattr(cache_utils, kind)(*([8] if kind == "StaticLayer" else []))
    layer.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    return layer


KINDS = ("DynamicLayer", "StaticLayer")


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_layer(kind: str) -> None:
    layer = filled(kind)
    stands(isinstance(layer.keys, Tensor) and isinstance(layer.values, Tensor), f"{kind} has keys and values", CACHE)
    stands(int(layer.get_seq_length()) == 5, f"{kind}.get_seq_length() counts rows stored", CACHE)
    stands({"keys", "values"} <= set(vars(layer)), f"{kind} keeps all in __dict__", CACHE)
    stands(
        bool(getattr(layer, "is_compileable", False)) == (kind == "StaticLayer"), "is_compileable tells kinds", CACHE
    )
    for name in ("reset", "reorder_cache", "get_mask_sizes"):
        stands(callable(getattr(layer, name, None)), f"{kind} has {name}()", CACHE)
    layer.reorder_cache(torch.tensor([1, 0]))
    stands(int(layer.get_seq_length()) == 5, f"{kind}.reorder_cache() keeps the length", CACHE)


def test_a_growing_layer_crops_and_repeats() -> None:
    layer = filled("DynamicLayer")
    stands(
        tuple(layer.get_mask_sizes(1)) == (6, 0) or "cache_position" in str(signature(layer.get_mask_sizes)),
        "get_mask_sizes(queries) is (rows after them, offset)",
        CACHE,
    )
    layer.crop(-2)
    stands(layer.get_seq_length() == 3, "crop(-n) takes n rows off", CACHE)
    layer.batch_repeat_interleave(2)
    stands(layer.keys.shape[0] == 4, "batch_repeat_interleave repeats rows", CACHE)
    layer.batch_select_indices(torch.tensor([0]))
    stands(layer.keys.shape[0] == 1, "batch_select_indices keeps rows", CACHE)


def test_a_layer_of_fixed_size() -> None:
    layer = filled("StaticLayer")
    stands(layer.max_cache_len == 8 and layer.keys.shape[2] == 8, "max_cache_len rows are reserved", CACHE)
    stands(isinstance(layer.cumulative_length, Tensor), "cumulative_length is a tensor that counts rows", CACHE)
    stands(int(layer.cumulative_length.reshape(())) == 5, "cumulative_length holds one number", CACHE)
    layer.reset()
    stands(int(layer.get_seq_length()) == 0, "reset() of a StaticLayer forgets the rows", CACHE)


def test_caches_are_lists_of_layers() -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    cache.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), 0)
    stands(isinstance(cache.layers, list) and type(cache.layers[0]) is DynamicLayer, "cache.layers is a list", CACHE)
    own = type("Own", (DynamicLayer,), {"_layer_type": None})
    other: Any = object.__new__(own)
    other.__dict__ = cache.layers[0].__dict__
    cache.layers[0] = other
    stands(cache.get_seq_length() == 5, "a cache asks its layers, whatever their class", CACHE)
    stands(type(DynamicCache().layers) is list, "a subclass of a layer does not register itself", CACHE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_uses_the_cache_it_is_given(made: Any, family: str) -> None:
    from transformers import DynamicCache

    model, inputs = made(family), batch(family, "single", torch.float32)
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        out = model(**inputs, past_key_values=cache, use_cache=True)
    stands(out.past_key_values is cache and len(cache.layers) == 3, f"{family} fills past_key_values in place", PREFILL)


def test_a_static_cache_is_kept_nowhere_else(made: Any) -> None:
    from transformers import Cache

    model, inputs = made("qwen2_vl"), batch("qwen2_vl", "single", torch.float32)
    model.generate(**inputs, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    held = {name for name, value in vars(model).items() if isinstance(value, Cache)}
    stands(held <= {"_cache"}, f"generate keeps a static cache as model._cache or not at all ({held})", ATTACH)


@pytest.mark.parametrize("family", FAMILIES)
def test_encoded_images_are_handed_on(made: Any, family: str) -> None:
    model, inputs = made(family), batch(family, "single", torch.float32)
    calls = seen_by(model.model, lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False))
    pixels = [any(kwargs.get(n) is not None for n in ("pixel_values", "mm_encoder_outputs")) for _, kwargs in calls]
    stands(pixels == [True, False], "the prefill alone brings pixel_values or mm_encoder_outputs", ANATOMY)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_of_four_dimensions_is_taken_as_it_is(made: Any, family: str) -> None:
    model = made(family)
    embeds = torch.randn(1, 5, 32)
    allowed = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask: Any = allowed if family != "gemma3" else dict.fromkeys(("full_attention", "sliding_attention"), allowed)
    calls = seen_by(
        model.get_decoder().layers[0], lambda: model.get_decoder()(inputs_embeds=embeds, attention_mask=mask)
    )
    given = calls[0][1]["attention_mask"]
    stands(given is not None and torch.equal(given, allowed), "a finished 4-D mask reaches the layers untouched", MASKS)


def test_wholly_compiled_modules_can_be_told() -> None:
    module = nn.Linear(2, 2)
    stands(module._compiled_call_impl is None, "Module._compiled_call_impl tells .compile() (torch)", ANATOMY)
    stands(hasattr(torch.compile(module), "_orig_mod"), "torch.compile(module) has _orig_mod (torch)", ANATOMY)
