"""The words behind a verb, and what is said when they do not fit."""

from __future__ import annotations

import argparse
from typing import NoReturn

from vprune.errors import VPruneError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose complaints are `VPruneError`s that say what is missing, and for what.

    Args:
        verb: of the command `vprune`. takes: what stands behind it, as in "DIR [gallery=N]". description, epilog:
            what the help begins and ends with, printed as it is.

    Raises:
        VPruneError: words that do not fit, while parsing.

    Example:
        >>> parser = Parser("report", "DIR [gallery=N]")
        >>> _ = parser.add_argument("folder", metavar="DIR", help="where the runs are")
        >>> parser.parse_args([])
        Traceback (most recent call last):
            ...
        vprune.errors.VPruneError: vprune report needs DIR (where the runs are): vprune report DIR [gallery=N]
    """

    def __init__(self, verb: str, takes: str, description: str = "", epilog: str = "") -> None:
        self._line = f"vprune {verb} {takes}"
        prose = argparse.RawDescriptionHelpFormatter
        super().__init__(f"vprune {verb}", self._line, description, epilog, formatter_class=prose)

    def error(self, message: str) -> NoReturn:
        """Say in the words of a person what argparse found."""
        _, missing, names = message.partition("arguments are required: ")
        _, strange, words = message.partition("unrecognized arguments: ")
        if missing:
            needed = [one for one in self._actions if one.metavar in names.split(", ")]
            listed = " and ".join(f"{one.metavar} ({one.help})" for one in needed)
            raise VPruneError(f"{self.prog} needs {listed}: {self._line}")
        if strange:
            raise VPruneError(f"{self.prog} knows no {words}; use it as {self._line}. Try {self.prog} --help")
        raise VPruneError(f"{self.prog}: {message}. Try {self.prog} --help")
