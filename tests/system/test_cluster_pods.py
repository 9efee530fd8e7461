"""Nodes as Kubernetes runs them: found by a name that resolves to all, each with another address after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.cluster_faults import NAME, SIZES, FaultCluster, fault_cluster, run_epoch
from tests.support.cluster_network import Network, can_make_namespaces
from tests.support.clusters import ring_of, wait_until

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not can_make_namespaces(), reason="a name for these nodes alone needs root and iproute2"),
]


def resolve_to(hosts: Path, network: Network, places: Sequence[int]) -> None:
    """Let the name stand for these places from now on. Written in place: the nodes see this very file."""
    hosts.write_text("".join(f"{network.address(place)} {NAME}\n" for place in places))


def digests(cluster: FaultCluster) -> set[str]:
    """The rings that the nodes have."""
    return {ring_of(node)["digest"] for node in cluster.nodes}


def test_a_pod_that_comes_again_at_another_address_is_the_same_node(tmp_path: Path) -> None:
    """Three nodes find one another by a name. One is killed and comes back at another address with its cache and its
    name: the ring is what it was, and an epoch of all three asks the store for nothing."""
    hosts = tmp_path / "hosts"
    hosts.write_text("")
    with fault_cluster(tmp_path, 3, replicas=1, membership="dns", hosts=hosts, spare_places=1) as cluster:
        resolve_to(hosts, cluster.network, [0, 1, 2])
        cluster.start()
        before = digests(cluster)
        assert len(before) == 1
        assert run_epoch(cluster.nodes, seed=1).failures == []
        assert cluster.store_stats()["body_bytes"] == sum(SIZES.values())
        resolve_to(hosts, cluster.network, [0, 1, 3])
        cluster.move(2, 3)
        moved = f"{cluster.network.address(3)}:"
        wait_until(lambda: digests(cluster) == before and all(_knows(cluster, number, moved) for number in range(3)))
        cluster.forget()
        epoch = run_epoch(cluster.nodes, seed=2)
        assert epoch.failures == []
        assert cluster.store_gets() == 0


def _knows(cluster: FaultCluster, number: int, address: str) -> bool:
    """Whether that node reaches one at `address` by now."""
    return any(node["address"].startswith(address) for node in cluster.nodes[number].status()["cluster"]["nodes"])
