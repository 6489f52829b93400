"""What the workers of the tests do; in a module of its own, because workers import it by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from vprune.errors import VPruneError


class Notes:
    """Notes in a folder every order that it begins, with its process; the first `deaths` times, `deadly` kills it."""

    def __init__(self, folder: Path, deadly: str = "", deaths: int = 0) -> None:
        self._folder, self._deadly, self._deaths = folder, deadly, deaths
        (folder / f"loaded-{os.getpid()}").touch()

    def __call__(self, order: str) -> tuple[str, int]:
        with (self._folder / f"begun-{order}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        if order == self._deadly and len(self.begun(order)) <= self._deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "0":
            time.sleep(1.0)  # the first order is not the first to be done
        return order.upper(), os.getpid()

    def begun(self, order: str) -> list[str]:
        return (self._folder / f"begun-{order}").read_text().split()


def mistaken() -> Callable[[str], str]:
    raise VPruneError("the model is not there")


def broken() -> Callable[[str], str]:
    return lambda order: f"{1 // int(order)}"


def dying() -> Callable[[str], str]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
