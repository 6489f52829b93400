"""The operations as Triton kernels: the names and signatures of `reference`, registered with torch.library."""

from __future__ import annotations

from torch import Tensor

from vprune.kernels.triton_column_mass import attention_problem, column_mass
from vprune.kernels.triton_compact import compact, compact_batch
from vprune.kernels.triton_compact_kv import cache_problem, compact_kv
from vprune.kernels.triton_launch import copy_problem, gradient_problem, place_problem
from vprune.kernels.triton_modulate import modulate, modulation_problem
from vprune.kernels.triton_recycle import number_problem, recycle
from vprune.kernels.triton_rotate import rotate, rotation_problem
from vprune.kernels.triton_select import row_problem, select

__all__ = [
    "column_mass",
    "compact",
    "compact_batch",
    "compact_kv",
    "modulate",
    "recycle",
    "rotate",
    "select",
    "why_not",
]


def why_not(operation: str, *inputs: Tensor) -> str | None:
    """Why there is no kernel for an operation on these tensors, None if there is one."""
    problem = place_problem(*inputs)
    if problem is not None:
        return problem
    first = inputs[0]
    if operation == "column_mass":
        return attention_problem(first, inputs[1]) or gradient_problem(*inputs)
    if operation == "compact_kv":
        layers = inputs[1:]
        return cache_problem(layers) or copy_problem(layers[0] if layers else first) or gradient_problem(*layers)
    if operation == "modulate":
        return modulation_problem(first) or gradient_problem(*inputs)
    if operation == "recycle":
        return number_problem(first)
    if operation == "rotate":
        return rotation_problem(first, *inputs[1:]) or gradient_problem(*inputs)
    if operation == "select":
        return row_problem(first)
    return copy_problem(first)
