"""Listings in a cluster: one LIST run per directory for all nodes, whoever is asked, and none is lost with a node."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestra.cluster.ring import RingNode, ring_of
from orchestra.errors import NotFoundError
from orchestra.metadata.reader import record_name
from tests.support.clusters import Cluster, cluster_of
from tests.support.counting_store import CountingServer, counting_server

pytestmark = pytest.mark.system

FOLDERS = [f"folder{number}" for number in range(8)]


@contextmanager
def listing_cluster(root: Path, *, freshness: str = "60s") -> Iterator[tuple[Cluster, CountingServer]]:
    """Three started daemons with one mount, /data, of eight folders in a store that counts."""
    with counting_server() as store:
        store.files = {f"{folder}/{name}": b"x" for folder in FOLDERS for name in "abc"}
        mounts = [{"path": "/data", "uri": store.url, "prefetch": "none", "freshness": freshness}]
        with cluster_of(root, 3, mounts=mounts) as cluster:
            cluster.start()
            yield cluster, store


def listed(cluster: Cluster, index: int) -> dict[str, list[str]]:
    """What every folder holds, as that node says."""
    client = cluster.nodes[index].client()
    return {folder: [entry.name for entry in client.list(f"/data/{folder}")] for folder in FOLDERS}


EXPECTED = {folder: ["a", "b", "c"] for folder in FOLDERS}


def test_three_nodes_that_list_at_the_same_time_cost_one_list_run_per_directory(tmp_path: Path) -> None:
    """Every node gets every listing; the store is asked once for each directory, by different nodes."""
    with listing_cluster(tmp_path) as (cluster, store):
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(lambda index: listed(cluster, index), range(3))) == [EXPECTED] * 3
        assert Counter(name.strip("/") for name in store.lists if name) == dict.fromkeys(FOLDERS, 1)
        counts = [node.status()["metadata"] for node in cluster.nodes]
        assert sum(one["list_runs"] for one in counts) == len(FOLDERS)
        assert sum(one["lists_from_others"] for one in counts) == 2 * len(FOLDERS)
        assert max(one["list_runs"] for one in counts) < len(FOLDERS)


def test_a_refresh_and_what_was_found_outdated_are_asked_of_the_store(tmp_path: Path) -> None:
    """A file that was added shows at once to who asks for a refresh on any node, and to the others in time."""
    with listing_cluster(tmp_path) as (cluster, store):
        assert listed(cluster, 0) == EXPECTED
        store.files["folder0/new"] = b"y"
        for node in cluster.nodes:
            names = [entry.name for entry in node.client().list("/data/folder0", refresh=True)]
            assert names == ["a", "b", "c", "new"]
        del store.files["folder0/new"]
        with pytest.raises(NotFoundError):
            cluster.nodes[1].client().stat("/data/folder0/new", refresh=True)


def test_an_owner_that_is_dead_or_stopped_costs_seconds_and_no_listing(tmp_path: Path) -> None:
    """With one node killed and one stopped by a signal the third lists everything, by itself where it must."""
    with listing_cluster(tmp_path) as (cluster, store):
        stopped = cluster.nodes[1].status()["pid"]
        cluster.kill(2)
        os.kill(stopped, signal.SIGSTOP)
        try:
            assert listed(cluster, 0) == EXPECTED
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert cluster.nodes[0].status()["metadata"]["list_runs"] == len(FOLDERS)
        assert {name.strip("/") for name in store.lists} >= set(FOLDERS)


def test_a_listing_that_takes_long_is_waited_for_and_runs_once(tmp_path: Path) -> None:
    """Longer than a question between nodes is held: the asker asks again, and the store hears of it once."""
    with listing_cluster(tmp_path) as (cluster, store):
        addresses = [node.config.cluster.listen for node in cluster.nodes if node.config.cluster is not None]
        ring = ring_of(0, [RingNode(address, 1) for address in addresses])
        (mount,) = cluster.nodes[0].status()["stores"]
        owner = ring.owners(f"l{record_name(mount['store'], 'folder3/')}".encode(), 1)[0].node_id
        asker = next(node for node, address in zip(cluster.nodes, addresses, strict=True) if address != owner)
        store.list_delay_s = 2.5
        for refresh in (False, True):
            store.lists.clear()
            assert len(asker.client().list("/data/folder3", refresh=refresh)) == 3
            assert store.lists == ["folder3/"], (refresh, store.lists)
