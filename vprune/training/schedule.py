"""What every training from scratch does alike: its optimizer, its learning rate, the running mean of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def adamw(parameters: Iterable[nn.Parameter], options: Any, device: torch.device) -> torch.optim.AdamW:
    """AdamW over those that want gradients; weights decay, biases and norms do not."""
    wanted = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in wanted if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=options.lr,
        betas=tuple(options.betas),
        fused=device.type == "cuda",
    )


def warmed_cosine(options: Any, step: int, progress: float) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth; `progress` from 0 to 1."""
    warm = min(1.0, (step + 1) / options.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return float(options.lr * warm * (0.02 + 0.98 * cosine))


def follow(average: Mapping[str, Tensor], state: Mapping[str, Tensor], decay: float, step: int) -> None:
    """Move the running mean towards the weights: min(decay, step / (step + 10)) of it stays."""
    names = [name for name, value in state.items() if value.is_floating_point()]
    share = 1 - min(decay, step / (step + 10))
    torch._foreach_lerp_([average[name] for name in names], [state[name].detach() for name in names], share)


def spare_the_host(device: torch.device) -> None:
    """Where a GPU does the arithmetic, keep the host's own on few threads.

    The painting thread, the backward thread and the loader's workers would each spread small operations over all cores
    and wait for one another: reading 512 prompts took 400 ms on 32 cores, and takes 10 ms on one.
    """
    if device.type == "cuda":
        torch.set_num_threads(1)
