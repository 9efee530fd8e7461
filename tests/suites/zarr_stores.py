"""zarr's own suite for stores, over the mount (LocalStore) and over the fsspec file system (FsspecStore).

Run in a child by test_zarr.py, never collected by itself.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, cpu
from zarr.storage import FsspecStore, LocalStore
from zarr.testing.store import StoreTests

from tests.suites.running import Site
from tests.suites.seeded import SeededFileSystem

_numbers = itertools.count()


class MountedStore(LocalStore):
    """A LocalStore whose folder need not exist yet: an empty one cannot be seen through the mount."""

    async def _open(self, *, mode: Any = None) -> None:
        await Store._open(self)


class Suite(StoreTests[Any, cpu.Buffer]):
    """What both have in common: the suite's own reads and writes go to the store directly."""

    buffer_cls = cpu.Buffer

    def behind(self, store: Any, key: str) -> Path:
        """Where a key lies in the folder that is the under store."""
        raise NotImplementedError

    async def set(self, store: Any, key: str, value: Buffer) -> None:
        path = self.behind(store, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.to_bytes())

    async def get(self, store: Any, key: str) -> Buffer:
        return self.buffer_cls.from_bytes(self.behind(store, key).read_bytes())

    def test_store_repr(self, store: Any) -> None:
        """A store shows where it lies."""
        assert "zarr-" in repr(store)

    def test_store_supports_writes(self, store: Any) -> None:
        """zarr takes the store for one that can write, which here is true of what is behind it."""
        assert store.supports_writes

    def test_store_supports_listing(self, store: Any) -> None:
        """zarr takes the store for one that can list."""
        assert store.supports_listing


class TestOnTheMount(Suite):
    """Through the folder; the process's writes are sent to the store (write_behind.c)."""

    store_cls = MountedStore

    def behind(self, store: Any, key: str) -> Path:
        return Path(store.root) / key

    @pytest.fixture
    def store_kwargs(self) -> dict[str, Any]:
        return {"root": f"{os.environ['TMPDIR']}/zarr-{next(_numbers)}"}


class TestThroughFsspec(Suite):
    """Through orchestra's fsspec file system."""

    store_cls = FsspecStore

    def behind(self, store: Any, key: str) -> Path:
        folder: str = store.path.removeprefix("/data/")
        return Site(Path(os.environ["SUITE_ROOT"])).store / folder / key

    @pytest.fixture
    def store_kwargs(self) -> dict[str, Any]:
        site = Site(Path(os.environ["SUITE_ROOT"]))
        fs = SeededFileSystem(config=str(site.config), store=str(site.store))
        return {"fs": AsyncFileSystemWrapper(fs, asynchronous=True), "path": f"/data/zarr-{next(_numbers)}"}
