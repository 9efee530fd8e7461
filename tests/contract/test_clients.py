"""Every client keeps the contract: the node's own, with room for everything, with room for little, and verifying every
read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestra.client.contract import Client
from orchestra.testing.client import ClientSuite, Put
from tests.support.node import ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore


@pytest.fixture
def store() -> VersionedStore:
    return VersionedStore()


@pytest.fixture
def root() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


class NodeSuite(ClientSuite):
    """A client of a node in a thread."""

    cache: dict[str, object] = {}  # noqa: RUF012 - a constant of each subclass, never changed

    @pytest.fixture
    def put(self, store: VersionedStore) -> Put:
        return lambda path, data: store.put(path.removeprefix("/data/"), data)

    @pytest.fixture
    def node(self, root: Path, store: VersionedStore) -> Iterator[ThreadNode]:
        with thread_node(root, store, cache=self.cache) as running:
            yield running

    @pytest.fixture
    def client(self, node: ThreadNode) -> Client:
        return node.client()


class TestNodeClient(NodeSuite):
    """As it is used: what was read is kept."""


class TestNodeClientVerifyingAlways(NodeSuite):
    """Every read is checked, and no file is handed out."""

    cache = {"verify": "always"}  # noqa: RUF012 - a constant

    def test_no_file_is_handed_out(self, client: Client, put: Callable[[str, bytes], object]) -> None:
        """What the kernel reads by itself nobody could check."""
        put("/data/a", b"x" * 9000)
        handle = client.open("/data/a")
        handle.read(0, 9000)
        assert handle.backing_fd() is None
        handle.close()


class TestGuestClient(NodeSuite):
    """As other users have it: every byte comes by the daemon."""

    @pytest.fixture
    def node(self, root: Path, store: VersionedStore) -> Iterator[ThreadNode]:
        with thread_node(root, store, readers=("*",)) as running:
            yield running

    @pytest.fixture
    def client(self, node: ThreadNode) -> Client:
        return node.guest()

    # What these promise is of a node's own disk, or of what is known without asking; a guest has neither.
    test_readinto_cached_never_waits = None  # type: ignore[assignment]
    test_cached_calls_send_nothing = None  # type: ignore[assignment]


class TestNodeClientWithTinyCache(NodeSuite):
    """Room for four blocks: most of what is read has been evicted by the time it is read again."""

    cache = {"size_bytes": 4 * 4096}  # noqa: RUF012 - a constant

    # These two promise something of what was just read, which such a cache cannot keep.
    test_readinto_cached_never_waits = None  # type: ignore[assignment]
