"""Greedy choices among the tokens of many images at once, step by step on the device.

A step depends on the one before it, so that the loop over steps stays; but all images take a step together, and the
host reads what was chosen when it is over. Images of unequal size and budget are padded. What an image's tokens have to
do with each other is worked out image by image: a batch chooses as its images alone do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Numbers in the matrices of the images that are chosen from together: as many images as fit share the launches of a
# device's kernels; on a CPU there are none to share, and what stays in its caches is faster.
_AT_ONCE = 2**27
_AT_ONCE_ON_CPU = 2**19

Steps = Callable[[Tensor, Tensor, int], Tensor]
"""(matrices [I, N, N], which tokens there are, bool [I, N], count) -> LongTensor [I, count], in the order of choice."""


def chosen(
    steps: Steps,
    matrix: Callable[[int], Tensor],
    sizes: Sequence[int],
    counts: Sequence[int],
    device: torch.device | None = None,
) -> list[Tensor]:
    """The first `counts[i]` choices of `steps` among the `sizes[i]` tokens of each image i, LongTensors on the CPU.

    `matrix(i)` [sizes[i], sizes[i]], on the `device` (None = the CPU), is asked for when it is needed, so that not all
    of them must fit in memory.

    Example:
        >>> chosen(farthest, lambda image: 1 - torch.eye(2 + image), [2, 3], [1, 2])
        [tensor([0]), tensor([0, 1])]
    """
    found: dict[int, Tensor] = {}
    at_once = _AT_ONCE_ON_CPU if device is None or device.type == "cpu" else _AT_ONCE
    for numbers in _groups(sizes, counts, at_once):
        most = max(counts[number] for number in numbers)
        # (What is chosen for an image with a smaller budget has not seen how long the others go on.)
        together = steps(*padded([matrix(number) for number in numbers]), most).cpu()
        found |= {number: row[: counts[number]] for number, row in zip(numbers, together, strict=True)}
    return [found[number] for number in range(len(sizes))]


def padded(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Square matrices of unequal size as [I, N, N], zeros beyond each, and which rows there are, bool [I, N]."""
    sizes = [len(one) for one in matrices]
    most = max(sizes)
    if min(sizes) == most:
        squares = torch.stack(list(matrices))
        return squares, squares.new_ones(squares.shape[:2], dtype=torch.bool)
    squares = matrices[0].new_zeros((len(sizes), most, most))
    for square, one in zip(squares, matrices, strict=True):
        square[: len(one), : len(one)] = one
    return squares, (torch.arange(most) < torch.tensor(sizes)[:, None]).to(squares.device)


def farthest(distance: Tensor, valid: Tensor, count: int) -> Tensor:
    """Max-min diversity: first the token farthest from its nearest other one, then what is farthest from the chosen.

    Args:
        distance: [I, N, N].
        valid: the tokens that there are, bool [I, N].
        count: K, how many are chosen.

    Returns:
        LongTensor [I, K], in the order of choice; ties go to the first. (Once all of an image are chosen: anything.)

    Example:
        >>> line = torch.tensor([0.0, 1.0, 5.0, 7.0])
        >>> farthest((line[:, None] - line).abs()[None], torch.ones(1, 4, dtype=torch.bool), 3)
        tensor([[2, 0, 3]])
    """
    own = torch.eye(distance.shape[-1], dtype=torch.bool, device=distance.device)  # no token is its own neighbour
    apart = distance.masked_fill(own | ~valid[:, None], torch.inf).amin(-1).nan_to_num(posinf=0.0)
    best = apart.masked_fill(~valid, -torch.inf).argmax(-1, keepdim=True)
    picked = [best]
    nearest = torch.full_like(apart, torch.inf).masked_fill_(~valid, -torch.inf)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, rows_of(distance, best)).scatter_(-1, best, -torch.inf)
        best = nearest.argmax(-1, keepdim=True)
        picked.append(best)
    return torch.cat(picked, -1)


def likeliest(kernel: Tensor, valid: Tensor, count: int) -> Tensor:
    """The greedy maximum of the determinant of a part of the kernel: what adds the most to it comes next.

    After each choice j, with c_i the rows of the Cholesky factor so far and d_i the gains:
    e_i = (L_ji - c_j . c_i) / d_j, then d_i^2 falls by e_i^2 (Chen et al., arXiv 1709.05135). In float64: the order in
    which a device adds up depends on how many images there are, and must not show.

    Args:
        kernel: L [I, N, N], positive.
        valid: the tokens that there are, bool [I, N].
        count: K, how many are chosen.

    Returns:
        LongTensor [I, K], in the order of choice; ties go to the first. (Once all of an image are chosen: anything.)

    Example:
        >>> kernel = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 0.5]])
        >>> likeliest(kernel[None], torch.ones(1, 3, dtype=torch.bool), 2)
        tensor([[0, 2]])
    """
    gains = kernel.diagonal(dim1=-2, dim2=-1).double().masked_fill(~valid, -torch.inf)
    factor = gains.new_zeros((len(kernel), count, kernel.shape[-1]))
    picked = []
    for step in range(count):
        best = gains.argmax(-1, keepdim=True)
        picked.append(best)
        before = factor[:, :step]
        explained = (before.gather(-1, best[:, None].expand(-1, step, -1)).transpose(1, 2) @ before).squeeze(1)
        row = (rows_of(kernel, best).double() - explained) / gains.gather(-1, best).clamp(min=1e-12).sqrt()
        factor[:, step] = row
        # Gains beyond the rank of the kernel are rounding; what is chosen, or not there, must not come (again).
        left = (gains - row.square()).clamp(min=0.0)
        gains = left.masked_fill_(gains.isneginf(), -torch.inf).scatter_(-1, best, -torch.inf)
    return torch.cat(picked, -1)


def rows_of(matrices: Tensor, number: Tensor) -> Tensor:
    """One row of each of the matrices [I, N, N], by LongTensor [I, 1]: [I, N]."""
    return matrices.gather(1, number[..., None].expand(-1, -1, matrices.shape[-1])).squeeze(1)


def _groups(sizes: Sequence[int], counts: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """The numbers of the images that are chosen from together: alike in size, and not more than fit."""
    group: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        largest = sizes[group[0] if group else number]
        deepest = max(counts[one] for one in [*group, number])
        if group and (len(group) + 1) * largest * (largest + 2 * deepest) > at_once:  # (the factor has twice the bits)
            yield group
            group = []
        group.append(number)
    if group:
        yield group
