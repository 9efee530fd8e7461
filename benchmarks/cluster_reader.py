"""A training process on one node of a cluster, reduced to its reads: everything once, in an order of its own, checked.

    echo '{"config": ..., "sizes": {...}, "seed": 1, "threads": 2}' | python benchmarks/cluster_reader.py

Prints `half` when half of it is read, then one JSON object: bytes, failures, the longest read, seconds, CPU seconds.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Sequence

from synthetic import expected_bytes

from orchestra.client.node import NodeClient
from orchestra.config import load_config
from orchestra.errors import OrchestraError


class Reading:
    """What all threads read so far."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.byte_count = 0
        self.done = 0
        self.failures: list[str] = []
        self.longest_s = 0.0
        self._lock = threading.Lock()

    def read_all(self, client: NodeClient, keys: Sequence[str]) -> None:
        """Read these, each whole and compared with what the store has."""
        for key in keys:
            began = time.perf_counter()
            try:
                data = client.read_file(f"/data/{key}")
                problem = "" if data == expected_bytes(key, 0, self.sizes[key]) else f"{key}: wrong bytes"
            except (OrchestraError, OSError) as error:
                data, problem = b"", f"{key}: {error}"
            self._note(len(data), problem, time.perf_counter() - began)

    def _note(self, byte_count: int, problem: str, took_s: float) -> None:
        with self._lock:
            self.byte_count += byte_count
            self.longest_s = max(self.longest_s, took_s)
            self.failures += [problem] if problem else []
            self.done += 1
            if self.done == len(self.sizes) // 2:
                print("half", flush=True)


def main() -> None:
    """Do one work."""
    work = json.loads(sys.stdin.readline())
    reading = Reading(work["sizes"])
    order = sorted(reading.sizes)
    random.Random(work["seed"]).shuffle(order)
    config = load_config(work["config"])
    clients = [NodeClient(config) for _ in range(work["threads"])]
    threads = [
        threading.Thread(target=reading.read_all, args=(client, order[number :: len(clients)]))
        for number, client in enumerate(clients)
    ]
    began, cpu_before = time.perf_counter(), os.times()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cpu = os.times()
    answer = {
        "byte_count": reading.byte_count,
        "failures": reading.failures[:20],
        "failure_count": len(reading.failures),
        "longest_s": reading.longest_s,
        "seconds": time.perf_counter() - began,
        "cpu_s": cpu.user + cpu.system - cpu_before.user - cpu_before.system,
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
