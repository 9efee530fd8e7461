"""Membership over a real etcd: leases and watches, its loss, a compacted history, a name taken twice."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.clock import SystemClock
from orchestra.cluster.contract import Deliver, Errand
from orchestra.cluster.etcd import PREFIX, EtcdDriver, EtcdSettings
from orchestra.cluster.etcd_gateway import EtcdGateway, EtcdUnreachableError
from orchestra.cluster.membership import Connect, Disconnect, LeaseState, StartOwning, StopOwning
from orchestra.cluster.records import NodeRecord
from orchestra.units import GIB
from tests.support.members import EtcdServer, etcd_server, free_port, running

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd (Debian: apt-get install etcd-server)"),
]

# etcd's least is 2; owning stops after two thirds, and a busy machine may stand still for a second.
TTL_S = 4
SETTINGS = EtcdSettings(ttl_s=TTL_S, timeout_s=0.5, again_s=0.1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path) as running_server:
        yield running_server


def record(name: str, instance: str = "") -> NodeRecord:
    return NodeRecord(name, "127.0.0.1:7420", 100 * GIB, instance=instance or f"process-{name}")


def driver(server: EtcdServer) -> EtcdDriver:
    return EtcdDriver([server.endpoint], SystemClock(), SETTINGS)


async def test_nodes_that_join_leave_and_drain_are_seen_by_all(server: EtcdServer) -> None:
    """Two nodes come to the same ring at the same revision; one drains and is off it; one leaves and is gone."""
    async with running(record("a"), driver(server)) as first:
        async with running(record("b"), driver(server)) as second:
            await first.wait_for_names("a", "b")
            await second.wait_for_names("a", "b")
            rings = [one.member.membership.ring for one in (first, second)]
            assert rings[0].owners(b"k", 2) == rings[1].owners(b"k", 2)
            second.member.drain()
            await first.wait_for_names("a")
            assert [one.node_id for one in first.member.membership.records] == ["a", "b"]
        await first.wait_until(lambda: first.heard(Disconnect) == 1)
        assert first.heard(Connect) == 1


async def test_an_etcd_that_is_killed_and_comes_again_costs_nothing_but_changes(server: EtcdServer) -> None:
    """Away until no lease may be relied on: rings stay as they are, owning stops and starts again; then news comes."""
    async with running(record("a"), driver(server)) as first, running(record("b"), driver(server)) as second:
        for one in (first, second):
            await one.wait_for_names("a", "b")
        ring = first.member.membership.ring
        server.kill()
        for one in (first, second):
            await one.wait_until(lambda one=one: one.heard(StopOwning) >= 1)  # type: ignore[misc]
        assert first.member.membership.source_error.startswith("etcd at http://127.0.0.1:")
        assert (first.member.membership.ring, first.heard(Disconnect)) == (ring, 0)
        server.start()
        for one in (first, second):
            await one.wait_until(lambda one=one: one.member.membership.owns_until_s > 0)  # type: ignore[misc]
            assert one.names == ["a", "b"]
            assert one.heard(Disconnect) == 0
        async with running(record("c"), driver(server)):
            await first.wait_for_names("a", "b", "c")


class CutDriver(EtcdDriver):
    """A driver whose renewals and registrations do not get through while it is cut."""

    is_cut = False

    async def perform(self, errand: Errand, deliver: Deliver) -> None:
        if not self.is_cut:
            await super().perform(errand, deliver)


async def test_a_node_cut_off_for_longer_than_its_lease_comes_back_as_another_incarnation(server: EtcdServer) -> None:
    """Its lease expires, others go on without it; when it is heard again it registers anew and is connected anew."""
    cut = CutDriver([server.endpoint], SystemClock(), SETTINGS)
    async with running(record("a"), driver(server)) as first, running(record("b"), cut) as second:
        await first.wait_for_names("a", "b")
        await second.wait_for_names("a", "b")
        cut.is_cut = True
        await first.wait_for_names("a")
        assert second.heard(StopOwning) >= 1
        cut.is_cut = False
        await first.wait_for_names("a", "b")
        await second.wait_until(lambda: second.heard(StartOwning) >= 2)
        connects = [one.record.incarnation for one in first.news if isinstance(one, Connect)]
        assert connects == sorted(set(connects))
        assert len(connects) == 2


async def test_a_stopped_etcd_is_a_lost_one_within_the_timeout(server: EtcdServer) -> None:
    """SIGSTOP, which keeps connections open: calls end by their timeout, owning stops; SIGCONT mends it."""
    async with running(record("a"), driver(server)) as first:
        await first.wait_until(lambda: first.names == ["a"] and first.heard(StartOwning) >= 1)
        server.pause()
        await first.wait_until(lambda: first.heard(StopOwning) >= 1)
        assert first.names == ["a"]
        server.resume()
        await first.wait_until(lambda: first.heard(StartOwning) >= 2 and first.names == ["a"])


async def test_a_watch_from_a_compacted_revision_ends_and_the_list_is_taken_anew(server: EtcdServer) -> None:
    """etcd refuses what it no longer keeps; the watch ends, and the next list has it all."""
    gateway = EtcdGateway([server.endpoint], timeout_s=5.0)
    try:
        for number in range(3):
            assert await gateway.put_if_unchanged(b"/orchestra/other-%d" % number, b"", "0", 0) is not None
        revision = (await gateway.list(PREFIX)).revision
        await gateway._call("/v3/kv/compaction", {"revision": str(revision), "physical": True})
        async with asyncio.timeout(10):
            assert [changed async for changed in gateway.watch(PREFIX, 2)] == []
        assert (await gateway.list(PREFIX)).revision == revision
    finally:
        await gateway.close()


async def test_a_second_process_under_one_name_has_it_and_the_first_stays_out(server: EtcdServer) -> None:
    """The first one stops owning and does not take the name back: there is one owner under a name."""
    async with running(record("a", "one"), driver(server)) as first:
        await first.wait_until(lambda: first.heard(StartOwning) >= 1 and first.names == ["a"])
        async with running(record("a", "two"), driver(server)) as second:
            await first.wait_until(lambda: first.heard(StopOwning) >= 1)
            assert first.member.membership.lease is LeaseState.SUPERSEDED
            await second.wait_until(lambda: second.heard(StartOwning) >= 1)


async def test_garbage_under_the_prefix_is_left_out(server: EtcdServer) -> None:
    """What is no record, or names another node than its key, does not come into the ring; the rest does."""
    gateway = EtcdGateway([server.endpoint], timeout_s=5.0)
    try:
        await gateway.put_if_unchanged(PREFIX + b"x", b"\xff{", "0", 0)
        await gateway.put_if_unchanged(
            PREFIX + b"y", b'{"node_id": "z", "address": "h:1", "capacity_bytes": 1}', "0", 0
        )
    finally:
        await gateway.close()
    async with running(record("a"), driver(server)) as first:
        await first.wait_for_names("a")


async def test_endpoints_are_tried_in_turn(server: EtcdServer) -> None:
    """With one of two endpoints dead a node joins all the same; the error of the dead one names it."""
    dead = f"http://127.0.0.1:{free_port()}"
    gateway = EtcdGateway([dead], timeout_s=1.0)
    with pytest.raises(EtcdUnreachableError, match=f"etcd at {dead}: "):
        await gateway.list(PREFIX)
    await gateway.close()
    both = EtcdDriver([dead, server.endpoint], SystemClock(), SETTINGS)
    async with running(record("a"), both) as first:
        await first.wait_for_names("a")
