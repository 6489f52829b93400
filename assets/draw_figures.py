"""Draws `assets/figures/overview.png`, the picture on top of the README, from the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vprune

ASSETS = Path(__file__).parent
SAMPLE = "000000-0"


def main() -> None:
    """Answers one question of the benchmark with a tenth of the tokens and draws what was kept."""
    loaders: tuple[Any, Any] = (AutoModelForImageTextToText, AutoProcessor)
    model, processor = (loader.from_pretrained(ASSETS / "models" / "vlm") for loader in loaders)
    lines = (ASSETS / "scenes" / "samples.jsonl").read_text().splitlines()
    sample = next(one for one in map(json.loads, lines) if one["id"] == SAMPLE)
    image = Image.open(ASSETS / "scenes" / sample["image"]).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": sample["question"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(dtype=model.dtype)
    with vprune.prune(model, method="learned", keep=0.1) as pruning:  # as in the snippet below the picture
        answer = model.generate(**inputs, max_new_tokens=32)
    said = processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(sample["question"], "->", said, "| expected:", sample["answer"])
    (ASSETS / "figures").mkdir(exist_ok=True)
    assert pruning.last is not None
    pruning.last.draw(image).save(ASSETS / "figures" / "overview.png")


if __name__ == "__main__":
    main()
