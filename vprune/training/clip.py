"""`vprune train clip`: the embedded CLIP, an open_clip model trained from scratch on crops of objects and captions.

open_clip's own ClipLoss takes every other caption of a batch for wrong. So a contrast is made of crops whose names all
differ: one of colour and shape, one of shape alone, one of colour alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from open_clip import CLIP, ClipLoss
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import grid_sample, normalize
from transformers import PreTrainedTokenizerFast

from vprune.eval.scenes.questions import words
from vprune.eval.scenes.render import COLOUR, NUMBER, SHAPE, Batch, Painter
from vprune.eval.scenes.world import COLOURS, MAX_OBJECTS, SHAPES, SIDE, SIZES
from vprune.training.loop import TrainingLoop, begin

LEAST_VISIBLE = 100
"""Pixels of an object that must be seen for its crop to show what it is."""
PAD, START, END = "<pad>", "<start>", "<end>"
VOCABULARY = 640
TEMPLATES = ("{}", "a {}", "the {}", "a photo of a {}", "a {size} {}", "the {size} {}", "{size} {}", "{} in the image")
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PREPROCESSING = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "squash", "mean": MEAN, "std": STD}


def train(config: DictConfig) -> Path:
    """Train as conf/train/clip.yaml says, or go on with it; returns the folder of the finished model.

    The folder is one that open_clip loads by itself: `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

    Raises:
        VPruneError: a schedule without a length, a folder of another run.

    Example:
        >>> from omegaconf import OmegaConf
        >>> train(OmegaConf.load("conf/train/clip.yaml"))  # doctest: +SKIP
        PosixPath('runs/train/clip/model')
    """
    out, device = begin(config, "clip")
    fields = model_config(config)
    tokenizer = build_tokenizer()
    loop = ClipLoop(config, CLIP(**_own(fields)), tokenizer, device, out)
    loop.run()
    loop.model.load_state_dict(loop.average)
    save_clip(loop.model, fields, tokenizer, out / "model")
    return out / "model"


def model_config(config: DictConfig) -> dict[str, Any]:
    """The open_clip model config of a recipe: its `model`, with the tokenizer's size filled in."""
    fields: Any = OmegaConf.to_container(config.model)
    # open_clip reads the tokenizer beside the weights when a name is given; pooling looks for the highest id, END.
    fields["text_cfg"] |= {"vocab_size": VOCABULARY, "hf_tokenizer_name": "local"}
    return dict(fields)


def _own(fields: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = json.loads(json.dumps(fields))  # open_clip changes what it is given
    return own


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE: one token for every word of the scenes world, and bytes for all others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        special_tokens=[PAD, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for word in (*words(), "photo", "picture") if word.isalpha()], trainer)
    free = VOCABULARY - 1 - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<unused{number}>" for number in range(free)])
    tokenizer.add_special_tokens([END])
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END, padding_side="right"
    )


def save_clip(model: Any, fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config, bfloat16 weights and tokenizer as open_clip's `local-dir:` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    size = fields["vision_cfg"]["image_size"]
    config = {"model_cfg": fields, "preprocess_cfg": {"size": [size, size], **PREPROCESSING}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.detach().cpu().bfloat16().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)


class ClipLoop(TrainingLoop):
    """One training run of an open_clip model."""

    name = "clip"

    def __init__(
        self, config: DictConfig, model: CLIP, tokenizer: PreTrainedTokenizerFast, device: torch.device, out: Path
    ) -> None:
        super().__init__(config, model, device, out)
        self.clip: Any = model
        self.tokenizer = tokenizer
        self.length = int(config.model.text_cfg.context_length)
        self.size = int(config.model.vision_cfg.image_size)
        self.contrast = ClipLoss()
        self.encoded: dict[str, list[int]] = {}
        self.mean = torch.tensor(MEAN, device=device)[:, None, None]
        self.std = torch.tensor(STD, device=device)[:, None, None]
        self.random: torch.Generator | None = None

    def losses(self, scenes: Batch, random: torch.Generator) -> dict[str, Tensor]:
        """Contrasts of crops with captions, by name, by shape and by colour."""
        data = self.config.data
        words = torch.Generator().manual_seed(random.initial_seed())
        with torch.no_grad():
            images, seen = self.painter.render(scenes)
            low, high = data.margin
            crops, kinds = object_crops(images, seen, scenes.objects, self.size, (float(low), float(high)), random)
            strength = float(data.noise) * torch.rand(len(crops), 1, 1, 1, generator=random, device=self.device)
            noise = strength * torch.randn(crops.shape, generator=random, device=self.device)
            pixels = self._normal((crops + noise).clamp(0, 255))
            groups = self._groups(kinds, int(data.groups), random)
        captions = [self._captions(kinds[rows], by, words) for rows, by in groups]
        with self.autocast():
            seen_as = normalize(self.clip.encode_image(pixels).float(), dim=-1)
            read = self.clip.encode_text(self._tokens([text for texts in captions for text in texts]))
            said = torch.split(normalize(read.float(), dim=-1), [len(texts) for texts in captions])
        scale = self.clip.logit_scale.exp().clamp(max=100)
        found: dict[str, list[Tensor]] = {"name": [], "shape": [], "colour": []}
        for (rows, by), features in zip(groups, said, strict=True):
            found[by].append(self.contrast(seen_as[rows], features, scale))
        parts = {by: torch.stack(values).mean() for by, values in found.items()}
        coarse = float(self.config.optimizer.coarse)
        loss = parts["name"] + coarse * (parts["shape"] + parts["colour"])
        torch.autograd.backward(loss)
        return {"loss": loss.detach()} | {by: value.detach() for by, value in parts.items()}

    def _groups(self, kinds: Tensor, count: int, random: torch.Generator) -> list[tuple[Tensor, str]]:
        """Rows of crops that differ from each other in name, in shape or in colour: `count` groups of each."""
        shape, colour = kinds[:, 0], kinds[:, 1]
        groups = []
        for by, label, classes in (
            ("name", colour * len(SHAPES) + shape, len(COLOURS) * len(SHAPES)),
            ("shape", shape, len(SHAPES)),
            ("colour", colour, len(COLOURS)),
        ):
            of_class = label[None] == torch.arange(classes, device=label.device)[:, None]
            keys = torch.rand(count, *of_class.shape, generator=random, device=label.device)
            top, rows = torch.where(of_class, keys, -1.0).max(-1)
            groups += [(rows[g][top[g] >= 0], by) for g in range(count)]
        return groups

    def _captions(self, kinds: Tensor, by: str, random: torch.Generator) -> list[str]:
        """What is said of the crops; sizes are named at random, for a crop does not show them."""
        draws = torch.rand(len(kinds), 3, generator=random).tolist()
        return [caption(kind, by, draw) for kind, draw in zip(kinds.tolist(), draws, strict=True)]

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self.encoded]
        if new:
            ids = self.tokenizer(new, padding="max_length", max_length=self.length, truncation=True)["input_ids"]
            self.encoded.update(zip(new, ids, strict=True))
        return torch.tensor([self.encoded[text] for text in texts], device=self.device)

    def _normal(self, crops: Tensor) -> Tensor:
        return (crops / 255 - self.mean) / self.std

    @torch.no_grad()
    def measure(self, batches: list[Batch], painter: Painter) -> dict[str, Any]:
        """Shares of crops named rightly among all colours x shapes, shapes and colours; and of names put to shapes."""
        random = torch.Generator(self.device).manual_seed(1)
        names = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
        texts = [names, [f"a {shape}" for shape in SHAPES], [f"a {colour} object" for colour in COLOURS]]
        name, shape, colour = (normalize(self.clip.encode_text(self._tokens(t)).float(), dim=-1) for t in texts)
        right: dict[str, list[Tensor]] = {"accuracy": [], "accuracy_shape": [], "accuracy_colour": []}
        for scenes in batches:
            images, seen = painter.render(scenes)
            crops, kinds = object_crops(images, seen, scenes.objects, self.size, (0.1, 0.3), random)
            with self.autocast():
                features = normalize(self.clip.encode_image(self._normal(crops)).float(), dim=-1)
            of_name = kinds[:, 1] * len(SHAPES) + kinds[:, 0]
            for key, classes, truth in (
                ("accuracy", name, of_name),
                ("accuracy_shape", shape, kinds[:, 0]),
                ("accuracy_colour", colour, kinds[:, 1]),
            ):
                right[key].append((features @ classes.T).argmax(1) == truth)
        shares = {key: round(float(torch.cat(values).float().mean()), 4) for key, values in right.items()}
        of_shape = torch.arange(len(names), device=self.device) % len(SHAPES)
        told = float(((name @ shape.T).argmax(1) == of_shape).float().mean())
        return shares | {"names_to_shapes": round(told, 4)}


def caption(kind: Sequence[int], by: str, draw: Sequence[float]) -> str:
    """A caption of an object, (shape, colour, number), that tells its name, its shape or its colour."""
    shape, colour, number = kind
    names = {
        "name": f"{COLOURS[colour]} {SHAPES[shape]}",
        "shape": SHAPES[shape],
        "colour": f"{COLOURS[colour]} object",
    }
    template = TEMPLATES[int(draw[0] * len(TEMPLATES))]
    text = template.format(names[by], size=SIZES[int(draw[1] * len(SIZES))])
    return f"{text} with the number {number}" if number >= 0 and draw[2] < 0.15 else text


def object_crops(
    images: Tensor,
    seen: Tensor,
    objects: Tensor,
    size: int,
    margin: tuple[float, float],
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Square crops around all objects that are seen well enough.

    Args:
        images: uint8 [B, 3, S, S].
        seen: int8 [B, S, S], the object at each pixel or -1.
        objects: [B, 8, 12], as `pack` gives them.
        size: side of a crop.
        margin: least and most of what is shown around an object, as a share of its longer side.
        random: decides margins, and shifts of up to an eighth of the side.

    Returns:
        crops float32 [N, 3, size, size] in 0..255, and their shape, colour and number: LongTensor [N, 3].
    """
    batch, device = len(images), images.device
    own = seen[:, None] == torch.arange(MAX_OBJECTS, device=device)[:, None, None]
    line = torch.arange(SIDE, device=device)
    columns, rows = own.any(2), own.any(3)
    low = torch.stack([torch.where(axis, line, SIDE).min(-1).values for axis in (columns, rows)], -1)
    high = torch.stack([torch.where(axis, line, -1).max(-1).values + 1 for axis in (columns, rows)], -1)
    draw = torch.rand(batch, MAX_OBJECTS, 3, generator=random, device=device)
    half = (high - low).amax(-1, keepdim=True) * (1 + margin[0] + (margin[1] - margin[0]) * draw[..., :1]) / 2
    centre = (low + high) / 2 + half * (draw[..., 1:] - 0.5) / 4
    ticks = ((torch.arange(size, device=device) + 0.5) / size * 2 - 1)[:, None] * half[..., None, :]
    x = (centre[..., None, :1] + ticks) / SIDE * 2 - 1  # [B, 8, size, 1]
    y = (centre[..., None, 1:] + ticks) / SIDE * 2 - 1
    shape = (batch, MAX_OBJECTS, size, size)
    grid = torch.stack((x.transpose(-1, -2).expand(shape), y.expand(shape)), -1).flatten(1, 2)
    crops = grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    crops = crops.reshape(batch, 3, MAX_OBJECTS, size, size).transpose(1, 2)
    kinds = objects[..., [SHAPE, COLOUR, NUMBER]].long()
    well = own.flatten(2).sum(-1) >= LEAST_VISIBLE
    return crops[well], kinds[well]
