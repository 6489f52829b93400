"""How a picture becomes masks: every choice of the method in one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vprune.errors import VPruneError
from vprune.segmentation.maps import MeanAttention
from vprune.segmentation.prompting import Prompting
from vprune.segmentation.reading import Extractor


@dataclass
class Recipe:
    """How a picture becomes masks; see conf/segment.yaml, which names every field and its default.

    Args:
        questions: how the model is asked what it sees; the answers to all of them are merged.
        refer: how it is asked for a phrase, `{phrase}` standing for it.
        maps: what makes maps of attention, see `vprune.segmentation.maps`.
        background: a phrase whose map is taken off every object's (DecAF's contrast); None: no contrast.
        rows: which tokens of a name are asked: all | content (no stop words) | last.
        final: ask the prompt's last token too, where a phrase is looked for.
        marked: where the image is pruned, so many of the tokens that stay are, for every name, those that its words
            attend to most; see `vprune.segmentation.marked`. 0: what stays is the method's choice alone.
        crops: look at the four corners of the picture too, each `crop` of its sides.
        prompting: how maps become masks.
        overlap: IoU above which the lesser of two masks is dropped.
        least: masks of a lower score are dropped.
        max_new_tokens: of a listing.

    Raises:
        VPruneError: a value out of range.
    """

    questions: Sequence[str] = ("list the objects.",)
    refer: str = "point to the {phrase}."
    maps: Extractor = field(default_factory=lambda: MeanAttention(first=0.25, last=0.5))
    background: str | None = None
    rows: str = "last"
    final: bool = True
    marked: int = 0
    crops: bool = False
    crop: float = 0.6
    prompting: Prompting = field(default_factory=Prompting)
    overlap: float = 0.7
    least: float = 0.0
    max_new_tokens: int = 96

    def __post_init__(self) -> None:
        if self.rows not in ("all", "content", "last"):
            raise VPruneError(f"rows={self.rows}: choose one of all, content, last")
        if "{phrase}" not in self.refer:
            raise VPruneError(f"refer={self.refer!r}: it has no {{phrase}} in it")
        if isinstance(self.marked, bool) or not isinstance(self.marked, int) or self.marked < 0:
            raise VPruneError(f"marked={self.marked!r}: give a number of tokens, 0 or more")
        if not 0.5 <= self.crop < 1 or not 0 < self.overlap <= 1 or not self.questions:
            raise VPruneError("0.5 <= crop < 1, 0 < overlap <= 1 and at least one question are needed")
