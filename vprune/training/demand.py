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
"""Of the questions: those that prices are set on, which the head has not seen."""
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


def learn(network: ScorerNetwork, observed: Observed, rounds: int, rate: float, seed: int) -> None:
    """Train `network.demand` on seven of eight questions, and set the prices of `network.config` on the others.

    Minimised is the cross entropy of what stays at each level, with AdamW, the rate falling to nothing.

    Of fewer than `LEAST` questions nothing is learnt, and no price is set.
    """
    head, count = network.demand, len(observed.stays)
    if count < LEAST:
        print(
            f"{count} answers were watched, and at least {LEAST} are needed to learn how many tokens a question needs: "
            "budget=question will be refused (give more demand.minutes, or demand.count=0 to do without)"
        )
        return
    device = head.center.device
    summaries, stays = observed.summaries.float().to(device), observed.stays.float().to(device)
    first = count - max(1, int(HELD_OUT * count))
    head.center.copy_(summaries[:first].mean(0))
    head.spread.copy_(summaries[:first].std(0) + 1e-4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=_DECAY)
    chance = torch.Generator().manual_seed(seed)
    head.train()
    for turn in range(rounds):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - turn / rounds)
        for some in torch.split(torch.randperm(first, generator=chance).to(device), _BATCH):
            loss = binary_cross_entropy_with_logits(head(summaries[some]), stays[some])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    head.eval()
    network.config = replace(network.config, prices=prices(head, summaries[first:], network.config.levels))


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
