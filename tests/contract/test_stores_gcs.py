"""GCS keeps the contract as far as that can be shown without Google: its client against an S3 server.

The emulator on PyPI does not answer what obstore's GCS client asks (gcp-storage-emulator: 501 to HEAD and to
`?list-type=2`). That client speaks Google's XML API, which is S3's for HEAD,
ranged GET under If-Match, and LIST. So the way of our store through that client is proven here, and not what Google's
servers answer beyond S3.
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
from orchestra.testing.under_store import ODD_KEYS, Delete, Put, PutNumbered, UnderStoreSuite

FETCH = FetchConfig(requests_max=32, attempt_timeout_s=20.0, deadline_s=40.0)


def options_at(server: S3Server) -> dict[str, str]:
    return {"base_url": server.endpoint, "bearer_token": "a-token"}


class TestGcs(UnderStoreSuite):
    odd_keys = ODD_KEYS
    many_count = 2500

    @pytest.fixture
    def root(self) -> str:
        return f"under test/{uuid.uuid4().hex}"

    @pytest.fixture
    async def store(self, server: S3Server, root: str) -> AsyncIterator[UnderStore]:
        store = open_store(StoreSettings(f"gs://bucket/{root}", options_at(server)), FETCH)
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
        """`probe` of a bucket that is not there names it."""
        store = open_store(StoreSettings("gs://no-such-bucket/x", options_at(server)), FETCH)
        with pytest.raises(NotFoundError, match="no-such-bucket"):
            await store.probe()
        await store.close()
