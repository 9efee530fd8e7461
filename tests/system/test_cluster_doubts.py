"""Blocks that reach another node with other bytes than they should have: rotten on the owner's disk, or changed on the
way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import Cluster, ring_of, wait_until
from tests.support.counting_store import CountingServer, counting_server
from tests.support.members import free_port
from tests.support.node import DaemonNode, daemon_node

pytestmark = pytest.mark.system

BLOCK = 64 * 1024
# Enough that each of two nodes owns some of each kind.
FILES = {f"large-{number}": bytes([number]) * (3 * BLOCK) for number in range(16)} | {
    f"small-{number}": bytes([number]) * 5000 for number in range(16)
}
DATASET_BYTES = sum(len(data) for data in FILES.values())


class Wire:
    """A way to a node's port, under an address of its own, that can change one byte of a large answer. The node's own
    address in its answers becomes the way's, so that who came by it goes on coming by it."""

    def __init__(self, listen: str, to: str) -> None:
        host, port = listen.rsplit(":", 1)
        self._to = to
        self._listen = listen
        self._server = socket.create_server((host, int(port)))
        self.is_changing = False
        self.changed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                host, port = self._to.rsplit(":", 1)
                try:
                    server = socket.create_connection((host, int(port)))
                except OSError:  # not up yet
                    client.close()
                    continue
                for source, sink, change in ((client, server, bytes), (server, client, self._change)):
                    threading.Thread(target=_pump, args=(source, sink, change), daemon=True).start()

    def _change(self, data: bytes) -> bytes:
        if self.is_changing and len(data) > 1000:
            self.is_changing = False
            self.changed += 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data.replace(self._to.encode(), self._listen.encode())


def _pump(source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes]) -> None:
    with source, suppress(OSError):
        while data := source.recv(1 << 20):
            sink.sendall(change(data))
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def nodes_and_wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, CountingServer, Wire]]:
    """Nodes a and b with one owner of each extent and no other copies; a reaches b by the wire. Each has read
    everything once."""
    root = tmp_path_factory.mktemp("doubts")
    port = free_port()
    a, b, way = (f"127.0.0.{number}:{port}" for number in (1, 2, 3))
    cache = {"size": "64MiB", "block_size": "64KiB", "extent_size": "256KiB"}
    with ExitStack() as stack:
        store = stack.enter_context(counting_server())
        store.files = dict(FILES)
        mount = {"path": "/data", "uri": store.url, "prefetch": "none", "replication": {"min": 1, "passive": False}}
        nodes = []
        for name, listen, others in (("a", a, [a, way]), ("b", b, [a, b])):
            folder = root / name
            folder.mkdir()
            table = {"listen": listen, "node_id": name, "nodes": others}
            nodes.append(stack.enter_context(daemon_node(folder, mounts=[mount], cache=cache, cluster=table)))
        wire = Wire(way, b)
        stack.callback(wire.close)
        for node in nodes:
            node.start()
        wait_until(lambda: all(ring_of(node)["nodes"] == 2 for node in nodes))
        for node in nodes:
            assert read(node, *FILES) == 0
        assert store.bytes_sent == DATASET_BYTES
        yield Cluster(nodes), store, wire


def read(node: DaemonNode, *names: str) -> int:
    """Read these files at that node; return how many had other bytes than the store's."""
    client = node.client()
    return sum(client.read_file(f"/data/{name}") != FILES[name] for name in names)


def counts(node: DaemonNode) -> dict[str, int]:
    """What the node counted of bytes that are not the object's, of its own disk, and what it wrote there."""
    status: dict[str, Any] = node.status()
    failures = [peer["failures"].get("checksum", 0) for peer in status["cluster"]["peers"].values()]
    blocks = {key: status["blocks"][key] for key in ("corrupt_count", "evicted_bytes", "written_bytes")}
    return {**status["cluster"]["doubts"], **blocks, "wrong": sum(failures)}


class Since:
    """What nodes counted since the test began."""

    def __init__(self, *nodes: DaemonNode) -> None:
        self._before = {id(node): counts(node) for node in nodes}

    def of(self, node: DaemonNode, name: str) -> int:
        return counts(node)[name] - self._before[id(node)][name]


def file_of(node: DaemonNode, name: str) -> Path | None:
    """Where that node's disk holds a file's bytes, which are like no other's."""
    data = FILES[name]
    paths = (path for path in node.cache_dir.rglob("*") if path.is_file() and path.stat().st_size == len(data))
    return next((path for path in paths if path.read_bytes()[:1000] == data[:1000]), None)


def owned_by(node: DaemonNode, kind: str) -> list[str]:
    """The files of that kind that the node holds."""
    return [name for name in FILES if name.startswith(kind) and file_of(node, name) is not None]


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4000)
        byte = file.read(1)
        file.seek(4000)
        file.write(bytes([byte[0] ^ 1]))


def costs_nothing(node: DaemonNode, store: CountingServer, name: str) -> bool:
    """Whether that node reads a file without the store being asked by anybody."""
    before = store.bytes_sent
    assert read(node, name) == 0
    return store.bytes_sent == before


def test_a_block_that_rotted_at_its_owner_is_reported_to_it_and_fetched_anew(
    nodes_and_wire: tuple[Cluster, CountingServer, Wire],
) -> None:
    """A byte of a large file is flipped on b's disk, in its first block: a gets the right bytes all the same, and tells
    b, which finds one damaged block and fetches it again. After that a reads it from b."""
    cluster, store, _ = nodes_and_wire
    a, b = cluster.nodes
    name, since = owned_by(b, "large")[0], Since(a, b)
    path = file_of(b, name)
    assert path is not None
    flip(path)
    assert read(a, name) == 0
    wait_until(lambda: since.of(a, "told") == 1)
    assert [since.of(b, what) for what in ("looked", "damaged", "corrupt_count")] == [1, 1, 1]
    wait_until(lambda: costs_nothing(a, store, name))
    assert since.of(a, "wrong") == 1, "what b gives now is right"
    mended = file_of(b, name)
    assert mended is not None
    assert mended.read_bytes() == FILES[name]


def test_a_small_object_that_rotted_is_fetched_anew_by_its_owner(
    nodes_and_wire: tuple[Cluster, CountingServer, Wire],
) -> None:
    """An owner checks small objects before it sends them: a asks b for a damaged one, b fetches it again, and a gets
    it from there; the store is asked for it once more."""
    cluster, store, _ = nodes_and_wire
    a, b = cluster.nodes
    wait_until(lambda: costs_nothing(a, store, owned_by(b, "small")[1]))  # b is not left alone for the test before
    name, since, sent = owned_by(b, "small")[0], Since(a, b), store.bytes_sent
    path = file_of(b, name)
    assert path is not None
    flip(path)
    assert read(a, name) == 0
    assert store.bytes_sent == sent + len(FILES[name])
    assert costs_nothing(a, store, name)
    assert (since.of(a, "wrong"), since.of(b, "corrupt_count")) == (0, 1)


def test_a_network_that_changes_bytes_makes_no_node_drop_good_blocks(
    nodes_and_wire: tuple[Cluster, CountingServer, Wire],
) -> None:
    """A byte is flipped between b and a: a gets the right bytes all the same, and tells b, which looks, finds its block
    right and keeps it. After that a reads it from b."""
    cluster, store, wire = nodes_and_wire
    a, b = cluster.nodes
    name = owned_by(b, "large")[1]
    wait_until(lambda: costs_nothing(a, store, name))  # b is not left alone for the test before
    since = Since(a, b)
    wire.is_changing = True
    assert read(a, name) == 0
    assert wire.changed == 1
    wait_until(lambda: since.of(a, "told") == 1)
    assert since.of(a, "wrong") == 1
    assert since.of(b, "looked") == 1
    assert [since.of(b, what) for what in ("damaged", "corrupt_count", "evicted_bytes", "written_bytes")] == [0] * 4
    wait_until(lambda: costs_nothing(a, store, name))
