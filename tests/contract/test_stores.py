"""Every under store proves the contract with the shipped suite: S3 twice, a folder, memory, a web server."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from orchestra.clock import SystemClock
from orchestra.stores.contract import StoreSettings, UnderStore
from orchestra.stores.fsspec_store import FsspecStore
from orchestra.stores.registry import open_store, wrapped
from orchestra.testing.fault_store import FaultStore
from orchestra.testing.s3_server import S3Server
from orchestra.testing.under_store import ODD_KEYS, Delete, Put, UnderStoreSuite
from tests.support.bucket_suite import FETCH, BucketSuite
from tests.support.web_servers import aiohttp_server, nginx_server, plain_server

# moto's own HTTP routes do not match a newline; that S3 can hold one is shown by the listing (test_stores_s3.py).
S3_ODD_KEYS = (*ODD_KEYS, "double//slash", "../climbing", "./dot", "dots/../inside", "/leading", "tab\there")


class TestS3(BucketSuite):
    scheme = "s3"
    odd_keys = S3_ODD_KEYS
    page_keys_max = 1000
    has_folder_markers = True

    def options(self, server: S3Server) -> dict[str, str]:
        return server.options


class TestS3ByS3fs(TestS3):
    def options(self, server: S3Server) -> dict[str, str]:
        return {**server.options, "client": "fsspec"}


class TestLocal(UnderStoreSuite):
    odd_keys = (*ODD_KEYS, "new\nline", "tab\there", os.fsdecode(b"not utf-8 \xff\xfe"), "n" * 255)
    many_count = 2500
    page_keys_max = 1000

    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[UnderStore]:
        store = open_store(StoreSettings(tmp_path.as_uri(), {}), FETCH)
        yield store
        await store.close()

    @pytest.fixture
    def put(self, tmp_path: Path) -> Put:
        return functools.partial(write_file, tmp_path)

    @pytest.fixture
    def delete(self, tmp_path: Path) -> Delete:
        async def delete_one(key: str) -> None:
            (tmp_path / key).unlink()

        return delete_one


async def write_file(folder: Path, key: str, data: bytes, *, tick_s: int = 0) -> None:
    """Write a file so that its time differs from that of the file it replaces by at least a nanosecond or `tick_s`."""
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    before_ns = path.stat().st_mtime_ns if path.exists() else 0
    path.write_bytes(data)
    now_ns = path.stat().st_mtime_ns
    if now_ns < before_ns + max(1, tick_s * 10**9):
        os.utime(path, ns=(now_ns, before_ns + max(1, tick_s * 10**9)))


class TestMemory(UnderStoreSuite):
    @pytest.fixture
    def root(self) -> Iterator[str]:
        root = f"/test-{uuid.uuid4().hex}"
        yield root
        fs = fsspec.filesystem("memory")
        for path in [path for path in fs.store if path.startswith(root)]:
            del fs.store[path]

    @pytest.fixture
    async def store(self, root: str) -> AsyncIterator[UnderStore]:
        store = open_store(StoreSettings(f"memory:/{root}", {}), FETCH)
        yield store
        await store.close()

    @pytest.fixture
    def put(self, root: str) -> Put:
        async def put_one(key: str, data: bytes) -> None:
            fsspec.filesystem("memory").pipe_file(f"{root}/{key}", data)

        return put_one

    @pytest.fixture
    def delete(self, root: str) -> Delete:
        async def delete_one(key: str) -> None:
            fsspec.filesystem("memory").rm_file(f"{root}/{key}")

        return delete_one


class HttpSuite(UnderStoreSuite):
    tick_s = 0

    @pytest.fixture
    def put(self, tmp_path: Path) -> Put:
        return functools.partial(write_file, tmp_path / "data", tick_s=self.tick_s)

    @pytest.fixture
    def delete(self, tmp_path: Path) -> Delete:
        async def delete_one(key: str) -> None:
            (tmp_path / "data" / key).unlink()

        return delete_one

    @pytest.fixture
    async def url(self, tmp_path: Path) -> AsyncIterator[str]:
        raise NotImplementedError
        yield ""

    @pytest.fixture
    async def store(self, url: str) -> AsyncIterator[UnderStore]:
        store = open_store(StoreSettings(url, {}), FETCH)
        yield store
        await store.close()


class TestHttp(HttpSuite):
    """A server with strong ETags, ranges and conditions."""

    @pytest.fixture
    async def url(self, tmp_path: Path) -> AsyncIterator[str]:
        (tmp_path / "data").mkdir()
        async with aiohttp_server(tmp_path / "data") as url:
            yield url


class TestHttpWithoutRanges(HttpSuite):
    """A server that answers every GET with the whole file, and knows its time to the second."""

    tick_s = 1
    many_count = 150  # a thread and a connection each: slow, and the second page is what matters

    @pytest.fixture
    def url(self, tmp_path: Path) -> Iterator[str]:
        (tmp_path / "data").mkdir()
        with plain_server(tmp_path / "data") as url:
            yield url


@pytest.mark.system
class TestHttpByNginx(HttpSuite):
    """nginx: its ETag is the time in seconds and the size, and its index hides names that begin with a dot."""

    tick_s = 1
    odd_keys = tuple(key for key in ODD_KEYS if not key.startswith("."))

    @pytest.fixture
    async def url(self, tmp_path: Path) -> AsyncIterator[str]:
        (tmp_path / "data").mkdir()
        tmp_path.chmod(0o755)
        async with nginx_server(tmp_path / "data", tmp_path) as url:
            yield url


class TestFaultStore(TestMemory):
    """A fault store without a script is the store that it wraps."""

    @pytest.fixture
    async def store(self, root: str) -> AsyncIterator[UnderStore]:
        store = FaultStore(open_store(StoreSettings(f"memory:/{root}", {}), FETCH))
        yield store
        await store.close()


class TestAsynchronousFsspec(TestMemory):
    """The generic store over an asynchronous fsspec file system runs in our loop, without threads of its own."""

    @pytest.fixture
    async def store(self, root: str) -> AsyncIterator[UnderStore]:
        fs = AsyncFileSystemWrapper(fsspec.filesystem("memory"), asynchronous=True)
        store = wrapped(FsspecStore(fs, root=f"{root}/", store_id="memory://async/"), FETCH, clock=SystemClock())
        yield store
        await store.close()
