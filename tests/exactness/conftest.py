"""What every test of exactness has measured goes into its report, for `--compatibility`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.exactness.agreement import DEVIATIONS, REFUSALS


@pytest.fixture(autouse=True)
def _measured(request: pytest.FixtureRequest) -> Iterator[None]:
    """Deviations and refusals of this test alone."""
    DEVIATIONS.clear()
    REFUSALS.clear()
    yield
    request.node.user_properties += [("deviation", name, apart) for name, apart in DEVIATIONS.items()]
    request.node.user_properties += [("refused", said) for said in REFUSALS]
