"""What the embedded model is trained on is exactly what `generate` will show it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vprune
from vprune.eval.scenes import layout, questions
from vprune.eval.scenes.render import Painter
from vprune.eval.scenes.world import KINDS
from vprune.training.architecture import ASSISTANT, END, build_tokenizer
from vprune.training.packed_model import PackedVLM, grounding_loss
from vprune.training.packing import IGNORE, PREFIX, PackedScenes, Vocabulary
from vprune.training.vlm import train

ROOT = Path(vprune.__file__).parent
EMBEDDED = ROOT / "assets" / "models" / "vlm"


def test_the_quick_vocabulary_is_the_tokenizer() -> None:
    tokenizer, quick = build_tokenizer(), Vocabulary()
    for i in range(40):
        rng = layout.stream(8, i)
        scene = layout.sample_scene(rng, photographs=4)
        asked = [q for k in KINDS if (q := questions.ask(k, scene, rng))] + [questions.describe(scene)]
        for text in [t for q in asked for t in (q.question, q.answer)]:
            assert quick.encode(text) == tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(quick.encode(text)) == text


def test_labels_are_the_answers_and_nothing_else() -> None:
    packed = next(iter(PackedScenes(seed=1, batch_size=3, length=160, photographs=9, weights=[1.0] * len(KINDS))))
    for row in range(3):
        for segment in range(1, int(packed.segments[row].max()) + 1):
            mine = packed.segments[row] == segment
            tokens, labels = packed.tokens[row][mine].tolist(), packed.labels[row][mine].tolist()
            start = tokens.index(ASSISTANT)
            assert labels == [IGNORE] * start + tokens[start + 1 :] + [IGNORE]
            assert tokens[-1] == END
            assert packed.positions[row][mine].tolist() == list(range(PREFIX, PREFIX + len(tokens)))


def test_grounding_points_at_the_object_that_the_words_name() -> None:
    stream = PackedScenes(seed=1, batch_size=4, length=200, photographs=9, weights=[1.0] * len(KINDS))
    packed = next(iter(stream))
    tokenizer = build_tokenizer()
    named = (packed.grounding >= 0).nonzero().tolist()
    assert len(named) > 20
    for row, at in named:
        scene = layout.sample_scene(layout.stream(1, row), photographs=9)
        o = scene.objects[int(packed.grounding[row, at])]
        words = tokenizer.decode(packed.tokens[row, at - 1 : at + 1].tolist()).split()
        assert words in (o.name.split(), [str(o.number)], ["number", str(o.number)])
    flat = torch.zeros(4, 200, 2, 24)
    loss = grounding_loss(flat, packed.grounding.long(), packed.scenes.objects)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(24.0)).item(), abs=1e-5)


def test_a_packed_segment_predicts_what_the_plain_model_predicts() -> None:
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(EMBEDDED)
    packed = next(iter(PackedScenes(seed=2, batch_size=1, length=120, photographs=4, weights=[1.0] * len(KINDS))))
    images, _ = Painter("test").render(packed.scenes)
    before = model.model.language_model.config._attn_implementation
    wrapped = PackedVLM(model)
    with torch.no_grad():
        pixels = images.float() / 127.5 - 1
        logits, _, _ = wrapped(pixels, packed.tokens.long(), packed.segments.long(), packed.positions.long())
    assert wrapped.release() is model and model.model.language_model.config._attn_implementation == before
    mine = packed.segments[0] == int(packed.segments.max())
    tokens = packed.tokens[0][mine].tolist()
    at = tokens.index(ASSISTANT)
    question = processor.tokenizer.decode(tokens[:at])
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    with torch.no_grad():
        plain = model(**processor(images=picture, text=prompt, return_tensors="pt")).logits[0, -1]
    torch.testing.assert_close(logits[0][mine][at], plain, atol=1e-4, rtol=0)
    other = packed.segments[0] == 1
    assert not torch.allclose(logits[0][other][0], plain, atol=1e-2)


def tiny_recipe(out: Path) -> DictConfig:
    recipe = OmegaConf.load(ROOT / "conf" / "train" / "vlm.yaml")
    small = {
        "out": str(out),
        "device": "cpu",
        "compile": False,
        "model": {
            "vision": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
            "text": {
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
        },
        "data": {"batch_size": 1, "length": 96, "workers": 0},
        "optimizer": {"steps": 3, "warmup": 1},
        "log_every": 1,
        "evaluate_every": 100,
        "checkpoint_minutes": 0,
    }
    merged = OmegaConf.merge(recipe, small)
    assert isinstance(merged, DictConfig)
    return merged


def test_training_goes_on_where_it_stopped_and_refuses_another_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run")
    whole = tiny_recipe(tmp_path / "whole")

    class StopError(Exception):
        pass

    from vprune.training import vlm

    saves = 0
    save = vlm._Run.save

    def stop_after_one(run: vlm._Run) -> None:
        nonlocal saves
        save(run)
        saves += 1
        if saves == 1:
            raise StopError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
        patch.setattr(vlm._Run, "save", stop_after_one)
        train(recipe)
    folder = train(recipe)
    straight = train(whole)
    a = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    b = AutoModelForImageTextToText.from_pretrained(straight).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    recipe.optimizer.lr = 1.0
    with pytest.raises(vprune.VPruneError, match=r"other values of optimizer"):
        train(recipe)


def test_the_shipped_weights_are_small_and_load_offline() -> None:
    shards = sorted(EMBEDDED.glob("*.safetensors"))
    assert shards and all(f.stat().st_size < 15_000_000 for f in shards)
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED)
    assert sum(p.numel() for p in model.parameters()) <= 12_000_000
    assert model.dtype == torch.bfloat16
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    text = model.config.text_config
    assert text.num_hidden_layers >= 8 and text.num_key_value_heads < text.num_attention_heads
    assert model.config.image_seq_length == 576
