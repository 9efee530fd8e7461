"""Nodes of a cluster for benchmarks: daemons at 127.0.0.1, 127.0.0.2, ..., each with a cache of its own.

Owns: settings, starting, killing, what they counted, readers beside them. Leaves to others: the store (origin.py), what
is asked (cluster.py).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contestants import clean_environment
from origin import BUCKET

from orchestra.client.process import daemon_status
from orchestra.config import load_config

HERE = Path(__file__).resolve().parent
START_TIMEOUT_S = 60.0
READER_TIMEOUT_S = 300.0


class BenchNodes:
    """`count` nodes below `folder` that mount the origin's bucket at /data. `replicas` None: each alone."""

    def __init__(
        self, folder: Path, origin_url: str, count: int, *, replicas: int | None, passive: bool = True
    ) -> None:
        self.configs: list[Path] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir()
        self.secret = folder / "secret"
        self.secret.write_text(os.urandom(32).hex())
        self.secret.chmod(0o600)
        port = _free_port()
        self.addresses = [f"127.0.0.{number}:{port}" for number in range(1, count + 1)]
        self.names = [f"node-{number}" for number in range(1, count + 1)]
        for number, address in enumerate(self.addresses, 1):
            path = folder / f"n{number}" / "orchestra.toml"
            path.parent.mkdir()
            lines = ["[cache]", f'dir = "{path.parent}/cache"', 'size = "8GiB"', "free_space_ratio = 0.0"]
            lines += ["[daemon]", "autostart = false"]
            if replicas is not None:
                lines += ["[cluster]", f'listen = "{address}"', f'node_id = "node-{number}"']
                lines += [f"nodes = {json.dumps(self.addresses)}"]
                lines += [f'secret_file = "{self.secret}"', f"replicas = {replicas}"]
            lines += ["[[mount]]", 'path = "/data"', f'uri = "s3://{BUCKET}"', 'prefetch = "none"']
            lines += ['freshness = "immutable"']
            if replicas is not None:
                lines += [f"replication = {{ passive = {str(passive).lower()} }}"]
            lines += [f'options = {{ endpoint_url = "{origin_url}", key = "k", secret = "s", region = "us-east-1" }}']
            path.write_text("\n".join(lines) + "\n")
            path.chmod(0o600)
            self.configs.append(path)
        self.is_cluster = replicas is not None

    def __enter__(self) -> BenchNodes:
        for config in self.configs:
            command = [sys.executable, "-m", "orchestra", "--config", str(config), "daemon", "run"]
            with (config.parent / "stderr").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=clean_environment())
                )
        deadline = time.perf_counter() + START_TIMEOUT_S
        while not self._are_up():
            if time.perf_counter() > deadline:
                raise SystemExit(f"the nodes did not find one another: see {self.configs[0].parent}/stderr")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _are_up(self) -> bool:
        for config, process in zip(self.configs, self._processes, strict=True):
            if process.poll() is not None:
                raise SystemExit(f"a node ended: {(config.parent / 'stderr').read_text()[-500:]}")
        statuses = [daemon_status(load_config(config)) for config in self.configs]
        if not self.is_cluster:
            return all(status is not None for status in statuses)
        return all(status is not None and status["cluster"]["ring"]["nodes"] == len(statuses) for status in statuses)

    def counts(self, number: int) -> dict[str, Any]:
        """What a node counted of fetching in the cluster."""
        status = daemon_status(load_config(self.configs[number]))
        assert status is not None, "the node runs"
        return dict(status["cluster"]["shared"])

    def peers(self, number: int) -> dict[str, Any]:
        """What a node counted of each other node."""
        status = daemon_status(load_config(self.configs[number]))
        assert status is not None, "the node runs"
        return dict(status["cluster"]["peers"])

    def pid(self, number: int) -> int:
        """A node's daemon."""
        return self._processes[number].pid

    def kill(self, number: int) -> None:
        """kill -9."""
        self._processes[number].kill()
        self._processes[number].wait()


class Reader:
    """A reader process beside one node, at work."""

    def __init__(self, config: Path, sizes: Mapping[str, int], seed: int, threads: int = 2) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "cluster_reader.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        assert self._process.stdin is not None
        work = {"config": str(config), "sizes": dict(sizes), "seed": seed, "threads": threads}
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.close()

    def wait_half(self) -> None:
        """Return when half of it is read."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if line != "half":
            raise SystemExit(f"a reader said {line!r} instead of half")

    def result(self) -> dict[str, Any]:
        """Wait for the end, and return what it says."""
        assert self._process.stdout is not None
        lines = self._process.stdout.read().splitlines()
        if self._process.wait(READER_TIMEOUT_S) or not lines:
            raise SystemExit("a reader failed")
        return dict(json.loads(lines[-1]))


def read_everywhere(configs: Sequence[Path], sizes: Mapping[str, int], seed: int) -> list[dict[str, Any]]:
    """Let a reader beside each node read everything, each in an order of its own, all at the same time. Every byte is
    compared; ends with a sentence if one is wrong."""
    readers = [Reader(config, sizes, seed * 100 + number) for number, config in enumerate(configs)]
    results = [reader.result() for reader in readers]
    for result in results:
        if result["failure_count"] or result["byte_count"] != sum(sizes.values()):
            raise SystemExit(f"a read failed: {result['failures'][:3]}")
    return results


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
