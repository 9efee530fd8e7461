"""What holds for every test: those marked `system` run one after the other, on one worker of pytest-xdist.

They mount, start daemons and count system calls; two at once would disturb one another's counts.
"""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.support.s3_stage", "tests.support.store_stage"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the `system` tests into one group (`--dist loadgroup`)."""
    for item in items:
        if item.get_closest_marker("system") is not None:
            item.add_marker(pytest.mark.xdist_group("system"))
