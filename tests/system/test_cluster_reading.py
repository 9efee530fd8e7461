"""Blocks between nodes: each leaves the store once for the cluster, and every byte that a reader gets is right."""

from __future__ import annotations

import random
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import pytest

from orchestra.errors import OrchestraError
from tests.support.clusters import Cluster, cluster_of, ring_of, wait_until
from tests.support.counting_store import CountingServer, counting_server
from tests.support.node import DaemonNode

pytestmark = pytest.mark.system

BLOCK = 64 * 1024
SMALL, LARGE = 24, 3
LARGE_BYTES = 10 * BLOCK + 17


@contextmanager
def cluster_over_a_store(
    root: Path, count: int, *, started: int | None = None, **tables: object
) -> Iterator[tuple[Cluster, CountingServer]]:
    """`count` nodes with one mount, /data, of a web server that counts; all of them run, or the first `started`."""
    with counting_server() as store:
        draw = random.Random(5)
        for number in range(SMALL):
            store.files[f"small/{number:03}"] = draw.randbytes(1 + draw.randrange(BLOCK))
        for number in range(LARGE):
            store.files[f"large/{number}"] = draw.randbytes(LARGE_BYTES)
        cache = {"size": "256MiB", "block_size": "64KiB", "extent_size": "256KiB"}
        mounts = [{"path": "/data", "uri": store.url, "prefetch": "none"}]
        with cluster_of(root, count, mounts=mounts, cache=cache, **tables) as cluster:  # type: ignore[arg-type]
            cluster.start(started)
            yield cluster, store


def read_all(
    cluster: Cluster, index: int, store: CountingServer, seed: int, after: Callable[[int], object] = lambda _: None
) -> int:
    """Read every file at that node, in an order of its own, and compare every byte; returns how many bytes there were.
    `after` hears how many files were read."""
    client = cluster.nodes[index].client()
    paths = list(store.files)
    random.Random(seed).shuffle(paths)
    total = 0
    for count, path in enumerate(paths):
        after(count)
        data = client.read_file(f"/data/{path}")
        assert data == store.files[path], f"node {index} has other bytes of {path}"
        total += len(data)
    return total


def blocks_of(store: CountingServer) -> int:
    return sum(-(-len(data) // BLOCK) for data in store.files.values())


def test_three_nodes_that_read_everything_at_once_cost_one_get_a_block(tmp_path: Path) -> None:
    """Three cold nodes read the same files at the same time, each in its own order: the store is asked for each byte
    once, and for nothing in the second epoch."""
    with cluster_over_a_store(tmp_path, 3) as (cluster, store):
        with ThreadPoolExecutor(3) as readers:
            totals = list(readers.map(lambda index: read_all(cluster, index, store, index), range(3)))
        size = sum(map(len, store.files.values()))
        assert totals == [size] * 3
        assert store.bytes_sent == size
        counted = [counts["shared"] for counts in cluster.counts()]
        assert sum(count["from_peers_bytes"] for count in counted) == 2 * size
        assert all(count["from_peers"] for count in counted), "each node got blocks of another"
        assert sum(count["fallbacks"] for count in counted) == 0
        for index in range(3):
            read_all(cluster, index, store, 100 + index)
        assert store.bytes_sent == size


def test_a_dead_nodes_blocks_come_from_its_replica(tmp_path: Path) -> None:
    """One node reads everything with two replicas; the other owners get their copies by themselves. After kill -9 of
    one of them a node that read nothing reads everything, and the store is asked for not one byte; what it waits for
    are peers."""
    with cluster_over_a_store(tmp_path, 3, cluster={"replicas": 2}) as (cluster, store):
        read_all(cluster, 0, store, 1)
        parts = sum(counts["shared"]["from_store"] for counts in cluster.counts())
        assert store.bytes_sent == sum(map(len, store.files.values()))
        wait_until(lambda: sum(counts["replicas"]["kept"] for counts in cluster.counts()) == parts)
        assert store.bytes_sent == sum(map(len, store.files.values()))
        cluster.kill(2)
        read_all(cluster, 1, store, 2)
        assert store.bytes_sent == sum(map(len, store.files.values()))
        assert cluster.nodes[1].status()["cluster"]["shared"]["from_peers"]
        waits = cluster.nodes[1].client().daemon_request("GET", "/v1/stalls")["figures"]["waits"]
        assert waits["peer_s"] > 0
        assert waits["store_s"] == 0


def test_a_node_that_joins_gets_what_it_owns_from_who_had_it(tmp_path: Path) -> None:
    """Two of three nodes have read everything when the third starts: it reads everything, much of it as the owner, and
    the store is asked for nothing more."""
    with cluster_over_a_store(tmp_path, 3, started=2) as (cluster, store):
        read_all(cluster, 0, store, 1)
        sent = store.bytes_sent
        cluster.start()
        read_all(cluster, 2, store, 2)
        assert store.bytes_sent == sent
        assert cluster.nodes[2].status()["cluster"]["shared"]["from_holders"]


def test_a_node_that_is_killed_in_mid_epoch_costs_no_read(tmp_path: Path) -> None:
    """kill -9 of one of three nodes with two replicas, while the two others read: every byte is right, no read fails,
    and who asked the dead node counted why it got nothing."""
    with cluster_over_a_store(tmp_path, 3, cluster={"replicas": 2}) as (cluster, store):
        half = (SMALL + LARGE) // 2
        meeting = Barrier(2, action=lambda: cluster.kill(2))

        def read(index: int) -> int:
            return read_all(cluster, index, store, index, lambda count: meeting.wait(60) if count == half else None)

        with ThreadPoolExecutor(2) as readers:
            totals = list(readers.map(read, range(2)))
        assert totals == [sum(map(len, store.files.values()))] * 2
        dead = cluster.nodes[2].config.cluster
        assert dead is not None
        causes = [node.status()["cluster"]["peers"][dead.listen]["failures"] for node in cluster.nodes[:2]]
        assert sum(count for found in causes for count in found.values()) > 0, causes


def test_with_a_secret_bytes_go_to_who_has_it_and_to_nobody_else(tmp_path: Path) -> None:
    """Two nodes with one secret share blocks; a request without a proof is refused, and a node with another secret
    gets nothing and reads the store: every byte is right all the same."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    secret.chmod(0o600)
    with cluster_over_a_store(tmp_path, 2, cluster={"secret_file": str(secret)}) as (cluster, store):
        read_all(cluster, 0, store, 1)
        size = store.bytes_sent
        read_all(cluster, 1, store, 2)
        assert store.bytes_sent == size
        listen = cluster.counts()[0]["node_id"]
        for request in (f"http://{listen}/v1/peer/extents/{'0' * 32}/0?size=1", f"http://{listen}/v1/node/status"):
            with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
                urllib.request.urlopen(request, timeout=5)
        other = tmp_path / "other"
        other.write_text("another secret, of another cluster")
        other.chmod(0o600)
        node = cluster.nodes[1]
        node.stop()
        text = node.config_path.read_text().replace(str(secret), str(other)).replace("/n2/cache", "/n2/cache2")
        node.config_path.write_text(text)
        stranger = DaemonNode(node.config_path)
        try:
            stranger.start()
            wait_until(lambda: ring_of(stranger)["nodes"] == 2)
            client = stranger.client()
            assert all(client.read_file(f"/data/{path}") == data for path, data in store.files.items())
            counts = stranger.status()["cluster"]
            assert counts["peers"][listen]["failures"]["refused"] > 0
            assert counts["shared"]["fallbacks"] > 0
            assert counts["shared"]["from_peers"] == 0
        finally:
            stranger.close()


def test_ufs_fallback_fail_keeps_readers_off_the_store(tmp_path: Path) -> None:
    """With `fail` and the only owner dead, what it owns cannot be read: one line that names the setting; what the
    living node owns can."""
    with cluster_over_a_store(tmp_path, 2, cluster={"ufs_fallback": "fail"}) as (cluster, store):
        client = cluster.nodes[0].client()
        entries = [client.stat(f"/data/{path}") for path in store.files]
        cluster.kill(1)
        outcomes = []
        for entry in entries:
            try:
                outcomes.append(client.read_file(entry.path) == store.files[entry.path.removeprefix("/data/")])
            except OrchestraError as error:
                assert "cluster.ufs_fallback is fail" in str(error)
                outcomes.append(False)
        assert {True, False} == set(outcomes)


def test_a_data_set_larger_than_any_node_fits_the_cluster(tmp_path: Path) -> None:
    """Two nodes with room for 85 % of the files each, and each reads all of them, twice: copies of the other's files
    leave for what a node owns, so the store is asked for each byte once."""
    draw = random.Random(7)
    files = {f"{number:03}": draw.randbytes(BLOCK // 2 + draw.randrange(BLOCK // 2)) for number in range(80)}
    room = f"{int(sum(map(len, files.values())) * 0.85) // 1024}KiB"
    cache = {"size": room, "block_size": "64KiB", "extent_size": "256KiB"}
    with counting_server() as store:
        store.files |= files
        mounts = [{"path": "/data", "uri": store.url, "prefetch": "none"}]
        with cluster_of(tmp_path, 2, mounts=mounts, cache=cache) as cluster:
            cluster.start()
            for epoch in range(2):
                for index in range(2):
                    read_all(cluster, index, store, 10 * epoch + index)
            assert store.bytes_sent == sum(map(len, files.values()))


def test_a_restarted_node_knows_its_copies(tmp_path: Path) -> None:
    """Two nodes with room for 85 % of the files each have both read 80 % of them, and are started again: each finds the
    other's files among its own, and lets them go for what it owns of the rest. The store is asked for each byte
    once."""
    draw = random.Random(9)
    files = {f"{number:03}": draw.randbytes(BLOCK // 2 + draw.randrange(BLOCK // 2)) for number in range(80)}
    room = f"{int(sum(map(len, files.values())) * 0.85) // 1024}KiB"
    cache = {"size": room, "block_size": "64KiB", "extent_size": "256KiB", "eviction": "never"}
    with counting_server() as store:
        store.files |= {name: files[name] for name in sorted(files)[:64]}
        mounts = [{"path": "/data", "uri": store.url, "prefetch": "none", "freshness": "strict"}]
        with cluster_of(tmp_path, 2, mounts=mounts, cache=cache) as cluster:
            cluster.start()
            for index in range(2):
                read_all(cluster, index, store, index)
            for node in cluster.nodes:
                node.stop()
            cluster.start()
            wait_until(lambda: all(counts["marks"]["copies_found"] for counts in cluster.counts()))
            store.files |= files
            for epoch in range(2):
                for index in range(2):
                    read_all(cluster, index, store, 10 * epoch + index)
            assert store.bytes_sent == sum(map(len, files.values()))
