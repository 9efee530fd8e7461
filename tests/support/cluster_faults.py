"""A cluster whose nodes, links, etcd and disks a test can take away in the middle of an epoch, and whose every read is
compared with what the store has.

The store is the benchmarks' origin, which counts what it is asked; it and etcd are at the network's hub.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import OriginProcess, running_origin
from synthetic import dataset_keys, expected_bytes

from orchestra.client.node import NodeClient
from orchestra.clock import SystemClock
from orchestra.errors import DaemonUnavailableError, OrchestraError
from tests.support.cluster_network import Network, network
from tests.support.clusters import Cluster, ring_of, wait_until
from tests.support.members import EtcdServer
from tests.support.node import PATIENCE_S, DaemonNode, write_config

PORT = 7420
# What nodes of a cluster by DNS look for.
NAME = "nodes.orchestra.test"
# The data of an epoch: files of one block, and files of several extents with a short last block.
SMALL_COUNT, SMALL_SIZE = 96, 20_000
LARGE_COUNT, LARGE_SIZE = 6, 700_000
BLOCK_SIZE, EXTENT_SIZE = "64KiB", "256KiB"
SIZES = dict.fromkeys(dataset_keys("small", SMALL_COUNT), SMALL_SIZE) | dict.fromkeys(
    dataset_keys("large", LARGE_COUNT), LARGE_SIZE
)
BLOCKS = SMALL_COUNT + LARGE_COUNT * -(-LARGE_SIZE // 65536)


class FaultNode(DaemonNode):
    """A node whose daemon is a child of the test, in the place that `prefix` leads to."""

    def __init__(self, config_path: Path, prefix: Sequence[str]) -> None:
        super().__init__(config_path)
        self.prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What the daemon wrote to its standard error, over all its lives."""
        return (self.config_path.parent / "stderr").read_text()

    def start(self) -> dict[str, Any]:
        """Start the daemon and return its status once it answers."""
        command = [*self.prefix, sys.executable, "-m", "orchestra", "--config", str(self.config_path), "daemon", "run"]
        with (self.config_path.parent / "stderr").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self._is_up)
        return self.status()

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log[-2000:]
        return self.is_running()

    def kill(self) -> None:
        """kill -9, and no trace of the process is left."""
        assert self._process is not None
        self._process.kill()
        assert self._process.wait(PATIENCE_S) == -signal.SIGKILL

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.resume()
        with suppress(DaemonUnavailableError):
            super().close()
        if self._process is not None:
            if self._process.poll() is None:
                self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class FaultCluster(Cluster):
    """Nodes, the network that they live in, their store, and etcd where there is one."""

    nodes: list[FaultNode]  # type: ignore[assignment]  # the same nodes, with more to them

    def __init__(
        self, nodes: Sequence[FaultNode], net: Network, store: OriginProcess, etcd: EtcdServer | None = None
    ) -> None:
        super().__init__(nodes)
        self.network = net
        self.etcd = etcd
        self._store = store

    def start(self, count: int | None = None) -> None:
        """Start all (the first `count`) beside one another; return when each has all of them on its ring."""
        started = self.nodes[:count]
        at_once(*(node.start for node in started))
        self.wait_for_ring(len(started), range(len(started)))

    def wait_for_ring(self, count: int, of: Sequence[int] | None = None) -> None:
        """Return when the nodes `of` (None: all) have rings of `count` nodes."""
        nodes = self.nodes if of is None else [self.nodes[number] for number in of]
        wait_until(lambda: all(ring_of(node)["nodes"] == count for node in nodes))

    def move(self, number: int, place: int) -> None:
        """kill -9 a node and start it at the address of another place, with its name and its cache: a pod that was made
        anew. Whoever lists addresses is told by the test."""
        node = self.nodes[number]
        before, after = (f'"{self.network.address(at)}:{PORT}"' for at in (number, place))
        node.kill()
        text = node.config_path.read_text()
        assert before in text
        node.config_path.write_text(text.replace(before, after))
        node.prefix = [*self.network.command(place), *node.prefix[len(self.network.command(number)) :]]
        node.start()

    def store_stats(self) -> dict[str, Any]:
        """What the store was asked and sent since the last `forget`."""
        return self.network.at_hub(lambda: self._store.call("/__stats", "GET"))

    def store_gets(self) -> int:
        """How many GETs of objects reached the store."""
        return int(self.store_stats()["requests"].get("GET", 0))

    def forget(self) -> None:
        """The store's counters to zero."""
        self.network.at_hub(lambda: self._store.call("/__reset"))

    def slow_store(self, latency_ms: float) -> None:
        """From now on the store's first bytes take so long."""
        self.network.at_hub(lambda: self._store.set(latency_ms=latency_ms))


def at_once(*acts: Callable[[], object]) -> None:
    """Do all of it beside one another."""
    with ThreadPoolExecutor(max(1, len(acts))) as pool:
        for doing in [pool.submit(act) for act in acts]:
            doing.result()


@contextmanager
def fault_cluster(
    root: Path,
    count: int,
    *,
    replicas: int = 2,
    passive: bool = False,
    membership: str = "static",
    hosts: Path | None = None,
    spare_places: int = 0,
    cluster: Mapping[str, Any] | None = None,
    cache_dirs: Mapping[int, Path] | None = None,
    fetch: Mapping[str, Any] | None = None,
) -> Iterator[FaultCluster]:
    """`count` nodes below `root` that mount the store at /data, and keep no copy of what they do not own unless
    `passive`. Nothing runs before `start`; everything has ended in the end, and no daemon met a bug. With `dns` they
    look for one another under NAME, as the file `hosts` has it, which is /etc/hosts for them."""
    secret = root / "secret"
    secret.write_bytes(os.urandom(32).hex().encode())
    secret.chmod(0o600)
    with ExitStack() as stack:
        net = stack.enter_context(network(count + spare_places))
        datasets = [f"small:{SMALL_COUNT}x{SMALL_SIZE}", f"large:{LARGE_COUNT}x{LARGE_SIZE}"]
        arguments = [word for dataset in datasets for word in ("--dataset", dataset)]
        store = stack.enter_context(running_origin(*arguments, "--host", net.hub_address, prefix=net.hub_command))
        addresses = [f"{net.address(number)}:{PORT}" for number in range(count)]
        etcd = stack.enter_context(_etcd(root, net)) if membership == "etcd" else None
        source: dict[str, Any] = {"nodes": addresses} if etcd is None else {"endpoints": [etcd.endpoint]}
        source = {"name": NAME} if membership == "dns" else source
        prefix = () if hosts is None else _with_hosts(hosts)
        mount = {
            **{"path": "/data", "uri": "s3://bench", "prefetch": "none", "freshness": "immutable"},
            "replication": {"min": replicas, "passive": passive},
            "options": {"endpoint_url": store.url, "key": "k", "secret": "s", "region": "us-east-1"},
        }
        nodes = []
        for number, address in enumerate(addresses):
            folder = root / f"n{number}"
            folder.mkdir()
            table = {
                **{"listen": address, "node_id": f"node-{number}", "membership": membership, **source},
                **{"secret_file": str(secret), "replicas": replicas, **(cluster or {})},
            }
            cache_dir = (cache_dirs or {}).get(number, folder / "cache")
            write_config(
                folder / "orchestra.toml",
                mounts=[mount],
                cache={"dir": str(cache_dir), "block_size": BLOCK_SIZE, "extent_size": EXTENT_SIZE},
                daemon={"autostart": False},
                fetch=fetch,
                cluster=table,
            )
            nodes.append(FaultNode(folder / "orchestra.toml", (*net.command(number), *prefix)))
        stack.callback(lambda: at_once(*(node.close for node in nodes)))
        yield FaultCluster(nodes, net, store, etcd)
    for node in nodes:
        assert "Traceback" not in node.log, node.log[-5000:]


def _with_hosts(hosts: Path) -> tuple[str, ...]:
    """What to put in front of a command that is to find this file at /etc/hosts."""
    return ("unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh")


@contextmanager
def _etcd(root: Path, net: Network) -> Iterator[EtcdServer]:
    folder = root / "etcd"
    folder.mkdir()
    server = EtcdServer(folder, net.hub_address, net.hub_command)
    net.at_hub(server.start)
    try:
        yield server
    finally:
        server.kill()


# -- epochs ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Epoch:
    """What the readers of one epoch saw. Its numbers may be read while it runs."""

    begun: int = 0
    done: int = 0
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    longest_path: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_new: threading.Condition = field(default_factory=threading.Condition)

    @property
    def in_flight(self) -> int:
        """Reads that were begun and are not done."""
        return self.begun - self.done

    def read(self, client: NodeClient, key: str) -> None:
        """Read a file, and compare every byte."""
        clock = SystemClock()
        with self._lock:
            self.begun += 1
        began_ns = clock.now_ns()
        try:
            data = client.read_file(f"/data/{key}")
            problem = "" if data == expected_bytes(key, 0, SIZES[key]) else f"{key}: wrong bytes"
        except (OrchestraError, OSError) as error:
            problem = f"{key}: {type(error).__name__}: {error}"
        took_s = (clock.now_ns() - began_ns) / 1e9
        with self._lock:
            if took_s > self.longest_s:
                self.longest_s, self.longest_path = took_s, key
            if problem:
                self.failures.append(problem)
            self.done += 1
        with self._is_new:
            self._is_new.notify_all()

    def wait_done(self, count: int) -> None:
        """Return when so many reads are done."""
        with self._is_new:
            assert self._is_new.wait_for(lambda: self.done >= count, PATIENCE_S), f"only {self.done} reads are done"


def run_epoch(
    nodes: Sequence[FaultNode],
    *,
    seed: int,
    readers: int = 2,
    at: int | None = None,
    fault: Callable[[Epoch], None] | None = None,
) -> Epoch:
    """Let `readers` threads on each of `nodes` read everything, each node every file once, in orders of their own.

    When `at` reads are done, call `fault`, with reads in flight, and go on to the end.
    """
    epoch = Epoch()
    threads = []
    for number, node in enumerate(nodes):
        order = sorted(SIZES)
        random.Random(seed * 1000 + number).shuffle(order)
        for reader in range(readers):
            client = node.client()

            def read_all(client: NodeClient = client, keys: Sequence[str] = tuple(order[reader::readers])) -> None:
                for key in keys:
                    epoch.read(client, key)

            threads.append(threading.Thread(target=read_all))
    for thread in threads:
        thread.start()
    try:
        if fault is not None:
            epoch.wait_done(len(SIZES) * len(nodes) // 2 if at is None else at)
            fault(epoch)
    finally:
        for thread in threads:
            thread.join()
    assert epoch.done == len(SIZES) * len(nodes), "something was not read"
    return epoch
