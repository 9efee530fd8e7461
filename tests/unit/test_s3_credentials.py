"""Credentials of botocore's chain that are at hand without asking anybody."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.credentials import Credentials as KeptCredentials
from botocore.credentials import DeferredRefreshableCredentials, RefreshableCredentials

from orchestra.stores import s3_config
from orchestra.stores.s3_config import BotocoreCredentials
from orchestra.stores.sigv4 import Credentials


class Chain:
    """Botocore's session, and a role whose credentials live for an hour of the test's time."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.asked = 0
        self.found: Any = None

    def get_credentials(self) -> Any:
        """What the chain has found."""
        return self.found

    def ask(self) -> dict[str, str]:
        """The metadata server's answer."""
        self.asked += 1
        expiry = self.now + timedelta(hours=1)
        return {
            "access_key": f"key {self.asked}",
            "secret_key": "s",
            "token": "t",
            "expiry_time": expiry.isoformat(),
        }


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Chain:
    """The chain that is asked."""
    chain = Chain()
    monkeypatch.setattr(s3_config, "_botocore_session", lambda: chain)
    return chain


@pytest.mark.parametrize("kind", ["refreshable", "deferred"])
async def test_what_runs_out_is_at_hand_until_it_has_to_be_asked_for(chain: Chain, kind: str) -> None:
    """Never before the first time, nor within a quarter of an hour of its end; looking at it asks nobody."""
    if kind == "deferred":
        chain.found = DeferredRefreshableCredentials(chain.ask, "role", time_fetcher=lambda: chain.now)
    else:
        chain.found = RefreshableCredentials.create_from_metadata(chain.ask(), chain.ask, "role")
        chain.found._time_fetcher = lambda: chain.now
    source = BotocoreCredentials("s3://b/")
    assert source.ready() is None
    assert await source.credentials() == source.ready() == Credentials("key 1", "s", "t")
    chain.now += timedelta(minutes=44)
    assert source.ready() == Credentials("key 1", "s", "t")
    chain.now += timedelta(minutes=2)
    assert source.ready() is None
    assert chain.asked == 1
    assert await source.credentials() == source.ready() == Credentials("key 2", "s", "t")


async def test_keys_that_never_run_out_are_always_at_hand(chain: Chain) -> None:
    """Once they were found."""
    chain.found = KeptCredentials("key", "s")
    source = BotocoreCredentials("s3://b/")
    assert await source.credentials() == source.ready() == Credentials("key", "s", "")
