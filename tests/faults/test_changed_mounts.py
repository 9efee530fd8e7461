"""Readers of a mount that is removed or points elsewhere while they have its files open: what is cached, or stale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.client.contract import Handle
from orchestra.config import MountConfig
from orchestra.errors import NotFoundError, StaleObjectError
from tests.support.cache import BLOCK, data_of
from tests.support.node import ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

DATA = data_of("a", 8 * BLOCK)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def stores() -> dict[str, VersionedStore]:
    """Two stores that call different bytes by the same key, size and version; and one that only is mounted."""
    stores = {path: VersionedStore(f"versioned://{path}/") for path in ("/data", "/first", "/second")}
    stores["/first"].put("a", DATA)
    stores["/second"].put("a", data_of("another", len(DATA)))
    return stores


@pytest.fixture
def node(tmp_path: Path, stores: dict[str, VersionedStore]) -> Iterator[ThreadNode]:
    """A node with the first store added at /x, besides what its configuration says."""
    with thread_node(tmp_path, stores) as running:
        running.run(running.node.mounts.add(mount_of("/first")))
        yield running


def mount_of(store: str) -> MountConfig:
    return MountConfig("/x", (f"memory://{store}",), prefetch="none")


def opened(node: ThreadNode) -> Handle:
    """A handle of /x/a whose first block is cached."""
    handle = node.client().open("/x/a")
    assert handle.read(0, BLOCK) == DATA[:BLOCK]
    return handle


def remove(node: ThreadNode) -> None:
    async def act() -> None:
        node.node.mounts.remove("/x")

    node.run(act())


def test_a_removed_mount_is_stale_to_who_has_a_file_open(node: ThreadNode) -> None:
    """Cached bytes go on being read, missing ones are stale, and a new open finds nothing."""
    handle = opened(node)
    remove(node)
    assert handle.read(0, BLOCK) == DATA[:BLOCK]
    with pytest.raises(StaleObjectError, match="/x/a was unmounted after it was opened"):
        handle.read(4 * BLOCK, BLOCK)
    with pytest.raises(NotFoundError, match="no mount covers /x/a"):
        node.client().open("/x/a")
    handle.close()


def test_a_mount_that_points_elsewhere_is_stale_to_who_has_a_file_open(
    node: ThreadNode, stores: dict[str, VersionedStore]
) -> None:
    """Bytes of two stores are never mixed, even where both call them by one version; a new open reads the new store."""
    handle = opened(node)
    assert stores["/first"].objects["a"].info.size_bytes == stores["/second"].objects["a"].info.size_bytes
    stores["/second"].objects["a"] = type(stores["/second"].objects["a"])(
        stores["/first"].objects["a"].info, stores["/second"].objects["a"].data
    )
    node.run(node.node.mounts.update(mount_of("/second")))
    assert handle.read(0, BLOCK) == DATA[:BLOCK]
    with pytest.raises(StaleObjectError, match="another store"):
        handle.read(4 * BLOCK, BLOCK)
    assert node.client().read_file("/x/a") == data_of("another", len(DATA))
    assert stores["/second"].reads, "the new store was never asked"
    handle.close()


def test_a_mount_over_an_open_file_is_stale(node: ThreadNode) -> None:
    """A path that is a mount point by now is no file any more."""
    handle = opened(node)
    node.run(node.node.mounts.add(MountConfig("/x/a", ("memory:///data",), prefetch="none")))
    with pytest.raises(StaleObjectError, match="is a mount point now"):
        handle.read(4 * BLOCK, BLOCK)
    handle.close()


def test_a_mount_that_is_changed_but_shows_the_same_store_goes_on(node: ThreadNode) -> None:
    """What only says how to read (here the freshness) breaks nobody's reading."""
    handle = opened(node)
    node.run(node.node.mounts.update(MountConfig("/x", ("memory:///first",), freshness_s=1.0, prefetch="none")))
    assert handle.read(0, len(DATA)) == DATA
    handle.close()
