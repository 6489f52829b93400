"""The one error for users' mistakes."""

from __future__ import annotations


class VPruneError(Exception):
    """A user's mistake, told with the value given, the limits it broke and the remedy.

    The command line turns it into one line and exit code 2; everything else that is raised is a fault of the library.
    """
