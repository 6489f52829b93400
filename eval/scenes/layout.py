"""Draws a scene from a random stream: what is in it, how large, where, and on which background."""

from __future__ import annotations

import math
import random

from vprune.eval.scenes.world import COLOURS, MAX_OBJECTS, RADII, SHAPES, SIDE, Background, Object, Scene

RING = SHAPES.index("ring")
LEAST_OBJECTS = 3


def stream(seed: int, index: int) -> random.Random:
    """The random stream of scene `index` of the world with this `seed`: the same on every machine."""
    return random.Random(f"vprune scenes {seed} {index}")


def sample_scene(rng: random.Random, photographs: int) -> Scene:
    """Draws one scene; `photographs` is the number of photographs that backgrounds are cut from."""
    wanted = rng.randint(LEAST_OBJECTS, MAX_OBJECTS)
    shapes = rng.sample(range(len(SHAPES)), rng.randint(2, 6))
    colours = rng.sample(range(len(COLOURS)), rng.randint(2, 6))
    objects: list[Object] = []
    numbers: set[int] = set()
    for _ in range(8 * wanted):
        if len(objects) == wanted:
            break
        candidate = _sample_object(rng, shapes, colours, numbers)
        if _fits(candidate, objects) and not _repeats(rng, candidate, objects):
            objects.append(candidate)
            if candidate.number is not None:
                numbers.add(candidate.number)
    return Scene(tuple(objects), _sample_background(rng, photographs))


def _sample_object(rng: random.Random, shapes: list[int], colours: list[int], taken: set[int]) -> Object:
    shape = shapes[int(rng.random() * len(shapes))]
    draw = rng.random()
    size = 0 if draw < 0.30 else 1 if draw < 0.60 else 2
    low, high = RADII[size]
    radius = low + (high - low) * rng.random()
    room = SIDE - 2 * radius - 4
    number = None
    if size == 2 and shape != RING and rng.random() < 0.8:
        number = int(rng.random() * 10) if rng.random() < 0.35 else 10 + int(rng.random() * 90)
        if number in taken:
            number = None
    return Object(
        shape=shape,
        colour=colours[int(rng.random() * len(colours))],
        size=size,
        x=radius + 2 + room * rng.random(),
        y=radius + 2 + room * rng.random(),
        radius=radius,
        angle=math.radians(rng.uniform(-12, 12)),
        tone=(rng.uniform(-14, 14), rng.uniform(-14, 14), rng.uniform(-14, 14)),
        number=number,
    )


def _fits(candidate: Object, objects: list[Object]) -> bool:
    """Objects may overlap, but most of each stays visible and a number is never covered."""
    for below in objects:
        distance = math.hypot(candidate.x - below.x, candidate.y - below.y)
        if distance < 0.78 * (candidate.radius + below.radius):
            return False
        if below.number is not None and distance < candidate.radius + 0.6 * below.radius:
            return False
        if below.size < candidate.size and distance < candidate.radius + 0.5 * below.radius:
            return False
    return True


def _repeats(rng: random.Random, candidate: Object, objects: list[Object]) -> bool:
    """A second object of the same name is let in one time in six, so that most names stay unique."""
    twin = any(o.shape == candidate.shape and o.colour == candidate.colour for o in objects)
    return twin and rng.random() > 1 / 6


def _sample_background(rng: random.Random, photographs: int) -> Background:
    gain = rng.uniform(0.7, 1.15)
    return Background(
        photograph=int(rng.random() * photographs),
        centre=(rng.random(), rng.random()),
        zoom=rng.uniform(0.35, 1.0),
        turn=math.radians(rng.uniform(-20, 20)),
        mirror=rng.random() < 0.5,
        gain=(gain * rng.uniform(0.85, 1.15), gain * rng.uniform(0.85, 1.15), gain * rng.uniform(0.85, 1.15)),
        bias=rng.uniform(-20, 20),
        mixed_with=int(rng.random() * photographs),
        mix=rng.uniform(0.0, 0.5) if rng.random() < 0.3 else 0.0,
    )
