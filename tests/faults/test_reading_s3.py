"""Reading faults end to end: a real S3 server behind a proxy that fails on order, a real daemon, a reading client.

Each test proves that its fault fired, reads once more what is kept by then, and once more with an empty cache, and
compares with what the store holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from orchestra.errors import (
    AccessDeniedError,
    NotFoundError,
    OrchestraError,
    StaleObjectError,
    StoreUnavailableError,
)
from orchestra.testing.fault_proxy import (
    Action,
    ArmedFault,
    Call,
    Cut,
    Delay,
    FaultProxy,
    Header,
    Stall,
    Status,
    WholeBody,
)
from orchestra.testing.s3_server import S3Server
from tests.support.cache import data_of
from tests.support.node import DaemonNode, daemon_node
from tests.support.ram import ram_folder
from tests.support.reading import read_in_new_process, sha256

pytestmark = pytest.mark.system

KIB = 1024
BLOCK = 64 * KIB
SIZES = {"small": 10_000, "large": 9 * BLOCK + 123}


class Stage:
    """Objects in the bucket, the proxy's script, and the node."""

    def __init__(self, node: DaemonNode, server: S3Server, proxy: FaultProxy) -> None:
        self.node = node
        self.proxy = proxy
        self._server = server
        self.now = {name: data_of(f"first {name}", size) for name, size in SIZES.items()}
        server.put_many("bucket", self.now)

    def on_read(self, action: Action, name: str = "large", **when: Any) -> ArmedFault:
        """Do `action` to GETs of that object."""
        return self.proxy.add(action, method="GET", path=f"^/bucket/{name}$", **when)

    def replace(self, name: str = "large") -> None:
        """What another writer does."""
        self.now[name] = data_of(f"second {name}", SIZES[name])
        self._server.put("bucket", name, self.now[name])

    def delete(self, name: str = "large") -> None:
        del self.now[name]
        self._server.delete("bucket", name)

    def check(self, fault: ArmedFault) -> None:
        """The fault fired; a process of its own reads what the store holds, as kept by now and with an empty cache;
        nothing is in flight."""
        assert fault.fired > 0
        self.proxy.reset()
        hashes = {f"/data/{name}": sha256(data) for name, data in self.now.items()}
        for clears in (False, True):
            if clears:
                self.node.stop()
                self.node.cache_dir.rename(self.node.cache_dir.with_name("old"))
            assert read_in_new_process(self.node.config_path, hashes)["hashes"] == hashes
        assert any(request.method == "GET" for request in self.proxy.requests), "the second time came from the store"
        assert self.node.status()["fetch"]["in_flight_bytes"] == 0


@pytest.fixture
def stage(server: S3Server, running_proxy: FaultProxy) -> Iterator[Stage]:
    running_proxy.reset()
    mounts = [{"path": "/data", "uri": "s3://bucket/", "options": server.options_at(running_proxy.endpoint)}]
    cache = {"block_size": "64KiB", "extent_size": "256KiB"}
    fetch = {"attempt_timeout": "700ms", "deadline": "5s"}
    with ram_folder() as root, daemon_node(root, mounts=mounts, cache=cache, fetch=fetch) as node:
        yield Stage(node, server, running_proxy)


PASSING: dict[str, tuple[Action, dict[str, Any]]] = {
    "503 three times": (Status(503), {"times": 3}),
    "503 with a time to wait": (Status(503, retry_after="1"), {"times": 1}),
    "429": (Status(429), {"times": 2}),
    "500": (Status(500), {"times": 2}),
    "cut before the head": (Cut(), {"times": 2}),
    "cut in the body": (Cut(), {"times": 2, "at_byte": 1000}),
    "stalled head": (Stall(), {"times": 1}),
    "stalled body": (Stall(), {"times": 1, "at_byte": 1000}),
    "slow": (Delay(0.3), {"times": 2, "at_byte": 1000}),
    "another range": (Header("Content-Range", "bytes 5-100004/600000"), {"times": 1}),
    "another length": (Header("Content-Length", "100"), {"times": 1}),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("fault", PASSING)
def test_faults_that_pass_are_not_seen(stage: Stage, fault: str, name: str) -> None:
    """F-1, F-2, F-5, F-6, F-9: whatever the wire does for a moment, the reader gets right bytes, only later."""
    action, when = PASSING[fault]
    armed = stage.on_read(action, name, **when)
    client = stage.node.client()
    assert client.read_file(f"/data/{name}") == stage.now[name]
    assert client.read_file(f"/data/{name}") == stage.now[name]
    stage.check(armed)


def test_a_whole_body_for_a_range(stage: Stage) -> None:
    """F-9: 200 with all of the object where a range was asked for is never taken for the range: right bytes, or an
    error in words."""
    armed = stage.on_read(WholeBody(), times=1)
    client = stage.node.client()
    try:
        assert client.read_file("/data/large", BLOCK + 5, BLOCK + 500) == stage.now["large"][BLOCK + 5 : BLOCK + 500]
    except OrchestraError as error:
        assert "large" in str(error)
    assert client.read_file("/data/large") == stage.now["large"]
    stage.check(armed)


@pytest.mark.parametrize("at", [1, 2])
def test_replaced_during_a_read(stage: Stage, at: int) -> None:
    """F-8: another writer replaces the object between two requests of a read: ESTALE and no mixed bytes; opened again
    it is the new one."""
    client = stage.node.client()
    handle = client.open("/data/large")
    first = stage.now["large"]
    armed = stage.on_read(Call(stage.replace), at=at)
    buffer = bytearray(SIZES["large"])
    at_byte = 0
    with pytest.raises(StaleObjectError, match="large"):
        while at_byte < len(buffer):
            piece = memoryview(buffer)[at_byte : at_byte + 4 * BLOCK]
            at_byte += handle.readinto(at_byte, piece)
    assert bytes(buffer[:at_byte]) == first[:at_byte]
    handle.close()
    assert client.read_file("/data/large") == stage.now["large"] != first
    stage.check(armed)


def test_deleted_during_a_read(stage: Stage) -> None:
    """F-8: an object that is gone in the middle of a read is stale for who has it open, and not found for the next."""
    client = stage.node.client()
    handle = client.open("/data/large")
    assert handle.read(BLOCK * 5, 10) == stage.now["large"][BLOCK * 5 : BLOCK * 5 + 10]
    armed = stage.on_read(Call(stage.delete), at=1)
    with pytest.raises(StaleObjectError):
        handle.read(0, SIZES["large"])
    handle.close()
    with pytest.raises(NotFoundError):
        client.read_file("/data/large")
    stage.check(armed)


def test_an_outage_past_the_deadline(stage: Stage) -> None:
    """F-1: a store that is down for longer than the deadline is an error that names it and the status; what is cached
    is read all the same."""
    client = stage.node.client()
    client.list("/data")
    assert client.read_file("/data/small") == stage.now["small"]
    armed = stage.on_read(Status(503), times=None)
    with pytest.raises(StoreUnavailableError, match=r"s3://bucket.* 503"):
        client.read_file("/data/large")
    assert client.read_file("/data/small") == stage.now["small"]
    stage.check(armed)


def test_credentials_that_are_refused_in_the_middle(stage: Stage) -> None:
    """F-4: a 403 is told at once, as PermissionError, without the secret; it passes when the store agrees again."""
    client = stage.node.client()
    assert client.read_file("/data/small") == stage.now["small"]
    armed = stage.on_read(Status(403, code="AccessDenied"), times=None)
    with pytest.raises(AccessDeniedError) as caught:
        client.read_file("/data/large")
    assert "secret" not in str(caught.value).lower()
    assert client.read_file("/data/small") == stage.now["small"]
    stage.check(armed)


def test_a_listing_that_fails_on_its_way_is_no_listing(stage: Stage, server: S3Server) -> None:
    """F-10: a page that does not come fails the listing; half a directory is never shown as the whole."""
    server.put_numbered("bucket", "many/", 1500)
    armed = stage.proxy.add(Status(400, code="InvalidToken"), method="GET", path="continuation-token", times=1)
    client = stage.node.client()
    with pytest.raises(OrchestraError):
        client.list("/data/many")
    assert len(client.list("/data/many")) == 1500
    stage.check(armed)
