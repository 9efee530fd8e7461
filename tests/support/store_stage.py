"""A fixture: an empty under store in memory, which tests/conftest.py makes known everywhere.

A module whose tests begin with files in it has a `store` of its own.
"""

from __future__ import annotations

import pytest

from tests.support.versioned_store import VersionedStore


@pytest.fixture
def store() -> VersionedStore:
    """Holds nothing yet."""
    return VersionedStore()
