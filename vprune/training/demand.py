"""How many tokens a question needs: what of an answer stays, budget by budget, and a head that foretells it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from vprune.scoring.network import Demand, ScorerNetwork, shares_at

LEAST = 16
"""Questions that anything is learnt from."""
HELD_OUT = 0.125
"""So many of the questions watched, in proportion, prices are set on."""
_KEEPS = 24  # prices in the table
_HALVINGS = 60  # of the interval in which a price is looked for
_HIGHEST = 1e3  # price: nobody pays it
_BATCH = 1024  # questions a step
_DECAY = 0.01


@dataclass(frozen=True)
class Observed:
    """What was seen of Q questions: summaries [Q, S], and `stays` [Q, J], the share of the answer's tokens that stay.

    A token stays that the pruned model would say, too, after those before it; J are the levels.
    """

    summaries: Tensor
    stays: Tensor

    def split(self) -> tuple[Observed, Tensor]:
        """All but the last of the questions, and the summaries of these."""
        first = len(self.stays) - max(1, int(HELD_OUT * len(self.stays)))
        return Observed(self.summaries[:first], self.stays[:first]), self.summaries[first:]


def observe(
    batches: Iterator[tuple[Tensor, Tensor]], count: int, told: Callable[[int], None] = lambda seen: None
) -> Observed:
    """The first `count` questions of batches (summaries [B, S], stays [B, J]), kept in half precision on the CPU."""
    summaries, stays, seen = [], [], 0
    for summary, stayed in batches:
        summaries.append(summary[: count - seen].half().cpu())
        stays.append(stayed[: count - seen].half().cpu())
        seen += len(stays[-1])
        told(seen)
        if seen == count:
            break
    return Observed(torch.cat(summaries), torch.cat(stays))


def learn(network: ScorerNetwork, observed: Observed, unseen: Tensor, rounds: int, rate: float, seed: int) -> None:
    """Train `network.demand` on what was observed, and set the prices of `network.config` on summaries `unseen` [Q, S].

    Minimised is the cross entropy of what stays at each level, with AdamW, the rate falling to nothing. Prices are set
    on questions that the head has not learnt from, since it is surer of those that it has.
    """
    head = network.demand
    device = head.center.device
    summaries, stays = observed.summaries.float().to(device), observed.stays.float().to(device)
    head.center.copy_(summaries.mean(0))
    head.spread.copy_(summaries.std(0) + 1e-4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=_DECAY)
    chance = torch.Generator().manual_seed(seed)
    head.train()
    for turn in range(rounds):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - turn / rounds)
        for some in torch.split(torch.randperm(len(stays), generator=chance).to(device), _BATCH):
            loss = binary_cross_entropy_with_logits(head(summaries[some]), stays[some])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    head.eval()
    set_prices(network, unseen)


def set_prices(network: ScorerNetwork, unseen: Tensor) -> None:
    """Set the prices of `network.config` so that the questions of `unseen` [Q, S] get a budget in the mean."""
    table = prices(network.demand, unseen.float().to(network.demand.center.device), network.config.levels)
    network.config = replace(network.config, prices=table)


@torch.no_grad()
def prices(head: Demand, summaries: Tensor, levels: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """(keep, price) pairs, keep rising: the price at which these questions get `keep` of the tokens in the mean.

    From little more than the lowest of `levels` to where the price is next to nothing.
    """
    odds = head(summaries)

    def spent(price: float) -> float:
        return float(shares_at(odds, levels, price).mean())

    low, high = levels[0] * 1.1, spent(1.0 / _HIGHEST)
    table = []
    for number in range(_KEEPS if high > low else 0):
        keep = low * (high / low) ** (number / (_KEEPS - 1))
        cheap, dear = 1.0 / _HIGHEST, _HIGHEST
        for _ in range(_HALVINGS):
            middle = math.sqrt(cheap * dear)
            cheap, dear = (middle, dear) if spent(middle) > keep else (cheap, middle)
        table.append((keep, dear))
    return tuple(table)
