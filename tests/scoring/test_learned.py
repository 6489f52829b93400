"""The learned map: what the network reads, what it takes, how it is kept, and for which models it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vprune
from tests.conftest import build_model
from tests.exactness.families import batch as family_batch
from tests.exactness.families import build
from tests.exactness.prompts import KINDS, batch
from vprune import VPruneError
from vprune.models.anatomy import dissect
from vprune.pruner import load_method
from vprune.scoring import learned
from vprune.scoring.learned import Learned, difference, identity_of, read_features, trained_to_drop
from vprune.scoring.network import MOST_PARAMETERS, ScorerConfig, ScorerNetwork
from vprune.training.prompts import read_prompt

SMALL: dict[str, Any] = {"channels": (16, 16), "kernels": (3, 3), "dilations": (1, 1), "matches": 2, "contents": 8}
IMAGE = 4


def network(**options: Any) -> ScorerNetwork:
    torch.manual_seed(0)
    made = ScorerNetwork(ScorerConfig(**{"heads": 4, "width": 32, **SMALL, **options})).eval()
    with torch.no_grad():
        for part in made.parameters():  # nothing may stay at the zero that it starts from
            part.add_(0.1 * torch.randn_like(part))
    return made


def saved(folder: Path, model: Any, **options: Any) -> Path:
    network(model=identity_of(dissect(model)), **options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_the_models_own_attention(tiny_vlm: Any, tiny_processor: Any, kind: str) -> None:
    model, inputs = tiny_vlm(attention="eager"), batch(tiny_processor, kind)
    with torch.no_grad():
        whole = model(**inputs, output_attentions=True).attentions[1]
    features = read_features(read_prompt(model, inputs), 1)
    for row, ids in enumerate(inputs["input_ids"]):
        visual = (ids == IMAGE).nonzero().squeeze(-1)
        if len(visual):
            asked = whole[row, :, int(visual[-1]) + 1 :][..., visual]
            wanted = torch.cat([asked.mean(1), asked.amax(1)])
            torch.testing.assert_close(features.attention[row][:, visual], wanted, rtol=1e-4, atol=1e-7)
            valid = features.text_valid
            text = features.text[row] if valid is None else features.text[row][valid[row]]
            assert torch.equal(text, features.hidden[row, int(visual[-1]) + 1 :])


@pytest.mark.parametrize("layout", ["grid", "line"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 6, 6), (1, 3, 11), (4, 5, 7)])
def test_any_grid_and_video(grid: tuple[int, int, int], layout: str) -> None:
    t, h, w = grid
    made, tokens = network(layout=layout), t * h * w
    maps, rows, text = torch.rand(2, 8, tokens) / tokens, torch.randn(2, tokens, 32), torch.randn(2, 5, 32)
    valid = torch.tensor([[True] * 5, [False, True, True, False, False]])
    with torch.no_grad():
        scores = made(maps, grid, rows, text, valid)
        assert scores.shape == (2, tokens) and bool((scores.abs() <= 8).all())
        alone = made(maps[1:], grid, rows[1:], text[1:, 1:3])  # what is not valid is not read
        torch.testing.assert_close(scores[1:], alone, rtol=1e-5, atol=1e-6)
        other = made(maps, grid, rows, text.flip(1), valid)
    assert tokens == 1 or float((scores - other).abs().max()) > 1e-4  # the question counts


def test_frames_meet_and_lie_apart_at_first() -> None:
    made = ScorerNetwork(ScorerConfig(heads=2, **SMALL)).eval()
    maps = torch.rand(1, 4, 2 * 30)
    with torch.no_grad():
        apart = made(maps, (2, 5, 6))
        one = made(maps[..., :30] * 2, (1, 5, 6))  # (the maps are scaled by the number of tokens)
        torch.testing.assert_close(apart[:, :30], one, rtol=1e-4, atol=1e-5)
        for convolution in made.convolutions:
            torch.nn.init.ones_(convolution.get_parameter("frames"))
        assert float((made(maps, (2, 5, 6)) - apart).abs().max()) > 1e-3


def test_small_it_stays() -> None:
    with pytest.raises(VPruneError, match=rf"would have \d+ parameters, at most {MOST_PARAMETERS}"):
        ScorerNetwork(ScorerConfig(heads=4, width=4096))
    with pytest.raises(VPruneError, match="name 1, 5 and 5 convolutions"):
        ScorerConfig(channels=(8,))
    with pytest.raises(VPruneError, match="odd sizes"):
        ScorerConfig(**{**SMALL, "kernels": (3, 4)})
    with pytest.raises(VPruneError, match="layout='spiral'"):
        ScorerConfig(layout="spiral")


def test_kept_and_read_again(tmp_path: Path, tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "padded")
    folder = saved(tmp_path / "scorer", model)
    again = ScorerNetwork.load(folder)
    assert again.config == network(model=identity_of(dissect(model))).config
    with vprune.prune(model, "learned", keep=5, checkpoint=str(folder)) as pruning:
        model.generate(**inputs, max_new_tokens=2)
        first = [one.kept.tolist() for one in pruning.last or []]
        maps = [one.importance for one in pruning.last or []]
    assert all(len(kept) == 5 for kept in first)
    torch.testing.assert_close(torch.stack(maps).sum((1, 2, 3)), torch.ones(2), rtol=1e-5, atol=1e-5)
    with vprune.prune(model, load_method("learned", keep=5, checkpoint=str(folder))) as pruning:
        model.generate(**inputs, max_new_tokens=2)
        assert first == [one.kept.tolist() for one in pruning.last or []]


def test_what_ships_for_dropped_tokens_is_taken_where_they_are_dropped(
    tmp_path: Path, tiny_vlm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vlm()

    def share_behind(**options: Any) -> float:
        scorer: Any = vprune.prune(model, "learned", **options).pruner.scorer
        return float(scorer.network.config.recipe["effect"]["share"])

    folders = [
        saved(tmp_path / str(share), model, recipe={"objective": "effect", "effect": {"share": share}})
        for share in (0.3, 0)
    ]
    for known in (folders, folders[::-1]):
        monkeypatch.setattr(learned, "shipped", lambda known=known: iter(known))
        assert share_behind() == share_behind(recycle="nearest") == 0.3
        assert share_behind(recycle="none") == share_behind(recycle="none", size_aware=False, keep=3) == 0
        assert share_behind(recycle="none", checkpoint=str(folders[0])) == 0.3  # the one that is asked for
    monkeypatch.setattr(learned, "shipped", lambda: iter(folders[:1]))
    assert share_behind(recycle="none") == 0.3  # the only one


def test_a_checkpoint_that_is_cut_short_or_no_scorer(tmp_path: Path, tiny_vlm: Any) -> None:
    folder = saved(tmp_path / "scorer", tiny_vlm())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VPruneError, match="holds no whole scorer"):
        vprune.prune(tiny_vlm(), "learned", checkpoint=str(folder))
    (folder / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "channels": [8, 8]}))
    with pytest.raises(VPruneError, match=r"does not fit its own config.json: \d+ numbers for \d+"):
        vprune.prune(tiny_vlm(), "learned", checkpoint=str(folder))


def test_a_checkpoint_that_is_not_there_is_told_with_the_remedy(tmp_path: Path, tiny_vlm: Any) -> None:
    remedy = r"; give the folder of a scorer: what `vprune train scorer out=DIR` leaves in DIR/scorer$"
    nowhere, run = tmp_path / "nowhere", tmp_path / "run"
    with pytest.raises(VPruneError, match=rf"^checkpoint={nowhere}: there is no such folder{remedy}"):
        load_method("learned", checkpoint=str(nowhere))
    with pytest.raises(VPruneError, match=rf"no whole scorer: config.json and model.safetensors missing{remedy}"):
        load_method("learned", checkpoint=str(tmp_path))
    folder = saved(run / "scorer", tiny_vlm())
    with pytest.raises(VPruneError, match=rf"missing; did you mean {folder}\?$"):
        load_method("learned", checkpoint=str(run))
    (folder / "config.json").write_text("[]")
    with pytest.raises(VPruneError, match=r"config.json or model.safetensors is broken \(.*\); give the folder"):
        vprune.prune(tiny_vlm(), "learned", checkpoint=str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(VPruneError, match=r"no whole scorer: model.safetensors missing"):
        load_method("learned", checkpoint=str(folder))


def test_another_model_is_refused(tmp_path: Path, tiny_vlm: Any) -> None:
    folder = str(saved(tmp_path / "scorer", tiny_vlm()))
    with pytest.raises(VPruneError, match=r"another model: hidden_size=32, this one has hidden_size=48"):
        vprune.prune(build_model(width=48), "learned", checkpoint=folder)
    other = build_model()
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_(0.0, 0.35)
    with pytest.raises(VPruneError, match="the same shape with other weights"):
        vprune.prune(other, "learned", checkpoint=folder)
    rounded = build_model(dtype=torch.bfloat16)  # the same model in another precision is the same model
    assert vprune.prune(rounded, "learned", checkpoint=folder).pruner.scorer is not None
    own = identity_of(dissect(tiny_vlm()))
    assert difference(own, own) == ""


def test_without_a_scorer_both_ways_on_are_named(monkeypatch: pytest.MonkeyPatch, tiny_vlm: Any) -> None:
    monkeypatch.setattr(learned, "_shipped_for", lambda own, drops: None)
    with pytest.raises(
        VPruneError, match=r"no scorer ships for LlavaModel.*vprune train scorer model=ID.*attention_max"
    ):
        vprune.prune(tiny_vlm())


def test_the_shipped_scorers_are_the_embedded_models() -> None:
    drops = []
    for network in map(ScorerNetwork.load, learned.shipped()):
        config = network.config
        assert config.model["hidden_size"] == 256 and config.recipe["objective"] == "effect"
        assert sum(part.numel() for part in network.parameters()) <= MOST_PARAMETERS
        drops.append(trained_to_drop(config))
    assert drops == [False, True]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "internvl", "smolvlm"])
def test_every_family(family: str) -> None:
    model, inputs = build(family, torch.float32), family_batch(family, "padded", torch.float32)
    with vprune.prune(model, "learned", keep=0.3) as pruning:
        model.generate(**inputs, max_new_tokens=3)
    assert pruning.last is not None
    for report in pruning.last:
        assert report.importance is not None and tuple(report.importance.shape) == report.grid
        assert report.tokens_after < report.tokens_before and int(report.sizes.sum()) == report.tokens_before


def test_no_question_no_number(tiny_vlm: Any, tiny_processor: Any) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, "single")
    ids = inputs["input_ids"]
    end = int((ids[0] == IMAGE).nonzero()[-1]) + 1
    silent = {**inputs, "input_ids": ids[:, :end], "attention_mask": inputs["attention_mask"][:, :end]}
    with (
        vprune.prune(model, "learned"),
        pytest.raises(VPruneError, match=r"sample 0 has no instruction tokens .*36 visual"),
    ):
        model(**silent)
    hushed = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    hushed["attention_mask"][:, end:] = 0  # a question that is all padding
    with vprune.prune(model, "learned"), pytest.raises(VPruneError, match="no instruction tokens"):
        model(**hushed)
    broken = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    broken["pixel_values"][0, 0, 0, 0] = float("nan")
    with (
        vprune.prune(model, "learned"),
        pytest.raises(VPruneError, match=r"sample 0, image 0: \d+ of 36 scores are no numbers"),
    ):
        model(**broken)
    model(**inputs)  # and nothing of it is left


def test_a_scorer_alone_says_where_it_belongs(tiny_vlm: Any, tiny_processor: Any) -> None:
    prefill = read_prompt(tiny_vlm(), batch(tiny_processor, "single"))
    with pytest.raises(VPruneError, match="was not bound to a model"):
        Learned()(prefill)
