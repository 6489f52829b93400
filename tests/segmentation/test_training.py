"""The recipes of the embedded SAM and CLIP: they learn, go on after a break, and write folders that load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from segment_anything import SamPredictor

from vprune import VPruneError
from vprune.segmentation.sam import Prompts, build_sam, decode, load_sam
from vprune.training import clip, sam
from vprune.training.cli import configured

SMALL = ["device=cpu", "data.workers=0", "log_every=1", "held_out.scenes=2", "held_out.batch_size=2"]
SAM = [
    *SMALL,
    *(
        f"model.image_encoder.{word}"
        for word in ("img_size=96", "embed_dim=32", "depth=1", "num_heads=2", "out_chans=32")
    ),
    *(f"model.mask_decoder.{word}" for word in ("depth=1", "num_heads=2", "mlp_dim=32", "iou_head_hidden_dim=16")),
    "data.batch_size=2",
    "data.objects=2",
    "data.rounds=2",
    "data.zoomed=0",
]
CLIP = [
    *SMALL,
    "model.embed_dim=32",
    *(f"model.vision_cfg.{word}" for word in ("image_size=32", "layers=1", "width=48", "head_width=24")),
    *(f"model.text_cfg.{word}" for word in ("width=32", "heads=2", "layers=1")),
    "data.batch_size=4",
    "data.groups=1",
]


def run(recipe: Any, name: str, out: Path, words: list[str], *more: str) -> list[dict[str, Any]]:
    schedule = ["optimizer.minutes=null", "optimizer.warmup=2"]
    recipe.train(configured(name, [f"out={out}", *words, *schedule, *more]))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("recipe", "name", "words"), [(sam, "sam", SAM), (clip, "clip", CLIP)], ids=["sam", "clip"])
def test_a_run_that_goes_on_is_the_unbroken_one(recipe: Any, name: str, words: list[str], tmp_path: Path) -> None:
    whole = run(recipe, name, tmp_path / "whole", words, "optimizer.steps=4")
    loop = recipe.SamLoop if name == "sam" else recipe.ClipLoop
    run_of = loop.run

    def stopped(self: Any) -> None:
        self.progress = lambda: 1.0 if self.step >= 2 else self.step / 4
        run_of(self)

    loop.run = stopped
    try:
        run(recipe, name, tmp_path / "broken", words, "optimizer.steps=4")
    finally:
        loop.run = run_of
    broken = run(recipe, name, tmp_path / "broken", words, "optimizer.steps=4")
    losses = [[row["loss"] for row in log if "loss" in row] for log in (whole, broken)]
    rates = [[row["lr"] for row in log if "lr" in row] for log in (whole, broken)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == len(losses[1]) == 4
    assert rates[0] == rates[1]
    with pytest.raises(VPruneError, match="other values"):
        run(recipe, name, tmp_path / "broken", words, "optimizer.steps=5")


def test_sam_learns_and_loads(tmp_path: Path) -> None:
    words = [*SAM, "data.scenes=2", "optimizer.lr=3.0e-3", "data.noise=0"]
    log = run(sam, "sam", tmp_path, words, "optimizer.steps=12")
    rows = [row for row in log if "loss" in row]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert 0 <= log[-1]["miou_box"] <= 1
    loaded = load_sam(tmp_path / "model")
    predictor = SamPredictor(loaded)
    predictor.set_image(torch.randint(0, 255, (60, 96, 3), dtype=torch.uint8).numpy())
    point = torch.tensor([[30.0, 20.0]]).numpy()
    masks, quality, low = predictor.predict(point, torch.tensor([1]).numpy())
    assert masks.shape == (3, 60, 96) and quality.shape == (3,) and low.shape == (3, 48, 48)


def test_clip_learns_and_open_clip_loads_it(tmp_path: Path) -> None:
    words = [*CLIP, "data.scenes=4", "optimizer.lr=3.0e-3", "data.noise=0"]
    log = run(clip, "clip", tmp_path, words, "optimizer.steps=12")
    rows = [row for row in log if "loss" in row]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    folder = f"local-dir:{tmp_path / 'model'}"
    model, _, _ = open_clip.create_model_and_transforms(folder)
    tokens = open_clip.get_tokenizer(folder)(["a red circle", "Łódź 17"])
    assert tokens.shape == (2, 16) and int(tokens.max()) == clip.VOCABULARY - 1
    assert model.encode_text(tokens).shape == (2, 32)


def test_prompts_of_several_views_are_decoded_as_one_by_one() -> None:
    torch.manual_seed(0)
    encoder = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "out_chans": 32}
    model = build_sam({"image_encoder": encoder}).eval()
    with torch.no_grad():
        embeddings = model.image_encoder(torch.randn(2, 3, 64, 64))
        view = torch.tensor([1, 0, 1])
        points, labels = torch.rand(3, 2, 2) * 64, torch.tensor([[1.0, 0.0], [1.0, -1.0], [0.0, 1.0]])
        masks = torch.randn(3, 1, 32, 32)
        logits, quality = decode(model, embeddings, Prompts(view, points, labels, None, masks))
        for row, one in enumerate(view):
            prompt = slice(row, row + 1)
            sparse, dense = model.prompt_encoder((points[prompt], labels[prompt]), None, masks[prompt])
            place = model.prompt_encoder.get_dense_pe()
            alone, said = model.mask_decoder.predict_masks(embeddings[one, None], place, sparse, dense)
            torch.testing.assert_close(logits[prompt], alone)
            torch.testing.assert_close(quality[prompt], said)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VPruneError, match="holds no SAM"):
        load_sam(tmp_path)
