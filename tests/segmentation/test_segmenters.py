"""Segmenters of other packages, tiny and with random weights: transformers' two, and segment-anything's checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch
import transformers
from PIL import Image

from vprune import VPruneError
from vprune.segmentation.prompting import Candidate, Prompting, draw
from vprune.segmentation.sam import Prompts, build_sam
from vprune.segmentation.segmenters import HuggingFaceSegmenter, SamSegmenter, load_segmenter

VIEWS = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (h, w, 3), np.uint8)) for n, (w, h) in
         enumerate([(90, 60), (40, 80)])]  # fmt: skip
TINY = {
    "image_encoder": {
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "out_chans": 32,
        "use_rel_pos": True,
        "window_size": 2,
        "global_attn_indexes": [1],
    },
    "mask_decoder": {"depth": 1, "num_heads": 2},
}


def saved_sam(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 64}
    config = transformers.SamConfig(
        vision_config={**vision, "image_size": 64, "patch_size": 8, "global_attn_indexes": [0], "num_pos_feats": 16},
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )
    transformers.SamModel(config).save_pretrained(folder)
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    transformers.SamProcessor(transformers.SamImageProcessor(**sizes)).save_pretrained(folder)
    return folder


def saved_sam2(folder: Path) -> Path:
    torch.manual_seed(0)
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 16,
        "image_size": [64, 64],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "blocks_per_stage": [1, 1, 2, 1],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "global_attention_blocks": [3],
        "window_size_per_stage": [4, 2, 2, 2],
        "window_positional_embedding_background_size": [4, 4],
    }
    config = transformers.Sam2Config(
        vision_config={
            "backbone_config": backbone,
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
    )
    transformers.Sam2Model(config).save_pretrained(folder)
    images = getattr(transformers, "Sam2ImageProcessor", None) or transformers.Sam2ImageProcessorFast
    processor = transformers.Sam2Processor(images(size={"height": 64, "width": 64}), target_size=64)
    processor.save_pretrained(folder)
    return folder


def blob(y: int, x: int) -> np.ndarray:
    heat = np.zeros((12, 12), np.float32)
    heat[y : y + 3, x : x + 3] = 1
    return heat


@pytest.mark.parametrize(("saved", "frames"), [(saved_sam, [(64, 43), (32, 64)]), (saved_sam2, [(64, 64), (64, 64)])])
def test_transformers_models(saved: Any, frames: list[tuple[int, int]], tmp_path: Path) -> None:
    segmenter = load_segmenter("hf", saved(tmp_path))
    assert isinstance(segmenter, HuggingFaceSegmenter)
    given: list[tuple[torch.Tensor, bool]] = []
    forward = segmenter.model.forward

    def seen(*args: Any, **kwargs: Any) -> Any:
        given.append((kwargs["input_points"], kwargs["multimask_output"]))
        return forward(*args, **kwargs)

    segmenter.model.forward = seen
    encoded = segmenter.encode(VIEWS)
    middles = torch.tensor([[size] for size in encoded.sizes]).float() / 2
    logits, quality = segmenter.predict(encoded, Prompts(torch.tensor([0, 1]), middles, torch.ones(2, 1)))
    assert logits.shape[:2] == quality.shape == (2, 4) and logits.shape[2] == logits.shape[3]
    # Points reach the model in the frame that its images were brought to, each view in its own.
    for (points, several), (w, h) in zip(given[::2], frames, strict=True):
        assert not several and points.flatten().tolist() == pytest.approx([w / 2, h / 2], abs=0.5)
    for box in (False, True):
        how = Prompting(box=box, negative=1, positive=1)
        candidates = [
            Candidate(0, "one", blob(3, 4)),
            Candidate(1, "two", blob(6, 2)),
            Candidate(0, "three", blob(8, 8)),
        ]
        drawn = draw(segmenter, encoded, candidates, how)
        assert drawn and all(one.mask.shape == VIEWS[one.candidate.view].size[::-1] for one in drawn)
        for one in drawn:
            (alone,) = draw(segmenter, encoded, [one.candidate], how)
            assert (alone.mask == one.mask).mean() > 0.999 and alone.score == pytest.approx(one.score, abs=1e-4)


def test_what_is_no_transformers_model(tmp_path: Path) -> None:
    with pytest.raises(VPruneError, match="needs a model"):
        load_segmenter("hf")
    with pytest.raises(VPruneError, match="cannot be loaded"):
        load_segmenter("hf", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(VPruneError, match="cannot be loaded"):
        load_segmenter("hf", tmp_path)


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_checkpoints_of_segment_anything(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    true = build_sam(TINY)
    # (A real ViT-B is 375 MB: the registry builds a tiny one in its place.)
    monkeypatch.setitem(segment_anything.sam_model_registry, f"vit_{size}", lambda checkpoint: build_sam(TINY))
    file, name = tmp_path / "sam.pth", f"sam_vit_{size}"
    torch.save(true.state_dict(), file)
    loaded, own = load_segmenter(name, file), SamSegmenter(true, torch.device("cpu"))
    prompts = Prompts(torch.tensor([0, 1]), torch.tensor([[[20.0, 30.0]], [[9.0, 60.0]]]), torch.ones(2, 1))
    found, wanted = (one.predict(one.encode(VIEWS), prompts) for one in (loaded, own))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    drawn = draw(loaded, loaded.encode(VIEWS), [Candidate(1, "two", blob(6, 2))], Prompting(rounds=3))
    assert all(one.mask.shape == (80, 40) for one in drawn)

    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    weights = {key: value for key, value in true.state_dict().items() if "iou_token" not in key}
    for wrong in (Evil(), weights, {**weights, "mask_decoder.iou_token.weight": torch.zeros(3, 3)}, ["a list"]):
        torch.save(wrong, file)
        with pytest.raises(VPruneError, match="no checkpoint of"):
            load_segmenter(name, file)
    for text in (b"", b"no checkpoint", b"PK\x03\x04"):
        file.write_bytes(text)
        with pytest.raises(VPruneError, match="no checkpoint of"):
            load_segmenter(name, file)
    assert not (tmp_path / "evil").exists()
