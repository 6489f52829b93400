"""score -> select -> recycle -> shorten: a method, and how it is loaded by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vprune.amounts import OWN_ROWS, Stage, checked_keep, checked_options, checked_stages
from vprune.budgets import Budget, count_of
from vprune.errors import VPruneError
from vprune.method_files import method_label, read_method
from vprune.models.anatomy import Anatomy
from vprune.models.aside import sent
from vprune.places import rows_of, together
from vprune.records import Grid, Prefill, Selection, VisualTokens
from vprune.recycling import Absorption, Recycler, pool_cells, representatives
from vprune.scoring import Scorer
from vprune.selection import Ranking, Selector, TopK, cell_of_token, cells_within, frame_by_frame

_COMMON = ("layer", "seed")  # accepted by every method, for sweeps; used by those whose parts have them
_PARTS = ("scorer", "selector")


@dataclass
class Pruner:
    """A method of pruning: who matters, who stays, and what becomes of the rest.

    Args:
        keep: what stays of every image: a fraction in (0, 1], K = max(1, floor(keep * N)), or a number of tokens, an
            int >= 1.
        scorer: gives the importance, None = the order does not depend on any.
        selector: puts the tokens in the order in which they are kept.
        recycle: what becomes of the pruned tokens, within the budget: "none" drops them; "grid" and "weighted" keep
            means of those in each of `cells` grid cells; "nearest" merges them into what is kept; "anchors" merges them
            into rows of their own, a `share` of the budget; see `vprune.recycling.Recycler`.
        cells: at most so many grid cells; 9, 4 or 1 where they would take more than half of the budget.
        share: of the budget that goes to anchors.
        distance: what the distance on the grid takes off the likeness of a token to the row that it joins.
        size_aware: add log(number of merged tokens) to the attention logits of merged rows, at every layer and step.
        stages: the decoder layers before which tokens are pruned, each alone (to `keep`) or as [layer, keep], where
            keep is of the image's own tokens; None = before the first layer.
        budget: what `keep` is of: every "image", every "frame" of a video, or a "sample"'s images together, of which
            the most important tokens stay wherever they are; with "question", it is the mean over many questions, each
            of which gets the tokens that its answer needs, as far as a learned scorer can tell.
        minimum: at least so many tokens stay of every image (of every frame with budget="frame").
        layer: the decoder layer that was asked for. Methods whose parts read one have it there; of the others it is
            checked all the same, so that a sweep over methods and layers names a layer that the model does not have.
        name: the method's name, for reports.

    Raises:
        VPruneError: a value is out of its range.

    Example:
        >>> from vprune.pruner import load_method
        >>> load_method("attention", keep=64, layer=1).scorer
        TextAttention(layer=1, pool='mean')
    """

    keep: float | int = 0.1
    scorer: Scorer | None = None
    selector: Selector = field(default_factory=TopK)
    recycle: str = "none"
    cells: int = 16
    share: float = 0.15
    distance: float = 0.5
    size_aware: bool = False
    stages: Sequence[Any] | None = None
    budget: str = "image"
    minimum: int = 1
    layer: int | None = None
    name: str = ""

    hooked: ClassVar[bool] = True
    recycles: ClassVar[bool] = True  # False: nothing is left over, whatever `recycle` says

    def __post_init__(self) -> None:
        self.keep = checked_keep(self.keep)
        self._recycler = Recycler(self.recycle, self.cells, self.share, self.distance)
        checked_options(self.keep, self.recycle, self.size_aware, self.stages, self.budget, self.minimum, self.layer)
        if self.budget == "question" and not hasattr(self.scorer, "shares"):
            raise VPruneError(
                f"budget='question': {self.name or type(self.scorer).__name__} cannot tell how many tokens a question "
                "needs; method=learned can, or give budget=image"
            )

    @property
    def needs_evidence(self) -> bool:
        """True for a method that reads `pruning.evidence`, which only an annotated benchmark has."""
        return self.scorer is not None and self.scorer.needs_evidence

    def fitted(self, layers: int) -> Pruner:
        """The method for a decoder of so many layers: itself, unless its stages depend on their number."""
        return self

    def bound(self, anatomy: Anatomy) -> Pruner:
        """The method for one model: itself, unless its scorer brings something that was made for certain models only.

        Raises:
            VPruneError: not for this one.
        """
        binds = getattr(self.scorer, "bound", None)
        if binds is None:
            return self
        told = {"demand": True} if self.budget == "question" else {}
        if getattr(self.scorer, "minds_dropping", False):
            told["drops"] = self.recycle == "none"
        return replace(self, scorer=binds(anatomy, **told))

    def with_keep(self, keep: float | int) -> Pruner:
        """The same method with another budget."""
        return replace(self, keep=keep)

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """The stages (layer, keep), layers rising."""
        return checked_stages(self.stages, self.keep)

    @property
    def keeps_all(self) -> bool:
        """True when every token of every image stays as it is."""
        return self.schedule == ((0, 1.0),) and isinstance(self.schedule[0][1], float)

    def scoring_layer(self, stage: int) -> int:
        """The layer before which the importance for the stage at layer `stage` is measured: its own or an earlier."""
        layer = getattr(self.scorer, "layer", None)
        return stage if layer is None or layer < 0 else min(layer, stage)

    def score(self, prefill: Prefill) -> list[Tensor | None]:
        """The importance of the tokens of every image, float32 [N]; NaN where an earlier stage left nothing.

        Raises:
            VPruneError: the scorer lacks what it needs.
        """
        if self.scorer is None:
            return [None] * len(prefill.images)
        return [
            spread_over_grid(one, image) if one is not None else None
            for one, image in zip(self.scorer(prefill), prefill.images, strict=True)
        ]

    def rows(self, prefill: Prefill, maps: Sequence[Tensor | None], keep: float | int) -> list[int]:
        """How many rows stay of every image.

        Raises:
            VPruneError: the budget is more than an image has.
        """
        shares = getattr(self.scorer, "shares", None) if self.budget == "question" else None
        return Budget(keep, self.budget, self.minimum).rows_of(prefill.images, maps, shares)

    def plan(self, prefill: Prefill, maps: Sequence[Tensor | None], keep: float | int) -> list[Selection]:
        """Decide for every image of a prefill whose importance maps are `maps`.

        Raises:
            VPruneError: the budget is more than an image has.
        """
        rows = self.rows(prefill, maps, keep)
        alike: dict[tuple[Grid, int, int, bool], list[int]] = {}
        for number, (image, budget) in enumerate(zip(prefill.images, rows, strict=True)):
            alike.setdefault((image.grid, len(image), budget, image.standing is None), []).append(number)
        plans: dict[int, Selection] = {}
        for (_, _, budget, _), numbers in alike.items():
            found = self.plan_alike(prefill, numbers, budget, [maps[number] for number in numbers])
            plans |= zip(numbers, found, strict=True)
        return [plans[number] for number in range(len(rows))]

    def plan_alike(
        self, prefill: Prefill, numbers: Sequence[int], budget: int, maps: Sequence[Tensor | None]
    ) -> list[Selection]:
        """Decide for some images of a prefill, of one grid, of which as many tokens stand, all at once.

        All stays on the device of the hidden rows, and the host asks it for nothing.
        """
        device, grid = prefill.hidden.device, prefill.images[numbers[0]].grid
        images, given = [prefill.images[number] for number in numbers], [one for one in maps if one is not None]
        importance = sent(together([one.flatten() for one in given]), device) if given else None
        seen = [prefill.tower[image.origin] if image.origin >= 0 else None for image in images]
        prints = [one.fingerprint if one else 0 for one in seen]
        ranking = self.selector.rank(importance, grid, budget, prints).to(device)
        if self.budget == "frame":
            ranking = Ranking.of(frame_by_frame(ranking.order, grid))
        held, standing = [one for image in images if (one := image.standing) is not None], None
        if held:
            standing = Selection.stacked(held).to(device)
            ranking = ranking.of_those(standing.kept)
            importance = None if importance is None else importance.gather(-1, standing.kept)
        plan = self._recycler.plan(ranking, grid, budget, importance, standing, self.budget == "frame")
        if isinstance(plan, Absorption):
            plan = plan.settled(rows_of(prefill.hidden, images))
        return plan.unbind()


def spread_over_grid(importance: Tensor, image: VisualTokens) -> Tensor:
    """Importance [K] of what stands of an image, or [N] of all of it, as [N]; NaN where nothing stands."""
    if image.standing is None or importance.numel() != len(image):
        return importance
    whole = torch.full((math.prod(image.grid),), math.nan, device=importance.device)
    return whole.scatter(0, image.standing.kept.to(importance.device), importance.float())


@dataclass
class Full(Pruner):
    """The model as it is: nothing is pruned, and nothing is hooked into its forward path.

    Raises:
        VPruneError: keep is not 1.
    """

    keep: float | int = 1.0

    hooked: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None:
            raise VPruneError(f"method=full prunes at no stage: stages={self.stages!r} was given")
        if self.keep != 1:
            raise VPruneError(f"method=full keeps everything: keep={self.keep!r} was given, only keep=1.0 is possible")


@dataclass
class Pool(Pruner):
    """Average pooling: every row is the mean of a grid cell, as many as the budget holds; nothing is left over."""

    recycles: ClassVar[bool] = False

    def plan_alike(
        self, prefill: Prefill, numbers: Sequence[int], budget: int, maps: Sequence[Tensor | None]
    ) -> list[Selection]:
        """The means of the cells, each standing where its middle token stood."""
        images = [prefill.images[number] for number in numbers]
        return [pool_cells(image.grid, budget, image.standing) for image in images]


@dataclass
class Resize(Pruner):
    """The image is resized so that the vision tower gives at most the budget's tokens; nothing is left to recycle.

    The tower sees h' x w' patches with interpolated position encodings; each of its h' w' rows stands where the middle
    one of the tokens that it replaces stood.
    """

    recycles: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule[0][0] or len(self.schedule) > 1 or self.budget != "image":
            raise VPruneError("method=resize shrinks images before the model sees them: no stages, budget=image only")

    def small_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The patch grid that the vision tower sees instead of (h, w)."""
        return cells_within(*grid, count_of(self.keep, grid[0] * grid[1], [(1, *grid)]))

    def plan_alike(
        self, prefill: Prefill, numbers: Sequence[int], budget: int, maps: Sequence[Tensor | None]
    ) -> list[Selection]:
        """One row per token of the small grid.

        Raises:
            VPruneError: the image features were computed before the hooks were in place.
        """
        plans = []
        for image in (prefill.images[number] for number in numbers):
            if image.origin < 0:
                raise VPruneError("method=resize: pass pixel_values inside the `with vprune.prune(...)` block")
            seen = prefill.tower[image.origin]
            plans.append(representatives(cell_of_token(image.grid, (1, *(seen.small_grid or seen.grid[1:])))))
        return plans


def load_method(name: str, **options: Any) -> Pruner:
    """Make the method of conf/method/NAME.yaml, with options in place of its defaults (None = the default).

    `name` may also be the path of a YAML file of the same form, as `vprune tune` writes them.

    Raises:
        VPruneError: no such method, no such option, or a value out of range.

    Example:
        >>> load_method("random", keep=0.25, seed=3).keep
        0.25
    """
    from hydra.utils import instantiate

    config, name = read_method(name), method_label(name)
    for option, value in options.items():
        if value is not None:
            _place(config, name, option, value)
    config.pop("name", None)
    pruner = _instantiated(instantiate, config, name)
    if options.get("recycle") in OWN_ROWS and type(pruner.keep) is int and pruner.keep < 2 and pruner.recycles:
        raise VPruneError(
            f"keep={pruner.keep} leaves no room for the recycled tokens: recycle={pruner.recycle} needs 2 rows an "
            "image, one for what is kept and one for the rest; give keep >= 2, or recycle=none or nearest"
        )
    return pruner


def _place(config: dict[str, Any], name: str, option: str, value: Any) -> None:
    """Put an option where the method has it: at the top, or in the one part that knows it."""
    own = {key for key in config if key != "_target_"}  # what its class has beyond a Pruner's
    top = ({one.name for one in fields(Pruner)} - {"layer"} | own) - {"name", *_PARTS}
    parts = {part: config[part] for part in _PARTS if isinstance(config.get(part), dict)}
    owner = config if option in top else next((part for part in parts.values() if option in part), None)
    if owner is not None:
        owner[option] = value
    elif option == "layer":
        config[option] = value  # nothing reads it, but the model may not have it
    elif option not in _COMMON:
        known = top | {key for part in parts.values() for key in part if key != "_target_"} | set(_COMMON)
        raise VPruneError(f"method={name!r} has no option {option!r}: it has {', '.join(sorted(known))}")


def _instantiated(instantiate: Any, config: dict[str, Any], name: str) -> Pruner:
    from hydra.errors import InstantiationException

    try:
        pruner: Pruner = instantiate(config, name=name)
    except InstantiationException as error:
        # Hydra wraps what a constructor raises; a user's mistake should read as one.
        if isinstance(error.__cause__, VPruneError):
            raise error.__cause__ from None
        if "locating target" in str(error):
            raise VPruneError(
                f"method={name}: {str(error).splitlines()[0]} Is the module's folder on PYTHONPATH, and is the class "
                "spelt so?"
            ) from error
        raise
    return pruner
