"""Nodes, links, disks and etcd that fail in the middle of an epoch: every read goes on, every byte is right.

Each test proves that its fault struck while reads were in flight, and does it once with everything cached (where the
store must not be asked again) and once with nothing (where it must be asked for what is needed, and no more).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from orchestra.cli.main import main
from tests.support.cluster_faults import (
    BLOCKS,
    SIZES,
    Epoch,
    FaultCluster,
    FaultNode,
    at_once,
    fault_cluster,
    run_epoch,
)
from tests.support.cluster_network import Loopback, can_make_namespaces
from tests.support.clusters import wait_until

pytestmark = pytest.mark.system

DATASET_BYTES = sum(SIZES.values())
READS = len(SIZES)
# The node that things happen to; the others read.
VICTIM = 3
# The victim's cache lies on a disk of its own, with room for all that it owns and what a daemon keeps beside it.
DISK_BYTES = 24 * 1024 * 1024


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    """Four nodes of a list, two owners of each extent, no passive copies: half of all reads go to another node."""
    root = tmp_path_factory.mktemp("faults")
    disk = root / "disk"
    disk.mkdir()
    is_mounted = _mount_disk(disk)
    try:
        with fault_cluster(root, 4, cache_dirs={VICTIM: disk / "cache"}) as made:
            made.start()
            yield made
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def _mount_disk(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0755", "orchestra-test", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def warm(cluster: FaultCluster) -> None:
    """All nodes whole again, and each extent at both of its owners."""
    cluster.wait_for_ring(4)
    epoch = run_epoch(cluster.nodes, seed=1)
    assert epoch.failures == []


def empty(cluster: FaultCluster) -> None:
    """All nodes whole again, and nothing cached anywhere."""
    cluster.wait_for_ring(4)
    for node in cluster.nodes:
        assert main(["--config", str(node.config_path), "free", "--force", "/"]) == 0


def others(cluster: FaultCluster) -> list[FaultNode]:
    return cluster.nodes[:VICTIM]


def troubles(cluster: FaultCluster) -> int:
    """How often the nodes but the victim failed to get something of it, left it alone for that, or lost patience."""
    victim = f"node-{VICTIM}"
    counts = [node.status()["cluster"]["peers"].get(victim) for node in others(cluster)]
    return sum(one["skipped"] + one["hedged"] + sum(one["failures"].values()) for one in counts if one)


class Struck:
    """A fault that is put on in mid-epoch, and what was going on at that moment."""

    def __init__(self) -> None:
        self.in_flight = 0

    def when(self, epoch: Epoch, act: object) -> None:
        assert callable(act)
        self.in_flight = epoch.in_flight
        act()


def check_epoch(cluster: FaultCluster, is_warm: bool, act: object) -> None:
    """Read everything at the nodes but the victim, do `act` in the middle: no read fails, every byte is right, the
    fault was met, and the store was asked no more than it had to be."""
    (warm if is_warm else empty)(cluster)
    cluster.forget()
    before, struck = troubles(cluster), Struck()
    epoch = run_epoch(others(cluster), seed=2, at=READS, fault=lambda running: struck.when(running, act))
    assert epoch.failures == []
    assert epoch.done == 3 * READS
    assert struck.in_flight > 0, "nothing was being read when the fault struck"
    assert troubles(cluster) > before, "nobody met the fault"
    stats = cluster.store_stats()
    if is_warm:
        assert stats["requests"].get("GET", 0) == 0, "a replica had it"
    else:
        # What was in the victim alone when it went is fetched once more by the node that stands in for it.
        assert DATASET_BYTES <= stats["body_bytes"] <= 2 * DATASET_BYTES
        assert stats["requests"]["GET"] >= BLOCKS // 4


warm_and_cold = pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "cold"])


def test_the_store_sees_each_byte_once(cluster: FaultCluster) -> None:
    """Four nodes read everything at once, cold: each byte leaves the store once, each folder is listed, and nothing is
    asked of it again when all of them read everything a second time."""
    empty(cluster)
    cluster.forget()
    first = run_epoch(cluster.nodes, seed=1)
    stats = cluster.store_stats()
    assert first.failures == []
    assert first.done == 4 * READS
    assert (stats["body_bytes"], stats["bodies_sent_again"]) == (DATASET_BYTES, 0)
    assert stats["requests"]["GET"] <= BLOCKS
    cluster.forget()
    second = run_epoch(cluster.nodes, seed=2)
    assert second.failures == []
    assert cluster.store_gets() == 0
    counted = [counts["shared"]["from_peers_bytes"] for counts in cluster.counts()]
    assert all(counted), "every node read from others"


@warm_and_cold
def test_a_killed_node_costs_no_read(cluster: FaultCluster, is_warm: bool) -> None:
    """kill -9 of an owner in mid-epoch: its replicas serve; without one the store does, once."""
    victim = cluster.nodes[VICTIM]
    try:
        check_epoch(cluster, is_warm, victim.kill)
    finally:
        victim.start()
    cluster.wait_for_ring(4)


@warm_and_cold
def test_a_stopped_node_costs_no_read(cluster: FaultCluster, is_warm: bool) -> None:
    """SIGSTOP of an owner in mid-epoch: its connections stay open and say nothing; others are asked after a timeout."""
    victim = cluster.nodes[VICTIM]
    try:
        check_epoch(cluster, is_warm, victim.pause)
    finally:
        victim.resume()
    cluster.wait_for_ring(4)


@pytest.mark.skipif(not can_make_namespaces(), reason="no network namespaces here: root and iproute2 are needed")
@warm_and_cold
def test_a_node_whose_link_is_cut_costs_no_read(cluster: FaultCluster, is_warm: bool) -> None:
    """Packets to and from an owner vanish in mid-epoch; when they come through again it reads as before."""
    assert not isinstance(cluster.network, Loopback)
    try:
        check_epoch(cluster, is_warm, lambda: cluster.network.cut(VICTIM))
    finally:
        cluster.network.mend(VICTIM)
    cluster.wait_for_ring(4)
    mended = run_epoch([cluster.nodes[VICTIM]], seed=3)
    assert mended.failures == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own needs root")
@warm_and_cold
def test_a_node_whose_disk_is_full_costs_no_read(cluster: FaultCluster, is_warm: bool) -> None:
    """The last byte of an owner's disk is taken in mid-epoch: its readers and those who ask it get every byte."""
    disk = cluster.nodes[VICTIM].cache_dir.parent
    ballast = disk / "ballast"
    (warm if is_warm else empty)(cluster)
    cluster.forget()
    struck = Struck()

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:  # the daemon is writing at the same time
                file.write(bytes(4096))

    try:
        epoch = run_epoch(cluster.nodes, seed=2, at=READS, fault=lambda running: struck.when(running, fill))
        had_bytes = cluster.nodes[VICTIM].status()["used_bytes"]
    finally:
        ballast.unlink(missing_ok=True)
    assert epoch.failures == []
    assert struck.in_flight > 0
    assert epoch.done == 4 * READS
    if is_warm:  # what the disk could not keep may be read again, where its other holder is not asked
        assert cluster.store_stats()["body_bytes"] < DATASET_BYTES // 4
    after = run_epoch(cluster.nodes, seed=3)
    assert after.failures == []
    if not is_warm:
        assert cluster.nodes[VICTIM].status()["used_bytes"] > had_bytes, "it could not keep its share before"


@pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd (Debian: apt-get install etcd-server)")
def test_an_etcd_that_is_away_costs_nothing_but_changes(tmp_path: Path) -> None:
    """Away for longer than any lease lasts, while all nodes read everything, warm and cold: no read fails, the rings
    stay, each byte leaves the store once. When it is there again a node that stops is off the ring at once."""
    with fault_cluster(tmp_path, 3, membership="etcd") as made:
        made.start()
        assert run_epoch(made.nodes, seed=1).failures == []
        assert made.etcd is not None
        made.forget()
        struck = Struck()
        etcd = made.etcd
        epoch = run_epoch(made.nodes, seed=2, at=READS, fault=lambda running: struck.when(running, etcd.kill))
        assert epoch.failures == []
        assert struck.in_flight > 0
        assert made.store_gets() == 0
        wait_until(lambda: all("stops writing as an owner" in node.log for node in made.nodes))
        assert all(counts["source_error"] for counts in made.counts())
        for node in made.nodes:
            assert main(["--config", str(node.config_path), "free", "--force", "/"]) == 0
        made.forget()
        assert run_epoch(made.nodes, seed=3).failures == []
        assert made.store_stats()["body_bytes"] == DATASET_BYTES
        made.wait_for_ring(3)
        made.network.at_hub(etcd.start)
        wait_until(lambda: not any(counts["source_error"] for counts in made.counts()))
        at_once(made.nodes[2].stop)
        made.wait_for_ring(2, of=[0, 1])


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own needs root")
def test_what_a_full_owner_cannot_keep_the_next_node_keeps(tmp_path: Path) -> None:
    """One owner an extent, and the disk of one of three nodes is full from the start: all read everything twice, and
    the store is asked for little more than each byte once, though a third of the data has no room where it belongs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not _mount_disk(disk):
        pytest.skip("no disk of its own can be mounted here")
    try:
        with fault_cluster(tmp_path, 3, replicas=1, cache_dirs={2: disk / "cache"}) as made:
            made.start()
            with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            epochs = [run_epoch(made.nodes, seed=seed) for seed in (1, 2)]
            assert [epoch.failures for epoch in epochs] == [[], []]
            assert made.nodes[2].status()["blocks"]["refused_count"] > 0, "its disk was full"
            assert sum(counts["shared"]["from_stand_ins"] for counts in made.counts()) > 0
            assert made.store_stats()["body_bytes"] < DATASET_BYTES * 1.25
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
