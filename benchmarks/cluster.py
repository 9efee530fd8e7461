"""What does a cluster cost the store, the network and a reader whose neighbour dies?

    python benchmarks/cluster.py [--quick] [--record] [--part epochs,peers,kill]

Four nodes on loopback, each a daemon with a cache of its own, prove a shared secret to one another; beside each a
reader process reads everything, in an order of its own, and compares every byte.

epochs: what leaves the store and what goes between nodes, against four nodes that know nothing of one another.
peers: blocks of 4 MiB against sendfile of the same files over as many connections; small objects in batches against
one after the other. kill: a node is killed when half of a warm epoch is read.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster_nodes import HERE, BenchNodes, Reader, read_everywhere
from cluster_raw import REQUEST
from common import (
    OriginProcess,
    common_arguments,
    machine_state,
    publish,
    refuse_a_busy_machine,
    running_origin,
    verdict,
    workspace,
)
from contestants import clean_environment, cpu_seconds
from synthetic import dataset_keys, expected_bytes

from orchestra.blocks.layout import CacheLayout
from orchestra.client.node import NodeClient
from orchestra.clock import SystemClock
from orchestra.cluster.peer_client import STALL_TIMEOUT_S, PeerClient
from orchestra.cluster.peer_wire import ExtentPart
from orchestra.cluster.proof import ProofSigner, read_secret
from orchestra.config import BLOCK_SIZE_BYTES, load_config
from orchestra.units import GIB, MIB
from orchestra.values import ByteRange, ObjectId

NODES = 4
SMALL_SIZE = 50_000
LARGE_SIZE = 16 * MIB
TINY_SIZE = 10_000
# Requests in flight between two nodes, on both sides of each comparison.
CONNECTIONS = 4
# Always the same: the store's address is in every object's name, so each run places everything alike.
ORIGIN_PORT = "39471"
STORE_RATIO_MAX = 1.02
PEER_RATIO_MIN = 0.7
BATCH_RATIO_MIN = 10.0


def at_most(name: str, reached: float, limit: float) -> str:
    """Return a line that says whether a figure stayed below its limit."""
    return f"- {name}: **{reached:.3g}** (at most {limit:.3g}) {'reached' if reached <= limit else 'NOT REACHED'}"


class Dataset:
    """Objects of the origin: their sizes by key."""

    def __init__(self, quick: bool) -> None:
        self.counts = {"small": 200 if quick else 1500, "large": 3 if quick else 12, "tiny": 300 if quick else 2000}
        self.size_of = {"small": SMALL_SIZE, "large": LARGE_SIZE, "tiny": TINY_SIZE}

    def arguments(self) -> list[str]:
        """What the origin is to be told."""
        words = [f"{name}:{count}x{self.size_of[name]}" for name, count in self.counts.items()]
        return [word for one in words for word in ("--dataset", one)]

    def sizes(self, *names: str) -> dict[str, int]:
        """The objects of these parts."""
        return {key: self.size_of[name] for name in names for key in dataset_keys(name, self.counts[name])}


def body_bytes(origin: OriginProcess) -> int:
    """What the store sent of objects since the last look; the counters are set to zero."""
    count = int(origin.call("/__stats", "GET")["body_bytes"])
    origin.call("/__reset")
    return count


# -- epochs ----------------------------------------------------------------------------------------------------------


def bench_epochs(folder: Path, origin: OriginProcess, dataset: Dataset) -> list[str]:
    """Epochs of four nodes, with and without a cluster."""
    small, everything = dataset.sizes("small"), dataset.sizes("small", "large")
    total = sum(everything.values())
    with BenchNodes(folder / "alone", origin.url, NODES, replicas=None) as nodes:
        body_bytes(origin)
        read_everywhere(nodes.configs, everything, 1)
        alone = body_bytes(origin) / total
    with BenchNodes(folder / "cluster", origin.url, NODES, replicas=1) as nodes:
        began = time.perf_counter()
        read_everywhere(nodes.configs, small, 1)
        owned = [nodes.counts(number)["from_store"] for number in range(NODES)]
        first_results = read_everywhere(nodes.configs, dataset.sizes("large"), 2)
        took_s = time.perf_counter() - began
        first = body_bytes(origin) / total
        network = sum(nodes.counts(number)["from_peers_bytes"] for number in range(NODES)) / total
        warm = read_everywhere(nodes.configs, everything, 3)
        second = body_bytes(origin) / total
    fair = len(small) / NODES
    allowed = 1 + math.sqrt(2 * math.log(NODES) / fair)
    return [
        f"Epochs: {len(everything)} objects, {total / MIB:.0f} MiB; {NODES} nodes read everything, each byte compared. "
        f"Epoch 1 took {took_s:.1f} s, epoch 2 {max(one['seconds'] for one in warm):.1f} s; longest read of epoch 1's "
        f"large objects {max(one['longest_s'] for one in first_results):.2f} s.",
        "",
        f"- without a cluster: the store sends {alone:.2f} data sets",
        at_most("epoch 1: bytes from the store / data set", first, STORE_RATIO_MAX),
        at_most("epoch 2: bytes from the store / data set", second, 0.0),
        f"- between nodes: {network:.2f} data sets ({NODES - 1:.2f} is the least where every node keeps everything)",
        at_most(
            f"fullest node / its fair share of {len(small)} small objects (owned: {' '.join(map(str, owned))}); "
            f"1 + sqrt(2 ln n / {fair:.0f}) and 2 %",
            max(owned) / (sum(owned) / NODES),
            allowed + 0.02,
        ),
    ]


# -- reads between two nodes -----------------------------------------------------------------------------------------


def parts_of(client: NodeClient, sizes: Mapping[str, int]) -> list[ExtentPart]:
    """What a node would ask another for: each block of each object (all in one extent)."""
    parts = []
    for key, size in sizes.items():
        path = f"/data/{key}"
        object_id = ObjectId(client.store_of(path), key, client.stat(path).version)
        for start in range(0, size, BLOCK_SIZE_BYTES):
            wanted = ByteRange(start, min(size, start + BLOCK_SIZE_BYTES))
            parts.append(ExtentPart(object_id, object_id.digest(), size, 0, wanted))
    return parts


class PeerReads:
    """Asks a node as another node would, with proof and checksums."""

    def __init__(self, address: str, node_id: str, secret: Path) -> None:
        signer = ProofSigner(read_secret(secret), "benchmark", SystemClock())

        def prove(method: str, target: str, range_header: str, body: bytes) -> Mapping[str, str]:
            return signer.headers(method, target, node_id, byte_range=range_header, body=body)

        self.client = PeerClient(address, prove, block_size_bytes=BLOCK_SIZE_BYTES, requests_max=CONNECTIONS)

    async def alone(self, parts: Sequence[ExtentPart], at_once: int) -> None:
        """Each in a request of its own, so many at a time."""
        left = iter(parts)

        async def work() -> None:
            for part in left:
                data = await self.client.fetch_alone(part)
                assert len(data) == part.file_range.length

        await asyncio.gather(*(work() for _ in range(at_once)))

    async def batched(self, parts: Sequence[ExtentPart]) -> None:
        """As a node asks for what many readers miss at one moment; what came is let go of at once, as by `alone`."""

        async def work(part: ExtentPart) -> None:
            data = await self.client.fetch(part)
            assert len(data) == part.size_bytes

        await asyncio.gather(*map(work, parts))

    async def check(self, parts: Sequence[ExtentPart]) -> None:
        """Compare some with what the store has."""
        for part in parts[:: max(1, len(parts) // 16)]:
            key, span = part.object_id.key, part.file_range
            for data in (await self.client.fetch(part), await self.client.fetch_alone(part)):
                if bytes(data) != expected_bytes(key, span.start, span.stop):
                    raise SystemExit(f"wrong bytes of {key}")


class RawReads:
    """Reads the same blocks of the same files from cluster_raw.py, a thread for each connection."""

    def __init__(self, files: Sequence[str]) -> None:
        command = [sys.executable, str(HERE / "cluster_raw.py"), *files]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment())
        assert self.process.stdout is not None
        port = int(self.process.stdout.readline())
        self._connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]

    def read(self, requests: Sequence[tuple[int, int, int]]) -> None:
        """Read them all."""
        threads = [
            threading.Thread(target=self._work, args=(connection, requests[number::CONNECTIONS]))
            for number, connection in enumerate(self._connections)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @staticmethod
    def _work(connection: socket.socket, requests: Sequence[tuple[int, int, int]]) -> None:
        buffer = bytearray(BLOCK_SIZE_BYTES)
        for number, offset, length in requests:
            connection.sendall(REQUEST.pack(number, offset, length))
            left = memoryview(buffer)[:length]
            while left:
                left = left[connection.recv_into(left) :]

    def close(self) -> None:
        """End it."""
        for connection in self._connections:
            connection.close()
        self.process.kill()
        self.process.wait()


def timed(act: Callable[[], object], pid: int) -> tuple[float, float]:
    """Do it; return seconds, and CPU seconds of both sides."""
    before, cpu_before = time.perf_counter(), cpu_seconds([pid]) + time.process_time()
    act()
    return time.perf_counter() - before, cpu_seconds([pid]) + time.process_time() - cpu_before


def bench_peers(folder: Path, origin: OriginProcess, dataset: Dataset, turns: int, quick: bool) -> list[str]:
    """One node that holds everything, asked as another node asks it."""
    with BenchNodes(folder / "peers", origin.url, 1, replicas=1) as nodes:
        config = load_config(nodes.configs[0])
        read_everywhere(nodes.configs, dataset.sizes("large", "tiny"), 1)
        client = NodeClient(config)
        large, tiny = (parts_of(client, dataset.sizes(name)) for name in ("large", "tiny"))
        client.close()
        layout = CacheLayout(config.cache.dir)
        digests = list(dict.fromkeys(part.digest for part in large))
        raw = RawReads([layout.extent_file(digest, 0) for digest in digests])
        rounds = 2 if quick else 8
        with asyncio.Runner() as runner:
            peer = PeerReads(nodes.addresses[0], nodes.names[0], nodes.secret)
            runner.run(peer.check([*large, *tiny]))
            pid = nodes.pid(0)
            requests = [(digests.index(p.digest), p.file_range.start, p.file_range.length) for p in large] * rounds

            def by_peer() -> tuple[float, float]:
                return timed(lambda: runner.run(peer.alone(large * rounds, CONNECTIONS)), pid)

            def by_sendfile() -> tuple[float, float]:
                return timed(lambda: raw.read(requests), raw.process.pid)

            blocks = _turns({"peer": by_peer, "sendfile": by_sendfile}, turns)
            few, many = tiny[:: max(1, len(tiny) // 1000)], tiny * 3
            objects = _turns(
                {
                    "batches": lambda: timed(lambda: runner.run(peer.batched(many)), pid),
                    "one by one": lambda: timed(lambda: runner.run(peer.alone(few, 1)), pid),
                    f"{CONNECTIONS} at a time": lambda: timed(lambda: runner.run(peer.alone(few, CONNECTIONS)), pid),
                },
                turns,
            )
            peer.client.close_idle()
        raw.close()
    gib = sum(length for _, _, length in requests) / GIB
    counts = {"batches": len(many), "one by one": len(few), f"{CONNECTIONS} at a time": len(few)}
    return [*_block_lines(blocks, gib), "", *_object_lines(objects, counts)]


def _turns(ways: Mapping[str, Callable[[], tuple[float, float]]], turns: int) -> dict[str, list[tuple[float, float]]]:
    """Let each way have its turns, forwards and then backwards."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in ways if turn % 2 == 0 else reversed(list(ways)):
            taken[name].append(ways[name]())
            print(f"  {name}: {taken[name][-1][0]:.3f} s", file=sys.stderr)
    return taken


def _block_lines(blocks: Mapping[str, Sequence[tuple[float, float]]], gib: float) -> list[str]:
    seconds = {name: statistics.median(one for one, _ in turns) for name, turns in blocks.items()}
    cpu = {name: statistics.median(one for _, one in turns) / gib for name, turns in blocks.items()}
    rows = [
        f"| {name} | {gib / seconds[name]:.2f} | {' '.join(f'{gib / one:.2f}' for one, _ in blocks[name])} "
        f"| {cpu[name]:.2f} |"
        for name in blocks
    ]
    return [
        f"Blocks of 4 MiB over {CONNECTIONS} connections, {gib:.1f} GiB a turn, page cache warm:",
        "",
        "| | GiB/s | turns | CPU s/GiB, both sides |",
        "|---|---:|---|---:|",
        *rows,
        "",
        verdict("peer read / sendfile", seconds["sendfile"] / seconds["peer"], PEER_RATIO_MIN),
    ]


def _object_lines(objects: Mapping[str, Sequence[tuple[float, float]]], counts: Mapping[str, int]) -> list[str]:
    rates = {name: counts[name] / statistics.median(one for one, _ in turns) for name, turns in objects.items()}
    rows = [
        f"| {name} | {rates[name]:.0f} | {' '.join(f'{counts[name] / one:.0f}' for one, _ in objects[name])} "
        f"| {statistics.median(one for _, one in objects[name]) / counts[name] * 1e6:.0f} |"
        for name in objects
    ]
    return [
        f"Objects of {TINY_SIZE // 1000} kB:",
        "",
        "| | objects/s | turns | CPU us/object, both sides |",
        "|---|---:|---|---:|",
        *rows,
        "",
        verdict("batches / one by one", rates["batches"] / rates["one by one"], BATCH_RATIO_MIN),
    ]


# -- a node is killed ------------------------------------------------------------------------------------------------


def bench_kill(folder: Path, origin: OriginProcess, dataset: Dataset) -> list[str]:
    """Two owners of each extent and no other copies: half of all reads go to another node, and one node is killed."""
    everything = dataset.sizes("small", "large")
    with BenchNodes(folder / "kill", origin.url, NODES, replicas=2, passive=False) as nodes:
        read_everywhere(nodes.configs, everything, 1)
        body_bytes(origin)
        origin.call("/__reset")
        before = _failures(nodes)
        readers = [Reader(config, everything, 200 + number) for number, config in enumerate(nodes.configs[:-1])]
        for reader in readers[:1]:
            reader.wait_half()
        nodes.kill(NODES - 1)
        results = [reader.result() for reader in readers]
        gets = int(origin.call("/__stats", "GET")["requests"].get("GET", 0))
        met = _failures(nodes) - before
    limit_s = STALL_TIMEOUT_S + 1.0
    if met == 0:
        raise SystemExit("nobody met the killed node: nothing was measured")
    return [
        f"kill -9 of one of {NODES} nodes when half of a warm epoch is read; 2 owners, no other copies; the others "
        f"asked it in vain, or left it alone, {met} times:",
        "",
        at_most("failed or wrong reads", sum(one["failure_count"] for one in results), 0),
        at_most("reads of the store (a replica holds all of it)", gets, 0),
        at_most("longest read, s", max(one["longest_s"] for one in results), limit_s),
    ]


def _failures(nodes: BenchNodes) -> int:
    """How often the nodes but the last asked it in vain, or left it alone for that."""
    counts = [nodes.peers(number).get(nodes.names[-1], {}) for number in range(NODES - 1)]
    troubles = (int(one.get("skipped", 0)) + int(one.get("hedged", 0)) for one in counts)
    return sum(troubles) + sum(sum(one.get("failures", {}).values()) for one in counts)


def main() -> None:
    """Run the parts that were asked for."""
    parser = common_arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", default="epochs,peers,kill", help="which (default: all)")
    options = parser.parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state = machine_state()
    dataset = Dataset(options.quick)
    lines: list[str] = []
    with workspace() as folder, running_origin(*dataset.arguments(), "--port", ORIGIN_PORT) as origin:
        parts: dict[str, Callable[[], list[str]]] = {
            "epochs": lambda: bench_epochs(folder, origin, dataset),
            "peers": lambda: bench_peers(folder, origin, dataset, 2 if options.quick else options.turns, options.quick),
            "kill": lambda: bench_kill(folder, origin, dataset),
        }
        for name in options.part.split(","):
            if name not in parts:
                parser.error(f"--part {name}: expected some of {', '.join(parts)}")
            lines += ([""] if lines else []) + parts[name]()
    publish("A cluster of four nodes", lines, options, state)


if __name__ == "__main__":
    main()
