"""A VLM, a SAM and a CLIP of true shapes that know nothing: segmentation with all that they should find given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vprune.bench.architectures import ARCHITECTURES, Architecture, build, make_prompt, visual_tokens
from vprune.segmentation.asking import Respondent, whole_view, with_answer
from vprune.segmentation.evaluation import made_recipe
from vprune.segmentation.labels import Labeller
from vprune.segmentation.prompting import Candidate
from vprune.segmentation.reading import read
from vprune.segmentation.sam import build_sam
from vprune.segmentation.segment import Session
from vprune.segmentation.segmenters import SamSegmenter
from vprune.segmentation.stages import Stages

if TYPE_CHECKING:
    from vprune.bench.segment import Options, Subject

_TINY_SAM = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "out_chans": 32}
_CATEGORIES = tuple(f"thing number {number}" for number in range(80))  # as many as COCO's
_AT_ONCE = 8  # prompts answered in one batch, as `Respondent` does


class GivenRespondent(Respondent):
    """Asks a model of random weights for answers of a fixed length, makes maps of so many words, and shows others.

    The maps that the segmenter is prompted with are bumps at places of their own: those of random weights are noise.
    """

    def __init__(self, session: GivenSession, stages: Stages) -> None:
        super().__init__(session.model, None, session.recipe, None, stages)
        self.session = session

    def listed(self, views: Sequence[Image.Image]) -> list[Candidate]:
        """As many candidates a view as words are given; the views themselves are drawn at random."""
        new, words, model = self.session.new, self.session.words, self.model
        with self.stages.timed("answer"), torch.no_grad():
            for start in range(0, len(views), _AT_ONCE):
                inputs = self.session.inputs(len(views[start : start + _AT_ONCE]))
                model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=new)
        found = []
        with self.stages.timed("maps"):
            for view in range(len(views)):
                inputs = self.session.inputs(1)
                length = inputs["input_ids"].shape[1]
                said = torch.arange(10, 10 + new, device=model.device)[None] % model.config.get_text_config().vocab_size
                rows = [length + place * new // words for place in range(words)]
                reading = read(model, with_answer(inputs, said), rows, self.recipe.maps)
                maps = whole_view(reading).float().numpy()
                self.tokens[view] = reading.visual_tokens
                found += [
                    Candidate(view, f"word {number}", bump((maps.shape[1], maps.shape[2]), number, words))
                    for number in range(words)
                ]
        return found


class GivenSession(Session):
    """A `Session` whose model answers `new` tokens, `words` of which get maps."""

    def __init__(
        self,
        model: Any,
        segmenter: SamSegmenter,
        recipe: Any,
        architecture: Architecture,
        options: Options,
        tokens: int,
    ) -> None:
        super().__init__((model, None), segmenter, recipe)
        self.new, self.words = options.new, options.words
        self._architecture, self._tokens = architecture, tokens
        self._inputs: dict[int, dict[str, Any]] = {}

    def inputs(self, batch: int) -> dict[str, Any]:
        """Prompts with a picture each, made once: what a processor takes is not counted."""
        if batch not in self._inputs:
            prompt = make_prompt(self.model, self._architecture, "image", self._tokens, batch)
            self._inputs[batch] = prompt.inputs
        return self._inputs[batch]

    def respondent(self, stages: Stages) -> GivenRespondent:
        """See `Session`."""
        return GivenRespondent(self, stages)


def bump(grid: tuple[int, int], number: int, count: int) -> NDArray[np.float32]:
    """A map float32 [h, w] with one round bump, the number-th of so many side by side in rows."""
    h, w = grid
    across = int(np.ceil(np.sqrt(count)))
    y, x = ((number // across + 0.5) / across * h, (number % across + 0.5) / across * w)
    ys, xs = np.mgrid[:h, :w] + 0.5
    wide = max(1.0, min(h, w) / (4 * across))
    bumped: NDArray[np.float32] = np.exp(-((ys - y) ** 2 + (xs - x) ** 2) / (2 * wide**2)).astype(np.float32)
    return bumped


def random_sam(name: str, device: torch.device, tiny: bool) -> SamSegmenter:
    """segment-anything's Sam of a name, or a tiny one, with the weights that its builder begins with."""
    from segment_anything import sam_model_registry

    torch.manual_seed(0)
    with torch.device(device):
        sam = build_sam({"image_encoder": _TINY_SAM}) if tiny else sam_model_registry[name](checkpoint=None)
    return SamSegmenter(sam, device, batch=32)


def random_subject(options: Options, device: torch.device, tiny: bool) -> Subject:
    """What `vprune bench segment` times of a model that is not the embedded one."""
    from vprune.bench.segment import Subject

    architecture = ARCHITECTURES[options.model]
    config = architecture.config(tiny)
    tokens = visual_tokens(architecture, config, "image", options.tokens or (64 if tiny else 7290))
    name, clip = options.segmenter or "vit_h", options.clip or ("embedded" if tiny else "ViT-L-14")
    labeller = Labeller(_CATEGORIES, clip, device)  # a mistake in its name is told before minutes have passed
    segmenter = random_sam(name, device, tiny)
    model = build(config, device, getattr(torch, options.dtype))
    side = options.side or (64 if tiny else 1024)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)

    def session(crops: bool) -> GivenSession:
        recipe = made_recipe({"maps": options.maps, "crops": crops})
        return GivenSession(model, segmenter, recipe, architecture, options, tokens)

    told = {"tokens_a_view": tokens, "picture": (side, side), "categories": len(_CATEGORIES), "clip": clip}
    parts = {"model": model, "segmenter": segmenter.sam, "clip": labeller.model}
    told |= {"parameters": {key: sum(one.numel() for one in part.parameters()) for key, part in parts.items()}}
    shown = f"{name} (tiny)" if tiny else name
    return Subject(
        options.model, shown, options.dtype, session, [Image.fromarray(noise)], labeller, options.words, told
    )
