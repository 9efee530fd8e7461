"""What a reader of the node sees when the store misbehaves: right bytes, or an error that says why; never a mix.

A whole node over a store that fails on order. Each test proves that its fault fired, and that nothing is in flight in
the end. `cold` nodes keep nothing (a cache of no size), so every byte comes from the store through the daemon.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestra.client.node import NodeClient
from orchestra.clock import SystemClock
from orchestra.config import FetchConfig
from orchestra.errors import (
    AccessDeniedError,
    NotFoundError,
    StaleObjectError,
    StoreError,
    StoreUnavailableError,
)
from orchestra.stores.registry import wrapped
from orchestra.testing.fault_store import Cut, Fail, Fault, FaultStore, Stall, Swap
from orchestra.units import KIB
from tests.support.cache import BLOCK, EXTENT, data_of
from tests.support.node import ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

SIZE = 2 * EXTENT + 100
OLD, NEW = data_of("old", SIZE), data_of("new", SIZE)
WARM: dict[str, object] = {}
COLD: dict[str, object] = {"size_bytes": 0}
both = pytest.mark.parametrize("cache", [WARM, COLD], ids=["kept", "cold"])


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


class Stage:
    """A store with one object, the faults in front of it, and a node that reads it."""

    def __init__(self, node: ThreadNode, store: VersionedStore, faults: FaultStore) -> None:
        self.node = node
        self.store = store
        self.faults = faults
        self.client = node.client()

    def wait_fired(self, fault: Fault) -> None:
        self.node.run(fault.wait_fired())

    def release(self, fault: Fault) -> None:
        self.node.loop.call_soon_threadsafe(fault.release)

    def replace(self) -> None:
        self.store.put("a", NEW)

    def when_asked(self, change: str) -> Swap:
        """Replace or delete the object at the moment of a request."""

        async def swap() -> None:
            self.replace() if change == "replace" else self.store.delete("a")

        return Swap(swap)


async def _nothing_in_flight(node: ThreadNode) -> None:
    for _ in range(100):  # the last answer may have arrived before its task has ended
        await asyncio.sleep(0)
    assert node.node.budget.used_bytes == 0
    assert node.node.budget.waiting_count == 0


@contextmanager
def stage(
    root: Path, cache: dict[str, object] | None = None, *, retries: bool = False, **more: object
) -> Iterator[Stage]:
    store = VersionedStore()
    store.put("a", OLD)
    faults = FaultStore(store)
    fetch = FetchConfig(attempt_timeout_s=0.2, deadline_s=5.0)

    async def at_once(seconds: float) -> None:
        return None

    outer = wrapped(faults, fetch, clock=SystemClock(), chance=lambda: 0.0, sleep=at_once) if retries else faults
    with thread_node(root, outer, cache=cache, fetch=fetch, **more) as node:  # type: ignore[arg-type]
        yield Stage(node, store, faults)
        node.run(_nothing_in_flight(node))


# -- another version, in the middle of a read ----------------------------------------------------------------------


@both
@pytest.mark.parametrize("change", ["replace", "delete"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_object_that_changes_during_a_read_is_stale(
    tmp_path: Path, cache: dict[str, object], change: str, at: int
) -> None:
    """F-8: replaced or deleted at any of the requests of one long read: ESTALE, and no byte of two versions together.
    Opened again, it is the new one, or gone."""
    with stage(tmp_path, cache, block_size_bytes=4 * KIB, extent_size_bytes=16 * KIB) as on:
        fault = on.faults.inject(on.when_asked(change), on="read", at=at)
        handle = on.client.open("/data/a")
        buffer = bytearray(SIZE)
        # One block at a time, so that several requests are needed however blocks are put together.
        with pytest.raises(StaleObjectError, match=r"versioned://test/.*'a'"):
            for block in range(0, SIZE, BLOCK):
                handle.readinto(block, memoryview(buffer)[block : block + BLOCK])
        assert fault.fired == 1
        assert bytes(buffer[: (at - 1) * BLOCK]) == OLD[: (at - 1) * BLOCK]
        handle.close()
        if change == "replace":
            assert on.client.read_file("/data/a") == NEW
        else:
            with pytest.raises(NotFoundError):
                on.client.read_file("/data/a")


def test_what_is_cached_whole_stays_what_was_opened(tmp_path: Path) -> None:
    """F-8, warm: a handle whose version is on disk goes on reading it, whatever the store has by now; who opens anew
    after a refresh gets the new version."""
    with stage(tmp_path) as on:
        handle = on.client.open("/data/a")
        assert handle.read(0, SIZE) == OLD
        on.replace()
        assert handle.read(0, SIZE) == OLD
        on.client.stat("/data/a", refresh=True)
        assert handle.read(0, SIZE) == OLD
        assert on.client.read_file("/data/a") == NEW
        assert handle.read(7, 100) == OLD[7:107]
        handle.close()


def test_half_cached_and_then_replaced_is_stale_and_never_mixed(tmp_path: Path) -> None:
    """Bytes of the version that was opened come from the cache, the rest does not come from another."""
    with stage(tmp_path) as on:
        handle = on.client.open("/data/a")
        assert handle.read(0, BLOCK) == OLD[:BLOCK]
        on.replace()
        assert handle.read(0, BLOCK) == OLD[:BLOCK]
        with pytest.raises(StaleObjectError):
            handle.read(0, SIZE)
        with pytest.raises(StaleObjectError):
            handle.read(BLOCK, 1)
        handle.close()
        assert on.client.read_file("/data/a") == NEW


def test_a_stale_listing_costs_one_error(tmp_path: Path) -> None:
    """A version that only a listing knew is forgotten when a read finds it gone: the next open sees what is there."""
    with stage(tmp_path) as on:
        on.client.list("/data")
        on.replace()
        with pytest.raises(StaleObjectError):
            on.client.read_file("/data/a")
        assert on.client.read_file("/data/a") == NEW
        assert on.node.node.engine.statistics.stale_objects >= 1


@both
def test_readers_of_a_changing_object_never_see_a_mix(tmp_path: Path, cache: dict[str, object]) -> None:
    """R1: while a writer replaces the object again and again, every read of four readers is one whole version, or
    stale."""
    versions = [data_of(f"v{index}", SIZE) for index in range(12)]
    with stage(tmp_path, cache, freshness_s=0.001) as on:
        whole: list[int] = []
        mixed: list[bytes] = []
        stop = threading.Event()

        def read(client: NodeClient) -> None:
            while not stop.is_set():
                try:
                    data = client.read_file("/data/a")
                except StaleObjectError:
                    continue
                whole.append(1) if data in versions or data == OLD else mixed.append(data)

        with ThreadPoolExecutor(4) as pool:
            reading = [pool.submit(read, on.node.client()) for _ in range(4)]
            for data in versions:
                on.store.put("a", data)
                before = len(whole)
                for _ in range(200):
                    if len(whole) > before + 2 or any(one.done() for one in reading):
                        break
                    stop.wait(0.005)
            stop.set()
            for one in reading:
                one.result()
        assert not mixed
        assert len(whole) > 12


# -- bodies that are wrong -----------------------------------------------------------------------------------------


@both
def test_a_short_body_is_an_error_and_never_kept(tmp_path: Path, cache: dict[str, object]) -> None:
    """F-5: fewer bytes than asked for, from a store that does not notice, are refused in words; the next try is
    right, and so is what was kept."""
    with stage(tmp_path, cache) as on:
        fault = on.faults.inject(Cut(keep_bytes=1000), on="read")
        with pytest.raises(StoreUnavailableError, match=r"asked for \d+ bytes of 'a', got 1000"):
            on.client.read_file("/data/a")
        assert fault.fired == 1
        assert on.client.read_file("/data/a") == OLD
        assert on.client.read_file("/data/a") == OLD


@pytest.mark.parametrize("at", range(1, 10))
def test_an_error_in_the_middle_of_a_body_is_never_taken_for_bytes(tmp_path: Path, at: int) -> None:
    """Bytes that are sent over the socket break off at any piece, also when an answer about the error would just fill
    the rest: the reader asks again, and gets the error itself."""
    with stage(tmp_path, COLD) as on:
        handle = on.client.open("/data/a")
        fault = on.faults.inject(Fail(StoreError("the store fell over")), on="read", at=at, times=2)
        while fault.fired < 2:
            with pytest.raises(StoreError, match="the store fell over"):
                handle.read(0, SIZE)
        assert handle.read(0, SIZE) == OLD
        handle.close()


# -- a store that is down, slow, or says no ------------------------------------------------------------------------


@both
def test_a_burst_of_errors_is_ridden_out(tmp_path: Path, cache: dict[str, object]) -> None:
    """F-1: failures that pass within the deadline cost retries; the reader sees right bytes."""
    with stage(tmp_path, cache, retries=True) as on:
        fault = on.faults.inject(Fail(StoreUnavailableError("503 SlowDown")), on="read", times=3)
        assert on.client.read_file("/data/a") == OLD
        assert fault.fired == 3


def test_an_outage_is_told_and_cached_data_goes_on(tmp_path: Path) -> None:
    """F-1: what must come from a store that is down is an error with the store's words; what is here is served."""
    with stage(tmp_path) as on:
        on.store.put("b", b"elsewhere")
        assert on.client.read_file("/data/a") == OLD
        for kind in ("head", "list", "read"):
            on.faults.inject(Fail(StoreUnavailableError("s3://x: 503 after 4 tries")), on=kind, times=None)
        with pytest.raises(StoreUnavailableError, match="503 after 4 tries"):
            on.client.read_file("/data/b")
        assert on.client.read_file("/data/a") == OLD


def test_a_stall_ends_by_its_timeout(tmp_path: Path) -> None:
    """F-6: a request without an answer is given up and sent again; the reader sees right bytes."""
    with stage(tmp_path, retries=True) as on:
        fault = on.faults.inject(Stall(), on="read", times=1)
        assert on.client.read_file("/data/a") == OLD
        assert fault.fired == 1
        on.release(fault)


def test_refused_credentials_are_told_and_not_retried(tmp_path: Path) -> None:
    """F-4: a 403 reaches the reader as PermissionError at once; what is cached stays readable."""
    with stage(tmp_path, retries=True) as on:
        on.store.put("b", b"elsewhere")
        assert on.client.read_file("/data/a") == OLD
        fault = on.faults.inject(Fail(AccessDeniedError("s3://x: 403 for key AKIA")), on="read", times=None)
        with pytest.raises(PermissionError, match="403 for key AKIA"):
            on.client.read_file("/data/b")
        assert fault.fired == 1
        assert on.client.read_file("/data/a") == OLD


def test_what_fails_ahead_of_a_reader_is_not_his_error(tmp_path: Path) -> None:
    """F-63: a read-ahead that fails is forgotten; the reader that comes to those bytes asks for them himself."""
    with stage(tmp_path, prefetch="readahead") as on:
        fault = on.faults.inject(Fail(StoreUnavailableError("later")), on="read", at=2, times=1)
        handle = on.client.open("/data/a")
        assert handle.read(0, BLOCK) == OLD[:BLOCK]
        on.wait_fired(fault)
        assert b"".join(handle.read(at, BLOCK) for at in range(0, SIZE, BLOCK)) == OLD
        handle.close()


def test_a_reader_that_goes_away_leaves_nothing_in_flight(tmp_path: Path) -> None:
    """F-61: a reader killed while its block is being fetched: the fetch ends, is kept for others, and no byte stays
    counted as in flight."""
    with stage(tmp_path) as on:
        entry = on.client.stat("/data/a")
        stall = on.faults.inject(Stall(), on="read")
        wanted = {"path": "/data/a", "version": entry.version, "size_bytes": SIZE, "start": 0, "stop": SIZE}
        body = json.dumps(wanted).encode()
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(str(on.node.node.layout.socket))
            reader.sendall(b"POST /v1/ensure HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            on.wait_fired(stall)
            assert on.node.node.budget.used_bytes == SIZE
        on.release(stall)
        assert on.client.read_file("/data/a") == OLD
        assert len(on.store.reads) == 1
