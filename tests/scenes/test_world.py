"""The scenes world: one seed one scene, true pictures, true answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import vprune
from vprune.eval.scenes import layout, questions
from vprune.eval.scenes.render import Painter, load_photographs, number_masks, pack, shape_distances
from vprune.eval.scenes.split import TEST_SEED, write_split
from vprune.eval.scenes.world import CELL, COLOURS, KINDS, RGB, SHAPES, SIDE, Object, Scene

SHIPPED = Path(vprune.__file__).parent / "assets" / "scenes"


def scenes(count: int, seed: int = 11) -> list[Scene]:
    return [layout.sample_scene(layout.stream(seed, i), photographs=4) for i in range(count)]


def test_one_seed_gives_one_scene() -> None:
    assert scenes(20) == scenes(20)
    assert scenes(20) != scenes(20, seed=12)


def test_every_shape_colour_count_and_kind_comes_up() -> None:
    drawn = scenes(300)
    assert {o.shape for s in drawn for o in s.objects} == set(range(len(SHAPES)))
    assert {o.colour for s in drawn for o in s.objects} == set(range(len(COLOURS)))
    assert {len(s.objects) for s in drawn} == set(range(3, 9))
    digits = {len(str(o.number)) for s in drawn for o in s.objects if o.number is not None}
    assert digits == {1, 2}
    for kind in KINDS:
        rng = layout.stream(0, 0)
        assert sum(questions.ask(kind, s, rng) is not None for s in drawn) > 100, kind


def test_a_single_scene_paints_as_it_does_in_a_batch() -> None:
    drawn = scenes(3)
    painter = Painter("test")
    images, seen = painter.render(pack(drawn))
    assert images.shape == (3, 3, SIDE, SIDE) and images.dtype == torch.uint8
    assert seen.shape == (3, SIDE, SIDE)
    for b, scene in enumerate(drawn):
        alone, alone_seen = painter.render(pack([scene]))
        assert (alone[0].int() - images[b].int()).abs().max() <= 1  # rounding of a vectorised sum may differ
        assert torch.equal(alone_seen[0], seen[b])


def test_the_pixels_seen_are_those_painted_in_the_objects_colour() -> None:
    drawn = scenes(6)
    images, seen = Painter("test").render(pack(drawn))
    for b, scene in enumerate(drawn):
        for k, o in enumerate(scene.objects):
            mask = seen[b] == k
            assert mask.sum() > 0.3 * o.radius**2, f"{o.caption} is hidden"
            ys, xs = mask.nonzero(as_tuple=True)
            assert xs.min() >= o.x - 1.3 * o.radius and xs.max() <= o.x + 1.3 * o.radius
            assert ys.min() >= o.y - 1.3 * o.radius and ys.max() <= o.y + 1.3 * o.radius
            if o.number is None and o.size > 0:  # most of a small ring is outline
                median = images[b][:, mask].float().median(dim=1).values
                wanted = torch.tensor(RGB[o.colour]) + torch.tensor(o.tone)
                assert (median - wanted.clamp(0, 255)).abs().max() < 25, o.caption


def test_signed_distances_have_unit_slope_and_numbers_have_ink() -> None:
    tables = shape_distances()
    assert tables.shape == (8, 160, 160)
    step = 2 * 1.3 / 160
    slope = torch.hypot(*(torch.diff(tables, dim=d)[:, :159, :159] / step for d in (1, 2)))
    assert slope.median(dim=1).values.median(dim=1).values == pytest.approx(torch.ones(8), abs=0.02)
    masks = number_masks()
    assert masks.shape == (100, 48, 64)
    assert masks.amax((1, 2)).min() > 0.9
    assert len({m.numpy().tobytes() for m in masks}) == 100


def test_no_photograph_is_in_both_sets() -> None:
    train, test = load_photographs("train").float(), load_photographs("test").float()
    for photograph in test:
        assert (train - photograph).abs().mean((1, 2, 3)).min() > 10


def by_hand(scene: Scene, q: questions.Question) -> str:
    """The answer worked out from the question's words alone."""
    words = q.question.rstrip(".?").replace(",", "").split()

    def named(name: list[str]) -> list[Object]:
        colours, shapes, sizes = set(COLOURS) & set(name), set(name) & set(SHAPES), {"small", "large"} & set(name)
        numbers = [int(w) for w in name if w.isdigit()]
        return [
            o
            for o in scene.objects
            if (not colours or COLOURS[o.colour] in colours)
            and (not shapes or SHAPES[o.shape] in shapes)
            and (not sizes or ("small", "medium", "large")[o.size] in sizes)
            and (not numbers or o.number == numbers[0])
        ]

    if q.kind == "exists":
        return "yes" if named(words[3:]) else "no"
    if q.kind == "colour":
        return COLOURS[named(words[4:])[0].colour]
    if q.kind == "shape":
        return SHAPES[named(words[4:])[0].shape]
    if q.kind == "count":
        singular = [w[:-2] if w == "crosses" else w.removesuffix("s") for w in words[2:-2]]
        return str(len(named(singular)))
    if q.kind == "number":
        return str(named(words[-2:])[0].number)
    if q.kind == "where":
        return named(words[-2:])[0].place
    if q.kind == "relation":
        a, b = named(words[2:4])[0], named(words[-2:])[0]
        truths = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
        return "yes" if truths[words[4]] else "no"
    if q.kind == "compare":
        pair = sorted((named(words[4:6])[0], named(words[-2:])[0]), key=lambda o: o.radius)
        return pair["larger" in words].name
    if q.kind == "position":
        return next(o.name for o in scene.objects if o.place == " ".join(words[-2:]))
    assert q.kind == "list"
    return ", ".join(scene.objects[i].name for i in scene.scan_order)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "refer"])
def test_answers_follow_from_the_questions_words(kind: str) -> None:
    rng = layout.stream(3, 3)
    asked = [(s, q) for s in scenes(200) if (q := questions.ask(kind, s, rng))]
    assert len(asked) > 60
    for scene, question in asked:
        assert question.answer == by_hand(scene, question), question
        assert set(question.evidence) <= set(range(len(scene.objects)))


def test_refer_points_into_its_target() -> None:
    rng = layout.stream(3, 3)
    for scene in scenes(200):
        q = questions.ask("refer", scene, rng)
        if q is None:
            continue
        assert q.target is not None and q.target in q.evidence
        o = scene.objects[q.target]
        x, y = (CELL * (int(part[1:]) + 0.5) for part in q.answer.split())
        assert max(abs(x - o.x), abs(y - o.y)) <= CELL


def test_yes_and_no_are_balanced() -> None:
    rng = layout.stream(5, 5)
    for kind in ("exists", "relation"):
        answers = Counter(q.answer for s in scenes(600) if (q := questions.ask(kind, s, rng)))
        assert 0.42 < answers["yes"] / answers.total() < 0.58, kind


def test_a_split_is_ordinary_files_and_one_seed_gives_one_split(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_split(tmp_path / name, images=3, seed=4)
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    assert (one / "objects.json").read_bytes() == (two / "objects.json").read_bytes()
    assert len((one / "samples.jsonl").read_text().splitlines()) == 24
    assert sorted(f.name for f in (one / "images").iterdir()) == [f"{i:06d}.webp" for i in range(3)]


def test_the_shipped_split_is_what_its_seed_gives(tmp_path: Path) -> None:
    write_split(tmp_path, images=4, seed=TEST_SEED)
    shipped = (SHIPPED / "samples.jsonl").read_text().splitlines()
    assert (tmp_path / "samples.jsonl").read_text().splitlines() == shipped[:32]
    with Image.open(tmp_path / "images/000000.webp") as fresh, Image.open(SHIPPED / "images/000000.webp") as kept:
        difference = np.abs(np.asarray(fresh, dtype=int) - np.asarray(kept, dtype=int))
    assert difference.mean() < 1.0  # another WebP encoder may round differently


def test_the_shipped_split_is_whole() -> None:
    samples = [json.loads(line) for line in (SHIPPED / "samples.jsonl").read_text().splitlines()]
    objects = json.loads((SHIPPED / "objects.json").read_text())
    annotations = {a["id"]: a for a in objects["annotations"]}
    assert len(objects["images"]) >= 500 and len(samples) >= 3000
    assert len({s["id"] for s in samples}) == len(samples)
    counts = Counter(s["kind"] for s in samples)
    assert set(counts) == set(KINDS) and min(counts.values()) > 0.9 * max(counts.values())
    files = {i["id"]: i["file_name"] for i in objects["images"]}
    assert all((SHIPPED / f).is_file() for f in files.values())
    for sample in samples:
        assert all(files[annotations[e]["image_id"]] == sample["image"] for e in sample["evidence"])
    for annotation in objects["annotations"][::50]:
        mask = coco_mask.decode(annotation["segmentation"])
        assert mask.sum() == annotation["area"] >= 40
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*.*")) < 10_000_000
