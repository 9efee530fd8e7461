"""Loads whose bytes a second process receives and writes: the same bytes, counts, errors and limits as without it, and
nothing is lost when it dies, stops or meets what it does not know.

The node runs in a thread of this process over a real S3 store; the courier is a real process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from common import OriginProcess
from synthetic import dataset_keys

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout, prepare
from orchestra.blocks.store import Placed
from orchestra.clock import SystemClock
from orchestra.config import FetchConfig
from orchestra.daemon.jobs.job import JobState, LoadSpec
from orchestra.engine import courier as courier_module
from orchestra.engine.courier import Courier
from orchestra.engine.courier_wire import Place, Setup
from orchestra.engine.engine import Wanted
from orchestra.errors import OrchestraError
from orchestra.stores.carrying import NotCarriedError
from orchestra.stores.http_client import HttpClient, HttpSettings
from orchestra.stores.range_client import RangeAnswer
from orchestra.stores.translate import Operation
from orchestra.values import ByteRange
from tests.support.carried_loads import (
    BLOCKS,
    COUNT,
    FETCH,
    LARGE_COUNT,
    LARGE_SIZE,
    SECRET,
    SIZE,
    carried_origin,
    carrying_node,
    check_all,
    counts_of,
    courier_of,
    do_carried_load,
    do_disturbed_load,
    do_load,
    gets,
    have_couriers,
    tmp_of,
    wait_asked,
    wait_ready,
)
from tests.support.node import PATIENCE_S, ThreadNode
from tests.support.placing_store import PlacingVersionedStore
from tests.support.ram import ram_folder
from tests.support.scripted_server import ScriptedServer

pytestmark = pytest.mark.system

BOOT = bytes(16)


@pytest.fixture(scope="module")
def origin() -> Iterator[OriginProcess]:
    """See carried_origin."""
    with carried_origin() as running:
        yield running


@pytest.fixture
def node(
    origin: OriginProcess, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[ThreadNode]:
    """A node that has a courier for every load. The parameter says how much may be asked of the store."""
    have_couriers(monkeypatch)
    monkeypatch.setenv("COURIER_TEST_SECRET", SECRET)
    with ram_folder() as folder, carrying_node(origin, folder, getattr(request, "param", FETCH)) as running:
        yield running


def test_a_carried_load_brings_the_same_bytes_by_the_same_requests(node: ThreadNode, origin: OriginProcess) -> None:
    """Small objects and blocks of extents: one GET each, all by the courier, counted by the store, charged, verified;
    readers then ask for nothing."""
    assert node.run(do_carried_load(node, "/data")).state is JobState.SUCCEEDED
    assert courier_of(node).carried == BLOCKS
    asked, counted = gets(origin), counts_of(node)
    assert counted.read_requests == asked == BLOCKS
    assert counted.read_bytes == COUNT * SIZE + LARGE_COUNT * LARGE_SIZE == node.node.fetcher.statistics.bytes_fetched
    held = node.node.blocks.statistics()
    assert held.used_bytes == COUNT * 4096 + LARGE_COUNT * -(-LARGE_SIZE // 4096) * 4096
    assert node.node.budget.used_bytes == 0
    assert node.node.blocks.room_bytes() == node.config.cache.size_bytes - held.used_bytes  # nothing stays reserved
    check_all(node)
    assert gets(origin) == asked
    verified = node.run(do_load(node, "/data", verify=True))
    assert (verified.state, verified.blocks_damaged) == (JobState.SUCCEEDED, 0)
    assert tmp_of(node) == []


def test_requests_in_flight_stay_within_the_stores_limit(node: ThreadNode, origin: OriginProcess) -> None:
    """The courier sends the next request by itself, and never one more than there are turns for loads: 15 of 16."""
    origin.set(latency_ms=20)
    origin.call("/__reset")
    assert node.run(do_carried_load(node, "/data/small")).state is JobState.SUCCEEDED
    assert origin.call("/__stats", "GET")["in_flight_max"] == 15
    assert courier_of(node).carried == COUNT


def test_a_store_that_asks_for_less_gets_less_and_nothing_fails(node: ThreadNode, origin: OriginProcess) -> None:
    """Answers of 503 halve the window, are waited for as any, and every file is there in the end."""
    origin.set(rate=100)
    try:
        assert node.run(do_carried_load(node, "/data/small")).state is JobState.SUCCEEDED
    finally:
        origin.set(rate=0)
    statuses = origin.call("/__stats", "GET")["statuses"]
    counted = counts_of(node)
    assert (statuses["206"], statuses["503"]) == (COUNT, counted.throttled)
    assert counted.throttled > 0
    assert counted.requests_in_flight == 0
    check_all(node)


def test_a_node_that_closes_takes_all_errands_back(node: ThreadNode, origin: OriginProcess) -> None:
    """Half way through a load: nothing stays of what was under way, in memory, in the accounts or on the disk."""
    origin.set(latency_ms=200)

    async def scenario() -> None:
        with courier_of(node).held():
            await wait_ready(courier_of(node))
            node.node.jobs.submit(LoadSpec("/data"))
            await wait_asked(origin, 20)

    node.run(scenario())
    node.close()
    assert tmp_of(node) == []
    assert node.node.budget.used_bytes == 0
    counted = counts_of(node)
    assert counted.requests_in_flight == 0
    assert counted.abandoned > 0


@pytest.mark.parametrize("node", [FetchConfig(requests_max=2)], indirect=True, ids=["one turn for loads"])
def test_a_reader_goes_before_what_waits_for_the_courier(node: ThreadNode, origin: OriginProcess) -> None:
    """Of the files that a load has begun one is asked for, and a later one is read: it is asked for next."""
    keys = dataset_keys("small", COUNT)

    async def read() -> None:
        engine = node.node.engine
        wanted = await want(node, keys[23])
        assert engine.is_coming(wanted)
        assert await engine.ensure(wanted)
        behind = [key for key in keys[1:23] if not engine.holds_some(await want(node, key))]
        assert len(behind) > 0, "those were to be asked for before it"

    job = node.run(do_disturbed_load(node, origin, "/data/small", read, asked=1, latency_ms=500))
    assert job.state is JobState.SUCCEEDED


async def want(node: ThreadNode, key: str) -> Wanted:
    """The whole of that object."""
    engine = node.node.engine
    entry = await engine.stat(f"/data/{key}")
    return engine.want(f"/data/{key}", entry.version, entry.size_bytes, ByteRange(0, entry.size_bytes))


def test_a_busy_machine_loads_without(node: ThreadNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more programs want to run than there are cores for, a load begins no process, and brings the same."""
    monkeypatch.setattr(os, "getloadavg", lambda: (8.0, 8.0, 8.0))
    assert node.run(do_load(node, "/data")).state is JobState.SUCCEEDED
    assert (courier_of(node).pid, courier_of(node).carried) == (None, 0)
    check_all(node)


@pytest.mark.parametrize("node", [FetchConfig(requests_max=16, attempt_timeout_s=1.0)], indirect=True, ids=["1s"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_courier_that_dies_or_stops_loses_nothing(
    node: ThreadNode, origin: OriginProcess, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon fetches what was under way itself, the load succeeds, and nothing is left in tmp/."""
    monkeypatch.setattr(courier_module, "_SILENT_S", 0.2)

    async def strike() -> None:
        pid = courier_of(node).pid
        assert pid is not None
        os.kill(pid, number)

    job = node.run(do_disturbed_load(node, origin, "/data", strike, asked=1, latency_ms=300))
    assert job.state is JobState.SUCCEEDED
    check_all(node)
    assert tmp_of(node) == []
    assert node.node.engine.statistics.cache_write_errors == 0


def test_the_process_shows_no_secret_and_ends_with_the_daemon(node: ThreadNode) -> None:
    """Neither its command line nor its environment holds one; closing the node ends it."""

    async def scenario() -> tuple[int, bytes]:
        with courier_of(node).held():
            pid = await wait_ready(courier_of(node))
            await do_load(node, "/data")
            seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
            return pid, seen

    pid, seen = node.run(scenario())
    assert b"orchestra.engine.courier_process" in seen
    assert SECRET.encode() not in seen
    node.close()
    assert not Path(f"/proc/{pid}").exists()


# What a killed daemon was, as far as its courier knows: who started it, and has the other end of its socket.
STARTER = """
import socket, subprocess, sys
ours, theirs = socket.socketpair()
process = subprocess.Popen(
    [sys.executable, "-m", "orchestra.engine.courier_process", str(theirs.fileno())], pass_fds=(theirs.fileno(),)
)
ours.sendall(bytes.fromhex(sys.argv[1]))
ours.recv(1)
print(process.pid, flush=True)
sys.stdin.read()
"""


def test_a_stopped_courier_ends_with_its_daemon_and_never_writes_again() -> None:
    """The next daemon empties tmp/ once: a courier that went on later would leave there what nobody accounts for."""
    with ram_folder() as folder:
        prepare(folder / "cache", Geometry(4096, 16384))
        setup = Setup(str(folder / "cache"), 4096, 16384, BOOT.hex()).pack().hex()
        command = [sys.executable, "-c", STARTER, setup]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
            assert starter.stdout is not None
            courier = os.pidfd_open(int(starter.stdout.readline()))
            try:
                signal.pidfd_send_signal(courier, signal.SIGSTOP)
                starter.kill()
                assert select.select([courier], [], [], PATIENCE_S)[0], "the courier of a killed daemon lives on"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(courier, signal.SIGKILL)
                os.close(courier)


# -- one errand ----------------------------------------------------------------------------------------------------

SPAN = ByteRange(0, 4)
OK = b'HTTP/1.1 206 P\r\nETag: "abc"\r\nContent-Range: bytes 0-3/4\r\nContent-Length: 4\r\n\r\n0123'
DIGEST = "0123456789abcdef0123456789abcdef"


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedServer]:
    """A server that sends what the test says."""
    async with ScriptedServer().running() as server:
        yield server


@pytest.fixture
async def layout() -> AsyncIterator[CacheLayout]:
    """An empty cache directory."""
    with ram_folder() as folder:
        yield prepare(folder / "cache", Geometry(4096, 16384))[0]


@pytest.fixture
async def courier(layout: CacheLayout) -> AsyncIterator[Courier]:
    """A courier that takes errands."""
    courier = Courier(layout, Geometry(4096, 16384), boot_id=BOOT)
    with courier.held():
        await wait_ready(courier)
        yield courier
        await courier.close()


class FreeTurns(PlacingVersionedStore):
    """A store whose turns are free."""

    def take_turn(self, who: object, urgency: int, granted: Callable[[], bool]) -> None:
        """At once."""
        granted()

    def give_turn_back(self) -> None:
        """There are more."""

    def turns_wanted(self, who: object, urgency: int, turns: int) -> int:
        """By nobody."""
        return 0


FREE_TURNS = FreeTurns()


async def outcome(courier: Courier | None, server: ScriptedServer, store: FreeTurns = FREE_TURNS) -> object:
    """What a read of the scripted server comes to, carried or not: the bytes, or the error's kind and text."""
    client = HttpClient(HttpSettings(requests_max=4, attempt_timeout_s=0.2), SystemClock())
    operation = Operation("read", "k", "s3://bucket/")
    headers = {"host": server.url.split("/")[2], "range": "bytes=0-3"}
    asked = {"byte_range": SPAN, "size_bytes": 4, "version": '"abc"'}
    try:
        if courier is None:
            return bytes(await client.fetch_range(server.url, headers, operation, **asked))  # type: ignore[arg-type]
        errand = client.errand(server.url, headers, **asked)  # type: ignore[arg-type]
        if errand is None or not courier.is_ready:
            raise NotCarriedError
        ended: asyncio.Future[Placed | RangeAnswer | TimeoutError | NotCarriedError] = asyncio.Future()
        number = courier.send(store, Place(DIGEST, 0, 0), errand, ended.set_result)
        try:
            what = await ended
        except asyncio.CancelledError:
            courier.take_back(number)
            raise
        client.conclude(errand, operation, None if isinstance(what, Placed) else what)
        assert isinstance(what, Placed)
        return Path(what.path).read_bytes()
    except OrchestraError as error:
        return type(error), str(error)
    finally:
        await client.close()


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        OK.replace(b'"abc"', b'"new"'),
        OK.replace(b"bytes 0-3/4", b"bytes 0-3/5"),
        OK.replace(b"bytes 0-3/4", b"bytes 1-4/5"),
        OK.replace(b"ETag", b"Content-Encoding: gzip\r\nETag"),
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 Slow Down\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 32\r\n\r\n<E><Code>AccessDenied</Code></E>",
        OK[:-2].replace(b"Content-Length: 4", b"Content-Length: 2"),
        OK[:20],  # and then nothing: it stalls
    ],
    ids=["right", "version", "size", "range", "gzip", "404", "412", "503", "403", "short", "stall"],
)
async def test_an_answer_means_the_same_carried_or_not(
    courier: Courier, scripted: ScriptedServer, layout: CacheLayout, answer: bytes
) -> None:
    """Only what may be taken for the bytes is written; for all else the error is that of a read here, to the word."""
    scripted.answers = [[answer]]
    wanted = await outcome(None, scripted)
    assert await outcome(courier, scripted) == wanted
    assert (wanted == b"0123") is (answer == OK)
    assert len(os.listdir(layout.tmp)) == (answer == OK)


@pytest.mark.parametrize(
    "answer", [OK.replace(b"Content-Length: 4", b"Transfer-Encoding: chunked"), b"nonsense\r\n\r\n"]
)
async def test_what_a_courier_does_not_know_is_left_to_the_daemon(
    courier: Courier, scripted: ScriptedServer, answer: bytes
) -> None:
    """An answer that only the client for every kind of answer reads is NotCarriedError, and nothing is written."""
    scripted.answers = [[answer]]
    with pytest.raises(NotCarriedError):
        await outcome(courier, scripted)


async def test_an_errand_that_was_given_up_leaves_nothing(
    courier: Courier, scripted: ScriptedServer, layout: CacheLayout
) -> None:
    """Cancelled before its answer came, it writes nothing that stays, and the next one is carried."""
    scripted.answers = [[OK]]
    scripted.may_answer.clear()
    errand = asyncio.create_task(outcome(courier, scripted))
    await scripted.asked.wait()
    errand.cancel()
    await asyncio.gather(errand, return_exceptions=True)
    scripted.may_answer.set()
    assert await outcome(courier, scripted) == b"0123"
    assert len(os.listdir(layout.tmp)) == 1


async def test_closing_waits_for_no_courier(layout: CacheLayout) -> None:
    """Neither for one that is stopped, nor for one that was just called."""
    async with asyncio.timeout(PATIENCE_S / 10):
        courier = Courier(layout, Geometry(4096, 16384), boot_id=BOOT)
        with courier.held():
            os.kill(await wait_ready(courier), signal.SIGSTOP)
        await courier.close()
        courier = Courier(layout, Geometry(4096, 16384), boot_id=BOOT)
        with courier.held():
            await asyncio.sleep(0)
        await courier.close()
    assert courier.pid is None


async def test_without_a_process_nothing_is_carried(layout: CacheLayout, scripted: ScriptedServer) -> None:
    """Before anybody holds it, an errand is NotCarriedError at once."""
    with pytest.raises(NotCarriedError):
        await outcome(Courier(layout, Geometry(4096, 16384), boot_id=BOOT), scripted)
    assert scripted.requests == []


class NoTurns(FreeTurns):
    """A store that has no turn for a load."""

    def take_turn(self, who: object, urgency: int, granted: Callable[[], bool]) -> None:
        """Not now."""


async def test_a_courier_that_has_no_turns_is_not_taken_for_a_silent_one(
    courier: Courier, scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An errand that waits for a turn for too long is given up; the process has nothing to say, and lives."""
    monkeypatch.setattr(courier_module, "_SILENT_S", 0.0)
    pid = courier.pid
    given_up = await outcome(courier, scripted, NoTurns())
    assert scripted.requests == []
    scripted.answers = [[OK[:20]]]  # and then nothing
    assert given_up == await outcome(None, scripted)
    assert (courier.pid, courier.is_ready) == (pid, True)
    scripted.answers = [[OK]]
    assert await outcome(courier, scripted) == b"0123"
