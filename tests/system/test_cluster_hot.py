"""Extents that many nodes read again and again: more nodes keep them, within `replication.max`, and readers spread."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestra.cli.main import main
from orchestra.cluster.heat import HOT_READS
from tests.support.clusters import Cluster, cluster_of, wait_until
from tests.support.counting_store import CountingServer, counting_server
from tests.support.node import DaemonNode

pytestmark = pytest.mark.system

BLOCK = 64 * 1024
FILES = {"large": bytes(range(256)) * 256 * 3, "small": b"small" * 1000}
SIZES = {name: len(data) for name, data in FILES.items()}
GETS = {"large": 3, "small": 1}


@contextmanager
def reading_cluster(root: Path, count: int, replication: dict[str, object]) -> Iterator[tuple[Cluster, CountingServer]]:
    """Started nodes with the mount /data, of which nobody keeps what it does not own unless it is asked to."""
    cache = {"size": "64MiB", "block_size": "64KiB", "extent_size": "256KiB"}
    with counting_server() as store:
        store.files = dict(FILES)
        mounts = [{"path": "/data", "uri": store.url, "prefetch": "none", "replication": replication}]
        with cluster_of(root, count, mounts=mounts, cache=cache) as cluster:
            cluster.start()
            yield cluster, store


def where(node: DaemonNode, name: str) -> dict[str, dict[str, Any]]:
    """What each node says that it holds of a file."""
    nodes = node.client().daemon_request("POST", "/v1/nodes/where", {"path": f"/data/{name}"})["nodes"]
    return {one["node_id"]: one for one in nodes}


def counts(node: DaemonNode, kind: str) -> dict[str, Any]:
    found = node.status()["cluster"][kind]
    assert isinstance(found, dict)
    return found


def metrics(node: DaemonNode) -> str:
    """The numbers of the node as Prometheus asks for them."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(node.status()["socket"])
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def read_all(cluster: Cluster, name: str, times: int) -> None:
    """Every node reads the file so often."""
    clients = [node.client() for node in cluster.nodes]
    for _ in range(times):
        for client in clients:
            assert client.read_file(f"/data/{name}") == FILES[name]


def test_what_is_read_often_is_kept_by_more_nodes_and_readers_spread_over_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four nodes, one owner, three holders at most: the two next nodes keep a copy by themselves, the fourth asks all
    three in turn, `stat` and `node ls` tell of it, and the store is asked for each block once."""
    with reading_cluster(tmp_path, 4, {"min": 1, "max": 3, "passive": False}) as (cluster, store):
        for done, name in enumerate(FILES, 1):
            for copies in (1, 2):
                read_all(cluster, name, int(HOT_READS))
                wait_until(partial(has_copies, cluster.nodes[0], name, copies))
            read_all(cluster, name, 2 * int(HOT_READS))  # who reads on hears of both, and no more are made
            told = where(cluster.nodes[0], name).values()
            assert sorted(one["held_bytes"] for one in told) == [0, *[SIZES[name]] * 3]
            assert sorted(one["hot_bytes"] for one in told) == [0, 0, *[SIZES[name]] * 2]
            assert all(bool(one["hot_bytes"]) != bool(one["owns_bytes"]) for one in told if one["held_bytes"])
            assert sum(counts(node, "hot")["copies_made"] for node in cluster.nodes) == 2 * done
            [reader_id] = [one["node_id"] for one in told if not one["held_bytes"]]
            wait_until(partial(is_spread, cluster.nodes[[_id(node) for node in cluster.nodes].index(reader_id)], name))
            config = str(cluster.nodes[0].config_path)
            capsys.readouterr()
            assert main(["--config", config, "stat", f"/data/{name}"]) == 0
            assert capsys.readouterr().out.count("100 % because it is read often") == 2
            assert main(["--config", config, "node", "ls", "--json"]) == 0
            assert sum(one["hot_copies"] for one in json.loads(capsys.readouterr().out)["nodes"]) == 2 * done
            assert main(["--config", config, "node", "ls"]) == 0
            assert capsys.readouterr().out.count(" hot cop") >= 2
        assert store.bytes_sent == sum(SIZES.values())
        made = [counts(node, "hot")["copies_made"] for node in cluster.nodes]
        assert f"orchestra_cluster_hot_copies_made {made[0]}\n" in metrics(cluster.nodes[0])


def has_copies(node: DaemonNode, name: str, count: int) -> bool:
    """Whether so many nodes keep the file because it is read often."""
    return sum(bool(one["hot_bytes"]) for one in where(node, name).values()) >= count


def is_spread(reader: DaemonNode, name: str) -> bool:
    """Read the file 30 times; whether each of its three holders gave about a third (on a busy machine a reader that has
    to wait asks a second one)."""
    before = {node_id: one["requests"] for node_id, one in counts(reader, "peers").items()}
    client = reader.client()
    for _ in range(30):
        assert client.read_file(f"/data/{name}") == FILES[name]
    asked = [one["requests"] - before[node_id] for node_id, one in counts(reader, "peers").items()]
    return len(asked) == 3 and all(9 * GETS[name] <= count <= 12 * GETS[name] for count in asked)


def _id(node: DaemonNode) -> str:
    return str(node.status()["cluster"]["node_id"])


def test_where_max_is_min_nothing_is_copied(tmp_path: Path) -> None:
    """However often it is read: one holder, nobody is asked to keep a copy."""
    with reading_cluster(tmp_path, 3, {"min": 1, "max": 1, "passive": False}) as (cluster, store):
        for name in FILES:
            read_all(cluster, name, 4 * int(HOT_READS))
            assert sorted(one["held_bytes"] for one in where(cluster.nodes[0], name).values()) == [0, 0, SIZES[name]]
        assert [counts(node, "hot")["copies_made"] + counts(node, "hot")["hot_extents"] for node in cluster.nodes] == [
            0,
            0,
            0,
        ]
        assert [counts(node, "shared")["from_copies"] for node in cluster.nodes] == [0, 0, 0]
        assert store.bytes_sent == sum(SIZES.values())
