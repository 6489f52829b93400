"""Asks about a scene: one function per kind of question, each giving the answer and the objects it rests on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from vprune.eval.scenes.world import (
    CELL,
    COLOURS,
    COLUMNS,
    GRID,
    KINDS,
    ROWS,
    SHAPES,
    SIDE,
    SIZES,
    Object,
    Question,
    Scene,
)

RELATION_MARGIN = 32.0
"""Least distance in pixels, along the axis asked about, between two objects that are compared in place."""
PLACE_MARGIN = 10.0
"""Least distance in pixels between a centre and the border of the third of the image it is said to lie in."""
LARGER = 1.3
"""Least ratio of two radii of which one is called larger."""

YES_NO = ("no", "yes")
PLAIN = (
    "is there a an in the image what colour object objects with number shape how many are left right above below of on "
    "read where which larger smaller or list point to leftmost rightmost topmost bottommost yes no describe all"
)
"""The words of the templates below; those of the world are added by `words`."""


def ask(kind: str, scene: Scene, rng: random.Random) -> Question | None:
    """A question of this kind about the scene, or None where the scene allows none without ambiguity."""
    return ASK[kind](scene.objects, rng)


def describe(scene: Scene) -> Question:
    """Everything about every object in scan order: the dense supervision of training, never part of the benchmark."""
    parts = []
    for i in scene.scan_order:
        o = scene.objects[i]
        number = "" if o.number is None else f" {o.number}"
        parts.append(f"{SIZES[o.size]} {o.name}{number} {point(o)}")
    everything = tuple(range(len(scene.objects)))
    return Question("describe", "describe all the objects.", ", ".join(parts), everything)


def point(o: Object) -> str:
    """The cell of the 24 x 24 grid that holds the object's centre, as `xCC yRR`."""
    column, row = o.cell
    return f"x{column:02d} y{row:02d}"


def _pick(rng: random.Random, items: Sequence[int]) -> int:
    return items[int(rng.random() * len(items))]


def _unique(objects: Sequence[Object]) -> list[int]:
    """Indices of the objects whose name no other object bears."""
    names = Counter((o.colour, o.shape) for o in objects)
    return [i for i, o in enumerate(objects) if names[o.colour, o.shape] == 1]


def _exists(objects: Sequence[Object], rng: random.Random) -> Question | None:
    # Absent names are mostly hard ones: the colour is there and the shape is there, but not on one object.
    colours = sorted({o.colour for o in objects})
    shapes = sorted({o.shape for o in objects})
    form = rng.random()
    present = rng.random() < 0.5
    if form < 0.6:
        if present:
            some = objects[_pick(rng, range(len(objects)))]
            colour, shape = some.colour, some.shape
        else:
            there = {(o.colour, o.shape) for o in objects}
            hard = [(c, s) for c in colours for s in shapes if (c, s) not in there]
            if hard and rng.random() < 0.7:
                colour, shape = hard[int(rng.random() * len(hard))]
            else:
                colour, shape = _pick(rng, range(len(COLOURS))), _pick(rng, range(len(SHAPES)))
                if (colour, shape) in there:
                    return None
        name = f"{COLOURS[colour]} {SHAPES[shape]}"
        match = [i for i, o in enumerate(objects) if o.colour == colour and o.shape == shape]
        near = [i for i, o in enumerate(objects) if o.colour == colour or o.shape == shape]
    elif form < 0.8:
        shape = _pick(rng, shapes if present else [s for s in range(len(SHAPES)) if s not in shapes])
        name = SHAPES[shape]
        match = near = [i for i, o in enumerate(objects) if o.shape == shape]
    else:
        colour = _pick(rng, colours if present else [c for c in range(len(COLOURS)) if c not in colours])
        name = f"{COLOURS[colour]} object"
        match = near = [i for i, o in enumerate(objects) if o.colour == colour]
    article = "an" if name[0] in "aeiou" else "a"
    text = f"is there {article} {name} in the image?" if rng.random() < 0.5 else f"is there {article} {name}?"
    return Question("exists", text, YES_NO[bool(match)], tuple(match or near))


def _colour(objects: Sequence[Object], rng: random.Random) -> Question | None:
    shapes = Counter(o.shape for o in objects)
    sized = Counter((o.size, o.shape) for o in objects)
    ways: list[tuple[int, str]] = []
    for i, o in enumerate(objects):
        if shapes[o.shape] == 1:
            ways.append((i, SHAPES[o.shape]))
        elif o.size != 1 and sized[o.size, o.shape] == 1:
            ways.append((i, f"{SIZES[o.size]} {SHAPES[o.shape]}"))
        if o.number is not None:
            ways.append((i, f"object with the number {o.number}"))
    if not ways:
        return None
    i, name = ways[int(rng.random() * len(ways))]
    return Question("colour", f"what colour is the {name}?", COLOURS[objects[i].colour], (i,))


def _shape(objects: Sequence[Object], rng: random.Random) -> Question | None:
    colours = Counter(o.colour for o in objects)
    sized = Counter((o.size, o.colour) for o in objects)
    ways: list[tuple[int, str]] = []
    for i, o in enumerate(objects):
        if colours[o.colour] == 1:
            ways.append((i, f"{COLOURS[o.colour]} object"))
        elif o.size != 1 and sized[o.size, o.colour] == 1:
            ways.append((i, f"{SIZES[o.size]} {COLOURS[o.colour]} object"))
        if o.number is not None:
            ways.append((i, f"object with the number {o.number}"))
    if not ways:
        return None
    i, name = ways[int(rng.random() * len(ways))]
    return Question("shape", f"what shape is the {name}?", SHAPES[objects[i].shape], (i,))


def _count(objects: Sequence[Object], rng: random.Random) -> Question | None:
    form = rng.random()
    some = objects[_pick(rng, range(len(objects)))]
    if form < 0.2:
        name, match = "objects", list(range(len(objects)))
    elif form < 0.6:
        shape = some.shape if rng.random() < 0.88 else _pick(rng, range(len(SHAPES)))
        plural = SHAPES[shape] + ("es" if SHAPES[shape].endswith("s") else "s")
        name, match = plural, [i for i, o in enumerate(objects) if o.shape == shape]
    else:
        colour = some.colour if rng.random() < 0.88 else _pick(rng, range(len(COLOURS)))
        name, match = f"{COLOURS[colour]} objects", [i for i, o in enumerate(objects) if o.colour == colour]
    return Question("count", f"how many {name} are there?", str(len(match)), tuple(match))


def _clear_place(o: Object) -> bool:
    return all(abs(v - edge) >= PLACE_MARGIN for v in (o.x, o.y) for edge in (SIDE / 3, 2 * SIDE / 3))


def _position(objects: Sequence[Object], rng: random.Random) -> Question | None:
    places = Counter(o.place for o in objects)
    doubtful = {o.place for o in objects if not _clear_place(o)}
    near = {p for o in objects if not _clear_place(o) for p in _places_within(o, PLACE_MARGIN)} | doubtful
    alone = [i for i, o in enumerate(objects) if places[o.place] == 1 and o.place not in near]
    if not alone:
        return None
    i = _pick(rng, alone)
    return Question("position", f"what is in the {objects[i].place}?", objects[i].name, (i,))


def _places_within(o: Object, margin: float) -> set[str]:
    def thirds(v: float) -> set[int]:
        return {min(2, max(0, int((v + d) * 3 / SIDE))) for d in (-margin, margin)}

    return {f"{ROWS[r]} {COLUMNS[c]}" for r in thirds(o.y) for c in thirds(o.x)}


def _relation(objects: Sequence[Object], rng: random.Random) -> Question | None:
    unique = _unique(objects)
    if len(unique) < 2:
        return None
    i, j = rng.sample(unique, 2)
    a, b = objects[i], objects[j]
    axes = [axis for axis, gap in enumerate((b.x - a.x, b.y - a.y)) if abs(gap) >= RELATION_MARGIN]
    if not axes:
        return None
    axis = _pick(rng, axes)
    word = rng.choice((("left of", "right of"), ("above", "below"))[axis])
    before = (a.x < b.x, a.y < b.y)[axis]
    truth = before == (word in ("left of", "above"))
    return Question("relation", f"is the {a.name} {word} the {b.name}?", YES_NO[truth], (i, j))


def _number(objects: Sequence[Object], rng: random.Random) -> Question | None:
    numbered = [i for i in _unique(objects) if objects[i].number is not None]
    if not numbered:
        return None
    i = _pick(rng, numbered)
    text = "what number is on the" if rng.random() < 0.5 else "read the number on the"
    end = "?" if text.startswith("what") else "."
    return Question("number", f"{text} {objects[i].name}{end}", str(objects[i].number), (i,))


def _where(objects: Sequence[Object], rng: random.Random) -> Question | None:
    clear = [i for i in _unique(objects) if _clear_place(objects[i])]
    if not clear:
        return None
    i = _pick(rng, clear)
    return Question("where", f"where is the {objects[i].name}?", objects[i].place, (i,))


def _compare(objects: Sequence[Object], rng: random.Random) -> Question | None:
    unique = _unique(objects)
    if len(unique) < 2:
        return None
    i, j = rng.sample(unique, 2)
    large, small = sorted((objects[i], objects[j]), key=lambda o: -o.radius)
    if large.radius < LARGER * small.radius:
        return None
    word = rng.choice(("larger", "smaller"))
    answer = large if word == "larger" else small
    return Question("compare", f"which is {word}, the {objects[i].name} or the {objects[j].name}?", answer.name, (i, j))


def _list(objects: Sequence[Object], rng: random.Random) -> Question | None:
    order = sorted(range(len(objects)), key=lambda i: objects[i].cell[::-1])
    text = "list the objects." if rng.random() < 0.5 else "what objects are in the image?"
    return Question("list", text, ", ".join(objects[i].name for i in order), tuple(range(len(objects))))


def _refer(objects: Sequence[Object], rng: random.Random) -> Question | None:
    form = rng.random()
    candidates: list[int] = []
    if form < 0.45:
        unique = _unique(objects)
        if not unique:
            return None
        i = _pick(rng, unique)
        name, candidates = objects[i].name, [i]
    elif form < 0.6:
        numbered = [i for i, o in enumerate(objects) if o.number is not None]
        if not numbered:
            return None
        i = _pick(rng, numbered)
        name, candidates = f"object with the number {objects[i].number}", [i]
    else:
        found = _superlative(objects, rng) if form < 0.85 else _sized(objects, rng)
        if found is None:
            return None
        i, name, candidates = found
    return Question("refer", f"point to the {name}.", point(objects[i]), tuple(candidates), target=i)


def _superlative(objects: Sequence[Object], rng: random.Random) -> tuple[int, str, list[int]] | None:
    shape = objects[_pick(rng, range(len(objects)))].shape
    group = [i for i, o in enumerate(objects) if o.shape == shape]
    noun = SHAPES[shape]
    if len(group) < 2:
        group, noun = list(range(len(objects))), "object"
    axis, sign, word = rng.choice(((0, 1, "leftmost"), (0, -1, "rightmost"), (1, 1, "topmost"), (1, -1, "bottommost")))
    order = sorted(group, key=lambda i: sign * (objects[i].x, objects[i].y)[axis])
    first, second = objects[order[0]], objects[order[1]]
    if abs((first.x, first.y)[axis] - (second.x, second.y)[axis]) < 1.5 * CELL:
        return None
    return order[0], f"{word} {noun}", group


def _sized(objects: Sequence[Object], rng: random.Random) -> tuple[int, str, list[int]] | None:
    sized = Counter((o.size, o.shape) for o in objects)
    fitting = [i for i, o in enumerate(objects) if o.size != 1 and sized[o.size, o.shape] == 1]
    if not fitting:
        return None
    i = _pick(rng, fitting)
    same_shape = [j for j, o in enumerate(objects) if o.shape == objects[i].shape]
    return i, f"{SIZES[objects[i].size]} {SHAPES[objects[i].shape]}", same_shape


ASK: dict[str, Callable[[Sequence[Object], random.Random], Question | None]] = dict(
    zip(
        KINDS,
        (_exists, _colour, _shape, _count, _position, _relation, _number, _where, _compare, _list, _refer),
        strict=True,
    )
)


def words() -> list[str]:
    """Every word that questions and answers use: the vocabulary of the embedded model's tokenizer."""
    plurals = [s + ("es" if s.endswith("s") else "s") for s in SHAPES]
    grid = [f"{axis}{n:02d}" for axis in "xy" for n in range(GRID)]
    digits = [*"0123456789", *(f"##{d}" for d in range(10))]
    listed = [*PLAIN.split(), *SHAPES, *plurals, *COLOURS, *SIZES, *ROWS, *COLUMNS, *digits, *grid, "?", ".", ","]
    return list(dict.fromkeys(listed))
