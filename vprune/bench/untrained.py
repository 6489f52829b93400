"""The scorer of method=learned for a model that none was trained for: random weights, so that its cost is counted."""

from __future__ import annotations

from typing import Any

import torch

from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy
from vprune.scoring.learned import Learned, identity_of
from vprune.scoring.network import ScorerConfig, ScorerNetwork

# (learned heads, width of each, channels read off the rows), the widest first: a wide model leaves room for fewer of
# them below the limit of parameters.
_READERS = ((8, 16, 24), (4, 8, 24), (2, 8, 16), (2, 4, 16), (1, 4, 8))


class Untrained(Learned):
    """`Learned` with a network of random weights that fits the model; its maps mean nothing, its time does."""

    def bound(self, anatomy: Anatomy, demand: bool = False, drops: bool = False) -> Untrained:
        """The same with a network for this model, reading as much of the rows as its size allows.

        Raises:
            VPruneError: it should tell how many tokens a question needs, which random weights cannot.
        """
        if demand:
            raise VPruneError("budget=question: random weights cannot tell what a question needs; give budget=image")
        text: Any = anatomy.decoder.config
        shape: dict[str, Any] = {"heads": text.num_attention_heads, "model": identity_of(anatomy)}
        other = Untrained()
        torch.manual_seed(0)
        for matches, width, contents in _READERS:
            readers: dict[str, Any] = {"matches": matches, "match_width": width, "contents": contents}
            try:
                other.network = ScorerNetwork(ScorerConfig(**shape, width=text.hidden_size, **readers))
                break
            except VPruneError:
                continue
        else:
            other.network = ScorerNetwork(ScorerConfig(**shape))
        other.network.float().eval()
        return other
