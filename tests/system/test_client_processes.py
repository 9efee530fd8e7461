"""Clients in many processes: one fetch for all of them, hits without a message, and forks in every manner."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from orchestra.client.node import NodeClient
from orchestra.errors import OrchestraError, StaleObjectError, StoreUnavailableError
from orchestra.testing.fault_proxy import FaultProxy, Stall, Status
from orchestra.testing.s3_server import S3Server
from tests.support.cache import data_of
from tests.support.node import DaemonNode, daemon_node, folder_daemon_node
from tests.support.ram import ram_folder
from tests.support.reading import read_in_new_process, reading_process, sha256, told_by

pytestmark = pytest.mark.system

KIB = 1024
BLOCKS = {"block_size": "64KiB", "extent_size": "256KiB"}
LARGE = data_of("large", 700 * KIB)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def s3_node(tmp_path: Path, server: S3Server, proxy: FaultProxy) -> Iterator[DaemonNode]:
    """A node whose /data is a bucket behind the proxy, which logs every request."""
    mounts = [{"path": "/data", "uri": "s3://bucket/", "options": server.options_at(proxy.endpoint)}]
    with daemon_node(tmp_path, mounts=mounts, cache=BLOCKS, fetch={"deadline": "20s"}) as node:
        yield node


def asked(proxy: FaultProxy, method: str, part: str = "") -> list[str]:
    return [request.path for request in proxy.requests if request.method == method and part in request.path]


# -- single flight over processes ----------------------------------------------------------------------------------


def test_processes_that_read_one_cold_object_cost_one_get(
    s3_node: DaemonNode, server: S3Server, proxy: FaultProxy
) -> None:
    """Eight processes miss the same small object while its GET is held: one HEAD, one GET, and all have the bytes."""
    server.put("bucket", "one", b"bytes of one")
    s3_node.start()
    stall = proxy.add(Stall(), method="GET", path="/bucket/one", times=None)
    processes = [reading_process(s3_node.config_path, ["/data/one"]) for _ in range(8)]
    stall.wait_fired(60)
    status = s3_node.status
    while status()["engine"]["ensures"] < 8:
        threading.Event().wait(0.05)
    stall.release()
    assert {told_by(process)["hashes"]["/data/one"] for process in processes} == {sha256(b"bytes of one")}
    assert len(asked(proxy, "GET", "/bucket/one")) == 1
    assert len(asked(proxy, "HEAD", "/bucket/one")) == 1


def test_a_listing_of_thousands_costs_a_request_a_page(
    s3_node: DaemonNode, server: S3Server, proxy: FaultProxy
) -> None:
    """2,500 objects of a real S3 server: three LISTs, no HEAD, and every entry found without another message."""
    server.put_numbered("bucket", "many/", 2500)
    client = s3_node.client()
    view = client.list("/data/many")
    assert [entry.name for entry in view] == [f"{index:06}" for index in range(2500)]
    assert len(asked(proxy, "GET", "list-type=2")) == 3
    assert asked(proxy, "HEAD") == []
    sent = client.messages_sent
    assert {client.stat(f"/data/many/{index:06}").size_bytes for index in range(2500)} == {1}
    assert client.messages_sent == sent


# -- hits ----------------------------------------------------------------------------------------------------------


def test_a_warm_read_in_a_new_process_sends_nothing(tmp_path: Path) -> None:
    """Three hundred files of every kind, read by a process that never spoke with the daemon: not one message, by its
    own count and by the daemon's."""
    with folder_daemon_node(tmp_path, cache=BLOCKS) as (node, store):
        names = [f"{index:03}" for index in range(300)]
        for index, name in enumerate(names):
            (store / name).write_bytes(data_of(name, index * 1000))
        client = node.client()
        client.list("/data")
        client.read_many([f"/data/{name}" for name in names])
        before = node.status()
        told = read_in_new_process(node.config_path, [f"/data/{name}" for name in names])
        after = node.status()
        assert told["messages"] == 0
        assert len(told["hashes"]) == 300
        for index, name in enumerate(names):
            assert told["hashes"][f"/data/{name}"] == sha256(data_of(name, index * 1000))
        for group in ("engine", "metadata", "fetch", "stores"):
            assert after[group] == before[group]
        assert after["reads"]["hits"] == before["reads"]["hits"] + 299, "the empty file is no read"
        assert after["reads"]["misses"] == before["reads"]["misses"]


# -- the daemon dies -----------------------------------------------------------------------------------------------


def test_a_daemon_killed_while_it_fetches_costs_time_only(
    s3_node: DaemonNode, server: S3Server, proxy: FaultProxy
) -> None:
    """kill -9 with sixteen readers waiting for blocks: a successor is started, and every reader gets right bytes."""
    names = [f"k{index}" for index in range(4)]
    for name in names:
        server.put("bucket", name, LARGE[: 200 * KIB] + name.encode())
    s3_node.start()
    first = s3_node.status()["pid"]
    stall = proxy.add(Stall(), method="GET", path=r"/bucket/k\d", times=None)
    clients = [s3_node.client() for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        reading = [pool.submit(clients[index % 4].read_file, f"/data/{names[index // 4]}") for index in range(16)]
        stall.wait_fired(60)
        assert s3_node.status()["fetch"]["in_flight_bytes"] > 0
        os.kill(first, signal.SIGKILL)
        stall.release()
        for index, one in enumerate(reading):
            assert one.result(60) == LARGE[: 200 * KIB] + names[index // 4].encode()
    assert s3_node.status()["pid"] != first
    assert [clients[0].read_file(f"/data/{name}") for name in names] == [
        LARGE[: 200 * KIB] + name.encode() for name in names
    ]


def test_the_next_uri_answers_when_the_first_is_down(tmp_path: Path, server: S3Server, proxy: FaultProxy) -> None:
    """A mount with two stores of the same data reads from the second while the first fails, without an error, and
    caches it as the same."""
    for bucket in ("bucket", "spare"):
        server.put(bucket, "f/x", b"the same data")
    fault = proxy.add(Status(503), path="^/bucket", times=None)
    options = server.options_at(proxy.endpoint)
    mounts = [{"path": "/data", "uris": ["s3://bucket/f/", "s3://spare/f/"], "options": options}]
    with daemon_node(tmp_path, mounts=mounts, fetch={"deadline": "300ms"}) as node:
        client = node.client()
        assert [entry.name for entry in client.list("/data")] == ["x"]
        assert client.read_file("/data/x") == b"the same data"
        assert fault.fired > 0
        assert asked(proxy, "GET", "/spare/f/x")
        assert node.client().read_file("/data/x") == b"the same data"


# -- forks ---------------------------------------------------------------------------------------------------------


def read_and_tell(client: NodeClient, paths: list[str], pipe: Connection) -> None:
    """In a child: read, list, and tell what came of it."""
    try:
        client.list("/data")
        pipe.send(([client.read_file(path) for path in paths], client.messages_sent))
    except OrchestraError as error:
        pipe.send(error)
    client.close()


def in_child(method: str, client: NodeClient, paths: list[str]) -> tuple[list[bytes], int]:
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=read_and_tell, args=(client, paths, theirs))
    child.start()
    theirs.close()
    assert ours.poll(60), "the child does not answer"
    told = ours.recv()
    child.join(60)
    assert child.exitcode == 0
    ours.close()
    assert not isinstance(told, OrchestraError), told
    return tuple(told)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_use_the_parents_client(tmp_path: Path, method: str) -> None:
    """A client that was used goes into a child of any kind: warm files without a message, cold ones with, and the
    parent's client goes on working beside it."""
    with folder_daemon_node(tmp_path, cache=BLOCKS) as (node, store):
        (store / "warm").write_bytes(data_of("warm", 100_000))
        (store / "cold").write_bytes(data_of("cold", 100_000))
        client = node.client()
        client.list("/data")
        client.read_file("/data/warm")
        sent = client.messages_sent
        assert in_child(method, client, ["/data/warm"]) == ([data_of("warm", 100_000)], 0)
        data, messages = in_child(method, client, ["/data/cold"])
        assert (data, messages > 0) == ([data_of("cold", 100_000)], True)
        assert client.messages_sent == sent
        assert client.read_file("/data/cold") == data_of("cold", 100_000)
        assert client.stat("/data/cold", refresh=True).size_bytes == 100_000


def test_children_forked_while_threads_read(tmp_path: Path) -> None:
    """Twenty forks at arbitrary moments of eight reading threads, hits and misses among them: no child hangs on a lock
    that it inherited, and no thread of the parent gets a child's bytes."""
    with folder_daemon_node(tmp_path, cache={**BLOCKS, "size": "1MiB"}) as (node, store):
        names = [f"f{index}" for index in range(24)]
        for name in names:
            (store / name).write_bytes(data_of(name, 90_000))
        client = node.client()
        client.list("/data")
        stop = threading.Event()
        wrong: list[str] = []

        def read(first: int) -> None:
            at = first
            while not stop.is_set():
                name = names[at % 24]
                if client.read_file(f"/data/{name}") != data_of(name, 90_000):
                    wrong.append(name)
                at += 5

        with ThreadPoolExecutor(8) as pool:
            reading = [pool.submit(read, index) for index in range(8)]
            for turn in range(20):
                picked = [names[(turn + step) % 24] for step in range(3)]
                data, _ = in_child("fork", client, [f"/data/{name}" for name in picked])
                assert data == [data_of(name, 90_000) for name in picked]
            stop.set()
            for one in reading:
                one.result(60)
        assert not wrong


def test_a_handle_survives_a_fork(tmp_path: Path) -> None:
    """A file that was opened before the fork is read by parent and child, hit or miss."""
    with folder_daemon_node(tmp_path, cache=BLOCKS) as (node, store):
        (store / "large").write_bytes(LARGE)
        handle = node.client().open("/data/large")
        assert handle.read(0, 1000) == LARGE[:1000]
        pid = os.fork()
        if not pid:
            status = 1
            try:
                if handle.read(0, len(LARGE)) == LARGE:
                    status = 0
            finally:
                os._exit(status)
        assert handle.read(5, 500_000) == LARGE[5:500_005]
        assert os.waitpid(pid, 0)[1] == 0
        handle.close()


def test_readers_that_left_are_counted_and_cleared_away(tmp_path: Path) -> None:
    """What processes read without a message is known after they ended, also if they were killed; their files go."""
    with folder_daemon_node(tmp_path, cache=BLOCKS) as (node, store):
        (store / "a").write_bytes(b"x" * 1000)
        node.client().read_file("/data/a")
        before = node.status()["reads"]["hits"]
        for _ in range(3):
            read_in_new_process(node.config_path, ["/data/a"])
        assert node.status()["reads"]["hits"] == before + 3
        while len(list((node.cache_dir / "accesses").iterdir())) > 1:
            threading.Event().wait(0.05)
        assert node.status()["reads"]["hits"] == before + 3


# -- values that travel --------------------------------------------------------------------------------------------


def test_a_client_pickles_as_its_configuration(tmp_path: Path) -> None:
    """What goes to a worker is where the node is, not sockets or maps; it reads there as here."""
    with folder_daemon_node(tmp_path) as (node, store):
        (store / "a").write_bytes(b"x")
        client = node.client()
        client.read_file("/data/a")
        copy = pickle.loads(pickle.dumps(client))
        assert copy.read_file("/data/a") == b"x"
        assert copy.messages_sent == 0
        copy.close()


ERRORS: list[Callable[[], OrchestraError]] = [
    lambda: StaleObjectError("it changed"),
    lambda: StoreUnavailableError("503", retry_after_s=2.5),
]


@pytest.mark.parametrize("make", ERRORS)
def test_an_error_of_a_worker_reaches_its_parent(make: Callable[[], OrchestraError]) -> None:
    """Errors survive pickling with class, sentence and what else they carry."""
    error = make()
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.__dict__) == (type(error), str(error), error.__dict__)


def test_a_client_may_be_closed_and_used_again(tmp_path: Path) -> None:
    """Closing gives back sockets and the ring; the next call makes them anew."""
    with folder_daemon_node(tmp_path) as (node, store):
        (store / "a").write_bytes(b"x")
        client = node.client()
        for _ in range(3):
            assert client.read_file("/data/a") == b"x"
            client.stat("/data/a", refresh=True)
            client.close()
            client.close()
        rings = list((node.cache_dir / "accesses").iterdir())
        assert len(rings) <= 3


def test_many_opens_leave_no_descriptor_behind(tmp_path: Path) -> None:
    """Two thousand handles, opened, read and closed in turn, and a thousand reads: as many descriptors as before."""
    with folder_daemon_node(tmp_path, cache=BLOCKS) as (node, store):
        (store / "small").write_bytes(b"x" * 1000)
        (store / "large").write_bytes(LARGE)
        client = node.client()
        for name in ("small", "large"):
            client.read_file(f"/data/{name}")
        before = len(os.listdir("/proc/self/fd"))
        for index in range(1000):
            for name in ("small", "large"):
                handle = client.open(f"/data/{name}")
                handle.read(0, 10)
                handle.close()
            client.read_file("/data/small" if index % 2 else "/data/large", 0, 10)
        assert len(os.listdir("/proc/self/fd")) == before
