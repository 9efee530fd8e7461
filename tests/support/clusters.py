"""Real daemons that form a cluster on this machine, each with an address and a cache of its own.

The addresses are 127.0.0.1, 127.0.0.2 and so on, with one free port.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.members import free_port
from tests.support.node import PATIENCE_S, DaemonNode, daemon_node


class Cluster:
    """Daemons that are nodes of one cluster, in the order of their addresses."""

    def __init__(self, nodes: Sequence[DaemonNode]) -> None:
        self.nodes = list(nodes)

    def start(self, count: int | None = None) -> None:
        """Start all (the first `count`), and return when each has all of them on its ring."""
        started = self.nodes[:count]
        for node in started:
            node.start()
        wait_until(lambda: all(ring_of(node)["nodes"] == len(started) for node in started))

    def kill(self, index: int) -> None:
        """kill -9 that daemon."""
        os.kill(self.nodes[index].status()["pid"], signal.SIGKILL)

    def counts(self) -> list[dict[str, Any]]:
        """What each node counted of its cluster."""
        return [node.status()["cluster"] for node in self.nodes]


def wait_until(condition: Callable[[], bool], *, looks: int = int(PATIENCE_S / 0.02)) -> None:
    """Return once `condition` holds, which is looked at every 20 ms; fail after so many `looks`."""
    for _ in range(looks):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it did not become so")


def ring_of(node: DaemonNode) -> dict[str, Any]:
    """The ring as that node has it: {revision, digest, nodes}."""
    ring = node.status()["cluster"]["ring"]
    assert isinstance(ring, dict)
    return ring


def health(address: str) -> dict[str, Any]:
    """The record that the node at `address` answers with."""
    with urllib.request.urlopen(f"http://{address}/healthz", timeout=5) as answer:
        record = json.loads(answer.read())
    assert isinstance(record, dict)
    return record


@contextmanager
def cluster_of(root: Path, count: int, *, cluster: Mapping[str, Any] | None = None, **tables: Any) -> Iterator[Cluster]:
    """`count` nodes below `root`; nothing runs before `start`, everything is stopped in the end."""
    port = free_port()
    addresses = [f"127.0.0.{number}:{port}" for number in range(1, count + 1)]
    with ExitStack() as stack:
        nodes = []
        for number, address in enumerate(addresses, 1):
            folder = root / f"n{number}"
            folder.mkdir()
            table = {"listen": address, **(cluster or {})}
            if "membership" not in table:
                table["nodes"] = addresses
            nodes.append(stack.enter_context(daemon_node(folder, cluster=table, **tables)))
        yield Cluster(nodes)
