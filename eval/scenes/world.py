"""The nouns of the scenes world: shapes, colours, sizes, places, objects and scenes."""

from __future__ import annotations

from dataclasses import dataclass, field

SIDE = 384
"""Width and height of an image in pixels."""
GRID = 24
"""Cells per side of the grid that `refer` answers point at (16 px each)."""
CELL = SIDE // GRID
MAX_OBJECTS = 8

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
RGB = (
    (214, 38, 40),
    (247, 138, 22),
    (247, 222, 40),
    (44, 158, 62),
    (34, 92, 214),
    (142, 62, 178),
    (240, 240, 240),
    (26, 26, 30),
)
DARK_TEXT = frozenset({1, 2, 6})
"""Colours that carry their number in black; the others carry it in white."""

SIZES = ("small", "medium", "large")
RADII = ((16.0, 21.0), (25.0, 32.0), (38.0, 50.0))
"""Radius in pixels of each size: ranges far enough apart that the words are never in doubt."""

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
KINDS = (
    "exists",
    "colour",
    "shape",
    "count",
    "position",
    "relation",
    "number",
    "where",
    "compare",
    "list",
    "refer",
)


@dataclass(frozen=True, slots=True)
class Object:
    """One object: indices into SHAPES, COLOURS and SIZES, centre and radius in pixels, and the number it carries."""

    shape: int
    colour: int
    size: int
    x: float
    y: float
    radius: float
    angle: float
    tone: tuple[float, float, float]
    number: int | None = None

    @property
    def name(self) -> str:
        """Colour and shape: `red circle`."""
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"

    @property
    def cell(self) -> tuple[int, int]:
        """Column and row of the centre on the 24 x 24 grid."""
        return int(self.x) // CELL, int(self.y) // CELL

    @property
    def place(self) -> str:
        """The third of the image, by rows and columns, that holds the centre: `top left` ... `bottom right`."""
        return f"{ROWS[min(2, int(self.y * 3 / SIDE))]} {COLUMNS[min(2, int(self.x * 3 / SIDE))]}"

    @property
    def caption(self) -> str:
        """Everything there is to say: `large red circle with the number 47 in the top left`."""
        number = "" if self.number is None else f" with the number {self.number}"
        return f"{SIZES[self.size]} {self.name}{number} in the {self.place}"


@dataclass(frozen=True, slots=True)
class Background:
    """A crop of a photograph: index, centre and half-width of the crop as fractions, flips and a colour transform."""

    photograph: int
    centre: tuple[float, float]
    zoom: float
    turn: float
    mirror: bool
    gain: tuple[float, float, float]
    bias: float
    mixed_with: int
    mix: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in painting order (later ones cover earlier ones) over a background."""

    objects: tuple[Object, ...]
    background: Background

    @property
    def scan_order(self) -> tuple[int, ...]:
        """Indices of the objects row by row of the grid, left to right: the order in which listings name them."""
        return tuple(sorted(range(len(self.objects)), key=lambda i: self.objects[i].cell[::-1]))


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene; `evidence` holds the indices of the objects that its answer rests on."""

    kind: str
    question: str
    answer: str
    evidence: tuple[int, ...] = field(default=())
    target: int | None = None
    """For `refer`: the object the answer points at."""
