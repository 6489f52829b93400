"""What all kernels need to be launched: where they may run, and how torch's tensors are shown to them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True if TRITON_INTERPRET=1 was set before this module was imported: kernels then run in numpy, on CPU tensors too."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def place_problem(*inputs: Tensor) -> str | None:
    """Why kernels cannot read these tensors where they are, None if they can."""
    devices = {one.device for one in inputs}
    if len(devices) > 1:
        return f"the tensors are on {', '.join(sorted(map(str, devices)))}, a kernel needs all on one device"
    if not INTERPRETED and not all(one.is_cuda for one in inputs):
        return (
            f"the tensors are on {inputs[0].device}, and Triton compiles for CUDA devices only "
            "(TRITON_INTERPRET=1, set before Python starts, runs kernels on the CPU, slowly)"
        )
    return None


def gradient_problem(*inputs: Tensor) -> str | None:
    """Why a kernel without a backward pass cannot serve these tensors, None if it can."""
    if torch.is_grad_enabled() and any(one.requires_grad for one in inputs):
        return "gradients are wanted and the kernel has no backward pass"
    return None


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A block in which Triton launches on the tensor's device: it takes the current one, not that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def as_words(tensor: Tensor) -> Tensor:
    """The same bytes as integers of the same size: a kernel that only copies need not know number formats."""
    return tensor.view(_WORDS[tensor.element_size()])


def copy_problem(tensor: Tensor) -> str | None:
    """Why a kernel cannot copy elements of this dtype, None if it can."""
    return (
        None if tensor.element_size() in _WORDS else f"{tensor.dtype} is {tensor.element_size()} bytes wide, 8 at most"
    )


def row_block(width: int, element_size: int, most_bytes: int = 1024) -> int:
    """How many columns of a row one program takes: a power of two, `most_bytes` at most."""
    return int(min(triton.next_power_of_2(max(width, 1)), max(1, most_bytes // element_size)))


class Operation:
    """A launch registered with torch.library, and called without it where nobody traces or differentiates.

    Going through the library takes the host some 300 us a call, several times what the kernels of a prefill take.
    """

    def __init__(self, name: str, launch: Callable[..., Any]) -> None:
        self._launch = launch
        self._registered = torch.library.custom_op(name, launch, mutates_args=())
        self.register_fake = self._registered.register_fake
        self.register_autograd = self._registered.register_autograd

    def __call__(self, *arguments: Any) -> Any:
        """Launch; the arguments in the order of the function's own."""
        return (self._launch if self._plain(arguments) else self._registered)(*arguments)

    @staticmethod
    def _plain(arguments: tuple[Any, ...]) -> bool:
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return False
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        tensors += [one for many in arguments if isinstance(many, list | tuple) for one in many]
        own = all(type(one) in (Tensor, torch.nn.Parameter) for one in tensors)
        return own and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Register the launch that is decorated under `name`, as namespace::operation."""
    return lambda launch: Operation(name, launch)
