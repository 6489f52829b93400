"""budget=question: tokens go to the questions that need them, `keep` of all in the mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import vprune
from tests.exactness.prompts import batch
from tests.scoring.test_learned import network, saved
from vprune import VPruneError
from vprune.models.anatomy import dissect
from vprune.scoring.learned import identity_of
from vprune.scoring.network import ScorerConfig, ScorerNetwork, shares_at
from vprune.training.demand import learn, observe

LEVELS = (0.1, 0.3, 0.6)


def with_prices(model: Any, folder: Path, shift: float = 0.0) -> str:
    """A scorer whose head tells questions apart, and whose prices ask for 0.1 to 0.6 of the tokens."""
    made = network(model=identity_of(dissect(model)), levels=LEVELS, prices=((0.11, 2.0), (0.5, 0.02)))
    with torch.no_grad():
        made.demand.exit.weight.mul_(0.2)
        made.demand.exit.bias.copy_(torch.tensor([0.0, 1.0, 2.0]) + shift)
    made.save_pretrained(folder)
    return str(folder)


def test_a_token_goes_where_it_does_most() -> None:
    likely = torch.tensor([[0.50, 0.90, 0.95], [0.90, 0.91, 0.92], [0.2, 0.1, 0.9]])
    odds = torch.logit(likely)
    # Gains per share: .4/.2 and .05/.3; .01/.2 and .01/.3; the third counts as .2 in between, then .7/.5
    assert shares_at(odds, LEVELS, 0.01).tolist() == pytest.approx([0.6, 0.6, 0.6])
    assert shares_at(odds, LEVELS, 0.1).tolist() == pytest.approx([0.6, 0.1, 0.6])
    assert shares_at(odds, LEVELS, 1.0).tolist() == pytest.approx([0.3, 0.1, 0.6])
    assert shares_at(odds, LEVELS, 1.5).tolist() == pytest.approx([0.3, 0.1, 0.1])
    assert shares_at(odds, LEVELS, 2.1).tolist() == pytest.approx([0.1, 0.1, 0.1])


def test_prices_between_those_known() -> None:
    made = network(levels=LEVELS, prices=((0.1, 1.0), (0.4, 0.01)))
    assert made.price_of(0.1) == pytest.approx(1.0) and made.price_of(0.4) == pytest.approx(0.01)
    assert made.price_of(0.2) == pytest.approx(0.1)  # half of the way in logarithms
    assert made.price_of(0.09) is None and made.price_of(0.41) is None
    assert network().price_of(0.1) is None
    with pytest.raises(VPruneError, match="give rising shares"):
        ScorerConfig(levels=(0.3, 0.1))


def test_needs_are_learnt_and_the_budget_is_held() -> None:
    torch.manual_seed(0)
    made = network(levels=LEVELS)
    width = made.demand.center.numel()
    summaries, greedy = torch.randn(4096, width), torch.rand(4096) < 0.3
    summaries[:, 0] = 3.0 * greedy + torch.randn(4096) * 0.1
    # A modest question is answered at every level, a greedy one at the highest alone.
    same = torch.stack([~greedy, ~greedy, torch.ones(4096, dtype=torch.bool)], -1).float()
    parts = iter([(summaries[:1000], same[:1000]), (summaries[1000:], same[1000:]), (summaries, same)])
    observed = observe(parts, 4096)
    assert observed.stays.shape == (4096, 3) and torch.equal(observed.stays.float(), same)
    learn(made, *observed.split(), 40, 5e-3, 0)
    table = made.config.prices
    keeps = [keep for keep, _ in table]
    assert keeps == sorted(keeps) and keeps[0] == pytest.approx(0.11)
    price = made.price_of(0.24)
    assert price is not None
    given = shares_at(made.demand(summaries), LEVELS, price)
    assert float(given[greedy].mean()) > 0.45 and float(given[~greedy].mean()) < 0.12
    assert float(given.mean()) == pytest.approx(0.24, abs=0.02)


@pytest.mark.parametrize("kind", ["padded", "single"])
def test_each_question_gets_its_own(tmp_path: Path, tiny_vlm: Any, tiny_processor: Any, kind: str) -> None:
    model, inputs = tiny_vlm(), batch(tiny_processor, kind)
    folder = with_prices(model, tmp_path / "scorer")
    counts: dict[float, list[int]] = {}
    for keep in (0.08, 0.15, 0.3, 0.5, 0.7):
        with vprune.prune(model, "learned", keep=keep, budget="question", checkpoint=folder) as pruning:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert pruning.last is not None
        counts[keep] = [report.tokens_after for report in pruning.last]
        assert all(int(report.sizes.sum()) == report.tokens_before for report in pruning.last)
        if 0.11 <= keep <= 0.5:
            levels = {math.floor(level * 36 + 1e-9) for level in LEVELS}
            assert set(counts[keep]) <= levels
        else:  # where the prices end, all get the same
            assert set(counts[keep]) == {math.floor(keep * 36 + 1e-9)}
    for some, more in ((0.15, 0.3), (0.3, 0.5)):
        assert all(a <= b for a, b in zip(counts[some], counts[more], strict=True))
    assert counts[0.15] != counts[0.5]
    # keep as a number of tokens is the same share of them
    with vprune.prune(model, "learned", keep=18, budget="question", checkpoint=folder) as pruning:
        model(**inputs)
    assert pruning.last is not None and [one.tokens_after for one in pruning.last] == counts[0.5]


def test_a_question_gets_the_same_alone(tmp_path: Path, tiny_vlm: Any, tiny_processor: Any) -> None:
    model = tiny_vlm()
    folder = with_prices(model, tmp_path / "scorer")
    inputs = batch(tiny_processor, "padded")
    with vprune.prune(model, "learned", keep=0.2, budget="question", checkpoint=folder) as pruning, torch.no_grad():
        model(**inputs)
        whole = [(one.kept.tolist(), one.tokens_after) for one in pruning.last or []]
        alone = []
        for row in range(len(inputs["input_ids"])):
            seen = inputs["attention_mask"][row].bool()
            one = {key: inputs[key][row : row + 1, seen] for key in ("input_ids", "attention_mask")}
            model(**one, pixel_values=inputs["pixel_values"][row : row + 1])
            alone += [(report.kept.tolist(), report.tokens_after) for report in pruning.last or []]
    assert whole == alone


def test_who_cannot_tell_is_refused(tmp_path: Path, tiny_vlm: Any) -> None:
    with pytest.raises(VPruneError, match=r"budget='question': attention cannot tell .* method=learned can"):
        vprune.prune(tiny_vlm(), "attention", budget="question")
    with pytest.raises(VPruneError, match="not how many a question needs; teach it with `vprune train scorer"):
        folder = saved(tmp_path / "scorer", tiny_vlm())
        vprune.prune(tiny_vlm(), "learned", budget="question", checkpoint=str(folder))


def test_without_levels_a_scorer_is_what_it_was(tmp_path: Path) -> None:
    old = network()
    old.save_pretrained(tmp_path / "old")
    assert not any(key.startswith("demand") for key in ScorerNetwork.load(tmp_path / "old").state_dict())
