"""What every under store promises, for those that are read from the S3 server of s3_stage.

Owns: where a test's keys lie, writing and deleting them. Leaves to others: the promises
(orchestra.testing.under_store), which store it is (the subclass).
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from orchestra.config import FetchConfig
from orchestra.errors import NotFoundError
from orchestra.stores.contract import StoreSettings, UnderStore
from orchestra.stores.registry import open_store
from orchestra.testing.s3_server import S3Server
from orchestra.testing.under_store import Delete, Put, PutNumbered, UnderStoreSuite

FETCH = FetchConfig(requests_max=32, attempt_timeout_s=20.0, deadline_s=40.0)


class BucketSuite(UnderStoreSuite):
    """A subclass says the scheme and the options."""

    scheme = ""
    many_count = 2500

    def options(self, server: S3Server) -> dict[str, str]:
        """What the store is opened with."""
        raise NotImplementedError

    def opened(self, server: S3Server, place: str) -> UnderStore:
        """The store at `place`, a bucket and a key below it."""
        return open_store(StoreSettings(f"{self.scheme}://{place}", self.options(server)), FETCH)

    @pytest.fixture
    def root(self) -> str:
        return f"under test/{uuid.uuid4().hex}"

    @pytest.fixture
    async def store(self, server: S3Server, root: str) -> AsyncIterator[UnderStore]:
        store = self.opened(server, f"bucket/{root}")
        yield store
        await store.close()

    @pytest.fixture
    def put(self, server: S3Server, root: str) -> Put:
        async def put_one(key: str, data: bytes) -> None:
            server.put("bucket", f"{root}/{key}", data)

        return put_one

    @pytest.fixture
    def delete(self, server: S3Server, root: str) -> Delete:
        async def delete_one(key: str) -> None:
            server.delete("bucket", f"{root}/{key}")

        return delete_one

    @pytest.fixture
    def put_numbered(self, server: S3Server, root: str) -> PutNumbered:
        async def put_all(prefix: str, count: int) -> None:
            server.put_numbered("bucket", f"{root}/{prefix}", count)

        return put_all

    async def test_missing_bucket_is_said(self, server: S3Server) -> None:
        """`probe` of a bucket that is not there names it and where it was looked for."""
        store = self.opened(server, "no-such-bucket/x")
        with pytest.raises(NotFoundError, match="no-such-bucket") as raised:
            await store.probe()
        assert "no such bucket" in str(raised.value)
        assert server.endpoint in str(raised.value)
        await store.close()
