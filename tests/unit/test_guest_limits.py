"""The guests' socket has a bound, and ends with its daemon."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.client.wire import DaemonConnection
from orchestra.daemon import guests
from orchestra.errors import UsageError
from tests.support.node import PATIENCE_S, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

_ASK = b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def root() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


def connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE_S)
    connection.connect(str(path))
    return connection


def test_guests_hold_so_many_connections_and_no_more(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is closed unanswered, those that are there go on, and room is given again."""
    monkeypatch.setattr(guests, "GUEST_CONNECTIONS_MAX", 2)
    with thread_node(root, VersionedStore(), readers=("*",)) as node:
        path = node.node.layout.guest_socket
        held = [connected(path) for _ in range(2)]
        for connection in held:
            connection.sendall(_ASK)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        with connected(path) as one_too_many:
            assert one_too_many.recv(100) == b""
        held.pop().close()
        held[0].sendall(_ASK)
        assert held[0].recv(4096).startswith(b"HTTP/1.1 200")
        guest = node.guest()
        assert guest.stat("/data").is_directory
        held.pop().close()
    assert not path.exists()


def test_a_request_of_megabytes_is_refused(root: Path) -> None:
    """A body that no reading needs is not taken into memory."""
    with thread_node(root, VersionedStore(), readers=("*",)) as node:
        connection = DaemonConnection(str(node.node.layout.guest_socket), timeout_s=PATIENCE_S)
        with pytest.raises(UsageError, match="Too Large"):
            connection.request("POST", "/v1/stat", {"path": "/data/" + "x" * 200_000})
        connection.close()
