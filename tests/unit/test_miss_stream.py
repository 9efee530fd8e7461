"""Misses over one stream: asked in one message, answered as fetches end, and never left without an answer."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.client.contract import Handle
from orchestra.client.node import NodeClient
from orchestra.fuse.channel import Channel
from orchestra.fuse.counters import Counters
from orchestra.fuse.misses import Misses, Waiting
from orchestra.testing.fault_store import FaultStore, Stall
from tests.support.cache import BLOCK, EXTENT, data_of
from tests.support.node import PATIENCE_S, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

_COUNT = 40


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def store() -> VersionedStore:
    store = VersionedStore()
    for index in range(_COUNT):
        store.put(f"{index:02}", data_of(f"{index:02}", 1000 + index))
    store.put("large", data_of("large", 3 * EXTENT + 5))
    return store


def opened(client: NodeClient, *names: str) -> list[Handle]:
    return [client.open(f"/data/{name}") for name in names]


def test_many_misses_are_one_message_and_one_get_each(tmp_path: Path, store: VersionedStore) -> None:
    """Every serial is answered once, and the bytes are read without another message."""
    with thread_node(tmp_path, store) as node:
        client = node.client()
        client.list("/data")
        handles = opened(client, *(f"{index:02}" for index in range(_COUNT)))
        sent = client.messages_sent
        stream = client.miss_stream()
        assert stream is not None
        assert stream.ask(*((at, handle, 0, handle.entry.size_bytes) for at, handle in enumerate(handles)))
        answers: list[tuple[int, bool]] = []
        while len(answers) < _COUNT:
            answers += stream.answers()
        assert sorted(answers) == [(index, True) for index in range(_COUNT)]
        assert [handle.read_here(fetched=True) for handle in handles] == [
            data_of(f"{index:02}", 1000 + index) for index in range(_COUNT)
        ]
        assert client.messages_sent == sent + 1
        stream.shut_down()
        assert stream.answers() == []
    assert len(store.reads) == _COUNT


def test_parts_of_a_large_object_join_the_fetches_under_way(tmp_path: Path, store: VersionedStore) -> None:
    """Two askers of overlapping ranges get both, and each block leaves the store once."""
    with thread_node(tmp_path, store) as node:
        first, second = opened(node.client(), "large", "large")
        stream = node.client().miss_stream()
        assert stream is not None
        size = first.entry.size_bytes
        assert stream.ask((1, first, 0, size), (2, second, BLOCK // 2, size - 1))
        answers = stream.answers()
        while len(answers) < 2:
            answers += stream.answers()
        assert dict(answers) == {1: True, 2: True}
        assert first.read_here(fetched=True) == data_of("large", size)
        # What is here already is answered without the store.
        reads = len(store.reads)
        assert stream.ask((3, first, 5, size))
        assert stream.answers() == [(3, True)]
        assert len(store.reads) == reads
        asked = [block for _, start, stop in store.reads for block in range(start // BLOCK, -(-stop // BLOCK))]
        assert sorted(asked) == list(range(-(-size // BLOCK)))
        stream.shut_down()


def test_what_cannot_be_made_present_is_answered_no_and_explained_by_a_read(
    tmp_path: Path, store: VersionedStore
) -> None:
    """An object that was replaced is refused on the stream; the stream goes on, and what is known is forgotten."""
    with thread_node(tmp_path, store) as node:
        client = node.client()
        client.list("/data")
        gone, good = opened(client, "00", "01")
        store.put("00", b"another")
        stream = client.miss_stream()
        assert stream is not None
        assert stream.ask((7, gone, 0, 1000), (8, good, 0, 1001))
        answers = stream.answers()
        while len(answers) < 2:
            answers += stream.answers()
        assert dict(answers) == {7: False, 8: True}
        assert gone.read_here(fetched=True) is None
        assert client.read_file("/data/00") == b"another"
        stream.shut_down()


def test_a_line_that_is_no_request_ends_the_stream(tmp_path: Path, store: VersionedStore) -> None:
    """The daemon closes the connection and goes on serving others."""
    with thread_node(tmp_path, store) as node:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(str(node.node.layout.socket))
            connection.sendall(b"POST /v1/ensure_stream HTTP/1.1\r\nHost: x\r\n\r\n[1]\n")
            received = b""
            while piece := connection.recv(1000):
                received += piece
            assert received.startswith(b"HTTP/1.1 101 ") or received == b""
        assert node.client().read_file("/data/00") == data_of("00", 1000)


def test_there_is_no_stream_without_a_daemon(tmp_path: Path, store: VersionedStore) -> None:
    """Who asks for one is told, and reads in the other way."""
    with thread_node(tmp_path, store) as node:
        client = node.client()
        client.list("/data")
        (handle,) = opened(client, "00")
        stream = client.miss_stream()
        assert stream is not None
        assert stream.ask((1, handle, 0, 1000))
        assert stream.answers() == [(1, True)]
        node.close()
        assert stream.answers() == []
        assert client.miss_stream() is None


def test_a_daemon_that_ends_hands_every_waiting_read_on(tmp_path: Path, store: VersionedStore) -> None:
    """READs that wait when the stream breaks are each given to the other way, once; none is lost or answered twice."""
    faults = FaultStore(store)
    stall = faults.inject(Stall(), on="read", times=None)
    handed_on: list[int] = []

    def on_failure(waiting: Waiting) -> None:
        handed_on.append(waiting.unique)

    with thread_node(tmp_path, faults) as node:
        client = node.client()
        client.list("/data")
        device, other_end = socket.socketpair()
        channel = Channel(device.fileno(), Counters(), threads_max=1)
        misses = Misses(client, channel, on_read=lambda _: pytest.fail("was read"), on_failure=on_failure)
        for at, handle in enumerate(opened(client, *(f"{index:02}" for index in range(_COUNT)))):
            assert misses.ask(Waiting(at, handle, 0, handle.entry.size_bytes, None))
        node.run(stall.wait_fired())
        assert not handed_on
        other_end.send(b"a request")
        assert misses.wait(), "requests are read while others wait"
        assert device.recv(100) == b"a request"
        node.close()
        assert not misses.wait()
        assert not misses.waiting
        assert sorted(handed_on) == list(range(_COUNT))
        (handle,) = opened(client, "00")
        assert not misses.ask(Waiting(99, handle, 0, 1000, None)), "no daemon: the caller reads in the other way"
        misses.close()
        channel.close()
        device.close()
        other_end.close()
