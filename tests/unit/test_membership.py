"""Membership as a state machine: what each event makes of it, and that chance finds no way around its promises."""

from __future__ import annotations

import random

import pytest

from orchestra.clock import ManualClock
from orchestra.cluster.drivers import make_driver
from orchestra.cluster.etcd import EtcdDriver
from orchestra.cluster.liveness import Liveness
from orchestra.cluster.membership import (
    REGISTER_AGAIN_S,
    Announce,
    Changed,
    Connect,
    Disconnect,
    DrainAsked,
    Joined,
    LeaseLost,
    LeaseState,
    Membership,
    PublishRing,
    Register,
    Renew,
    Renewed,
    Snapshot,
    SourceLost,
    StartOwning,
    StopOwning,
    Tick,
)
from orchestra.cluster.probing import ProbingDriver
from orchestra.cluster.records import NodeRecord, encode_record, parse_record
from orchestra.cluster.ring import RingNode, ring_of
from orchestra.config import ClusterConfig
from orchestra.units import GIB
from tests.support.simulated_etcd import TTL_S, World

OWN = NodeRecord("a", "10.0.0.1:7420", 100 * GIB, instance="mine")
OTHER = NodeRecord("b", "10.0.0.2:7420", 200 * GIB, incarnation=3, instance="theirs")


def registered(incarnation: int = 7, **changes: object) -> NodeRecord:
    """Return the own record as etcd holds it."""
    return NodeRecord(OWN.node_id, OWN.address, OWN.capacity_bytes, incarnation=incarnation, instance="mine")


@pytest.fixture
def joined() -> Membership:
    """A node with a lease of 9 s from second 0, incarnation 7, alone at revision 8."""
    machine = Membership(OWN, has_lease=True)
    assert machine.handle(Tick(0.0)) == [Register(OWN)]
    assert machine.handle(Joined(7, 8, 9.0, 0.0)) == [StartOwning(7)]
    machine.handle(Snapshot(8, (registered(),), "etcd"))
    return machine


def test_a_node_seen_is_connected_and_on_the_ring(joined: Membership) -> None:
    """A new record: connect, then place by the ring of that revision, weighted by capacity."""
    nodes = [RingNode("a", 100 * GIB), RingNode("b", 200 * GIB)]
    assert joined.handle(Changed(9, seen=(OTHER,))) == [Connect(OTHER), PublishRing(ring_of(9, nodes))]
    assert joined.handle(Changed(9, seen=(OTHER,))) == []
    assert joined.records == (registered(), OTHER)


def test_a_node_lost_is_off_the_ring(joined: Membership) -> None:
    """A record that is gone: disconnect, and a ring without it; a second loss says nothing."""
    joined.handle(Changed(9, seen=(OTHER,)))
    assert joined.handle(Changed(10, lost=("b",))) == [
        Disconnect("b"),
        PublishRing(ring_of(10, [RingNode("a", 100 * GIB)])),
    ]
    assert joined.handle(Changed(11, lost=("b",))) == []


def test_a_node_that_drains_is_reached_and_owns_nothing(joined: Membership) -> None:
    """Its records stay, its connection stays, the ring is without it."""
    joined.handle(Changed(9, seen=(OTHER,)))
    draining = NodeRecord("b", OTHER.address, OTHER.capacity_bytes, True, 3, "theirs")
    assert joined.handle(Changed(10, seen=(draining,))) == [PublishRing(ring_of(10, [RingNode("a", 100 * GIB)]))]
    assert draining in joined.records


def test_a_node_that_came_again_is_connected_anew_and_the_ring_stays(joined: Membership) -> None:
    """Another incarnation at the same capacity: connections are made anew, no extent moves."""
    joined.handle(Changed(9, seen=(OTHER,)))
    again = NodeRecord("b", OTHER.address, OTHER.capacity_bytes, incarnation=9, instance="another")
    assert joined.handle(Changed(10, seen=(again,))) == [Connect(again)]
    assert joined.ring.revision == 9


def test_a_list_taken_anew_replaces_what_was_known(joined: Membership) -> None:
    """A snapshot is one change: who is missing is gone, who is new is connected, one ring."""
    joined.handle(Changed(9, seen=(OTHER,)))
    third = NodeRecord("c", "10.0.0.3:7420", GIB, incarnation=11)
    assert joined.handle(Snapshot(20, (registered(), third), "etcd")) == [
        Disconnect("b"),
        Connect(third),
        PublishRing(ring_of(20, [RingNode("a", 100 * GIB), RingNode("c", GIB)])),
    ]


def test_what_is_older_than_what_is_known_is_left_alone(joined: Membership) -> None:
    """A member of etcd that lags behind changes nothing."""
    joined.handle(Changed(9, seen=(OTHER,)))
    assert joined.handle(Changed(8, lost=("b",))) == []
    assert joined.handle(Snapshot(8, (), "etcd")) == []
    assert joined.ring.revision == 9


def test_the_lease_is_renewed_after_a_third_of_its_time(joined: Membership) -> None:
    """One renewal at a time is asked for, a third of the lease apart, answered or not."""
    assert joined.handle(Tick(2.9)) == []
    assert joined.handle(Tick(3.0)) == [Renew(7)]
    assert joined.handle(Tick(3.1)) == []
    joined.handle(Renewed(7, 3.0))
    assert joined.owns_until_s == 9.0
    assert joined.handle(Tick(6.0)) == [Renew(7)]


def test_without_a_renewal_it_stops_owning_before_the_lease_can_expire(joined: Membership) -> None:
    """After two thirds nothing is written as an owner; a renewal that comes through starts it again."""
    joined.handle(Tick(3.0))
    first, second = joined.handle(Tick(6.0))
    assert first == StopOwning("its lease was not renewed for 6.0s")
    assert second == Renew(7)
    assert joined.owns_until_s == 0.0
    assert joined.handle(Renewed(7, 6.0)) == [StartOwning(7)]
    assert joined.owns_until_s == 12.0


def test_a_process_that_was_stopped_learns_it_at_its_first_tick(joined: Membership) -> None:
    """After SIGSTOP of any length the first thing that is done is to stop owning."""
    assert isinstance(joined.handle(Tick(1000.0))[0], StopOwning)


def test_a_lost_lease_is_registered_anew(joined: Membership) -> None:
    """Lease lost: stop owning, register; what an older incarnation still hears changes nothing."""
    assert joined.handle(LeaseLost(7)) == [StopOwning("its lease has expired")]
    assert joined.handle(Tick(1.0)) == [Register(OWN)]
    assert joined.handle(Renewed(7, 0.9)) == []
    assert joined.handle(Joined(9, 10, 9.0, 1.0)) == [StartOwning(9)]
    assert joined.handle(LeaseLost(7)) == []
    assert joined.handle(Joined(8, 9, 9.0, 0.5)) == []


def test_an_own_record_that_is_gone_is_a_lost_lease(joined: Membership) -> None:
    """Whether the loss is seen as a change or by its absence from a list, the node registers anew."""
    stop = StopOwning("its lease has expired")
    assert joined.handle(Changed(9, lost=("a",))) == [stop, PublishRing(ring_of(9, []))]
    assert joined.handle(Tick(1.0)) == [Register(OWN)]
    joined.handle(Joined(9, 10, 9.0, 1.0))
    assert joined.handle(Snapshot(9, (), "etcd")) == []  # from before it joined
    assert joined.handle(Snapshot(11, (), "etcd")) == [stop]


def test_a_registration_without_an_answer_is_tried_again() -> None:
    """It is asked for at a bounded rate until it is answered."""
    machine = Membership(OWN, has_lease=True)
    asked = [at_s for at_s in range(10) if machine.handle(Tick(float(at_s)))]
    assert asked == list(range(0, 10, int(REGISTER_AGAIN_S)))


def test_a_second_process_under_its_name_ends_its_part(joined: Membership) -> None:
    """The later one has the name; the earlier one stops owning and never registers again, so they do not alternate."""
    stolen = NodeRecord("a", "10.0.0.9:7420", GIB, incarnation=12, instance="another")
    first = joined.handle(Changed(13, seen=(stolen,)))[0]
    assert first == StopOwning("another process at 10.0.0.9:7420 registered as node a")
    assert joined.lease is LeaseState.SUPERSEDED
    assert [joined.handle(Tick(at_s)) for at_s in (5.0, 500.0)] == [[], []]


def test_a_registration_of_its_own_that_came_late_is_registered_over(joined: Membership) -> None:
    """A request given up long ago that arrives after all costs an incarnation, not the node."""
    assert joined.handle(Changed(13, seen=(registered(12),))) == [StopOwning("its lease has expired")]
    assert joined.handle(Tick(1.0)) == [Register(OWN)]


def test_draining_is_announced_once_and_kept_by_later_registrations(joined: Membership) -> None:
    """The record says so under the lease there is, and under the next."""
    draining = NodeRecord("a", OWN.address, OWN.capacity_bytes, True, 7, "mine")
    assert joined.handle(DrainAsked()) == [Announce(draining)]
    assert joined.handle(DrainAsked()) == []
    joined.handle(LeaseLost(7))
    (register,) = joined.handle(Tick(1.0))
    assert isinstance(register, Register)
    assert register.record.is_draining


def test_a_node_that_drains_no_more_is_on_the_ring_again(joined: Membership) -> None:
    """It is announced, again where the announcement was lost, until its own record says so; without a lease its ring
    has it at once."""
    joined.handle(DrainAsked())
    joined.handle(Changed(9, seen=(NodeRecord("a", OWN.address, OWN.capacity_bytes, True, 7, "mine"),)))
    announced = Announce(NodeRecord("a", OWN.address, OWN.capacity_bytes, False, 7, "mine"))
    assert joined.handle(DrainAsked(is_over=True)) == [announced]
    assert joined.handle(DrainAsked(is_over=True)) == []
    assert joined.handle(Tick(3.0)) == [Renew(7), announced]
    alone = Membership(OWN, has_lease=False)
    alone.handle(Changed(0, seen=(OWN,)))
    alone.handle(DrainAsked())
    assert not alone.ring.nodes
    alone.handle(DrainAsked(is_over=True))
    nodes: tuple[RingNode, ...] = alone.ring.nodes
    assert [node.node_id for node in nodes] == ["a"]


def test_an_announcement_that_was_lost_is_made_again(joined: Membership) -> None:
    """Until its own record is seen to drain it is announced with every renewal (found by the simulation, seed 4)."""
    joined.handle(DrainAsked())
    announced = Announce(NodeRecord("a", OWN.address, OWN.capacity_bytes, True, 7, "mine"))
    assert joined.handle(Tick(3.0)) == [Renew(7), announced]
    joined.handle(Changed(9, seen=(announced.record,)))
    joined.handle(Renewed(7, 3.0))
    assert joined.handle(Tick(6.0)) == [Renew(7)]


def test_a_source_that_is_away_for_30_s_costs_nothing_but_changes(joined: Membership) -> None:
    """The ring and the records stay, writing as an owner stops, the reason is known; its return mends all of it."""
    joined.handle(Changed(9, seen=(OTHER,)))
    ring = joined.ring
    joined.handle(SourceLost("connection refused"))
    instructions = [one for at in range(121) for one in joined.handle(Tick(at / 4))]
    assert not any(isinstance(one, (PublishRing, Disconnect, Register)) for one in instructions)
    assert sum(isinstance(one, StopOwning) for one in instructions) == 1
    assert (joined.ring, joined.source_error) == (ring, "connection refused")
    assert joined.handle(Renewed(7, 30.0)) == [StartOwning(7)]
    assert joined.handle(Snapshot(9, (registered(), OTHER), "etcd")) == []
    assert joined.source_error == ""


def test_another_etcd_counts_anew(joined: Membership) -> None:
    """An etcd that was made anew has lower revisions: it is believed, and registered with."""
    joined.handle(Changed(900, seen=(OTHER,)))
    instructions = joined.handle(Snapshot(2, (), "another"))
    assert instructions == [
        StopOwning("its lease has expired"),
        Disconnect("b"),
        PublishRing(ring_of(2, [])),
    ]
    assert joined.handle(Tick(1.0)) == [Register(OWN)]
    assert joined.handle(Joined(2, 3, 9.0, 1.0)) == [StartOwning(2)]


def test_without_leases_a_node_is_its_own_and_counts_its_own_changes() -> None:
    """Static and dns: no registration; its own record is never taken from others, and each change is a revision."""
    machine = Membership(OWN, has_lease=False)
    assert machine.handle(Tick(0.0)) == []
    (published,) = machine.handle(Changed(0, seen=(NodeRecord("a", "10.9.9.9:1", 1),)))
    assert published == PublishRing(ring_of(1, [RingNode("a", 100 * GIB)]))
    machine.handle(Changed(0, seen=(OTHER,)))
    assert machine.ring.revision == 2
    assert machine.handle(DrainAsked()) == [PublishRing(ring_of(3, [RingNode("b", 200 * GIB)]))]


@pytest.mark.parametrize("fixed_seed", [None, 1, 2, 3, 4, 5])
def test_a_cluster_under_faults_agrees_and_comes_together(fixed_seed: int | None) -> None:
    """At every step one revision has one ring and no lease outlives itself; after the faults all are on all rings."""
    # A failure prints the seed of the run that chance began; kept ones are above.
    seed = random.SystemRandom().randrange(1 << 32) if fixed_seed is None else fixed_seed
    print(f"seed {seed}")
    world = World(seed, 4)
    world.run(5)
    for _ in range(40):
        world.strike()
        world.run(world.random.random() * TTL_S)
    world.heal()
    world.run(6 * TTL_S)
    expected = sorted(node_id for node_id, node in world.nodes.items() if not node.is_drained)
    for node in world.nodes.values():
        assert [one.node_id for one in node.machine.ring.nodes] == expected
        assert node.machine.lease is LeaseState.HELD
        assert node.machine.owns_until_s > world.now_s
    assert world.rings_published > len(world.nodes)


def at(address: str, node_id: str) -> NodeRecord:
    return NodeRecord(node_id, address, GIB)


def test_a_node_is_lost_after_as_many_silent_probes_as_were_set_and_no_fewer() -> None:
    """An answer between them begins the count anew; a node that was never there is not lost."""
    liveness = Liveness(OWN, silent_max=2)
    liveness.keep([OWN.address, "h:1", "h:2"])
    assert liveness.to_probe == ("h:1", "h:2")
    assert liveness.answered("h:1", at("h:1", "b")) == Changed(0, seen=(at("h:1", "b"),))
    told = [liveness.silent("h:1"), liveness.answered("h:1", at("h:1", "b")), liveness.silent("h:1")]
    assert told == [None, None, None]
    assert liveness.silent("h:1") == Changed(0, lost=("b",))
    assert [liveness.silent("h:2") for _ in range(3)] == [None] * 3


def test_a_node_at_two_addresses_is_lost_when_both_are_silent_or_gone() -> None:
    """A name may resolve to an IPv4 and an IPv6 address of one node."""
    liveness = Liveness(OWN, silent_max=1)
    liveness.keep(["h:1", "[::1]:1"])
    for address in ("h:1", "[::1]:1"):
        liveness.answered(address, at("h:1", "b"))
    assert liveness.silent("h:1") is None
    assert liveness.keep(["h:1"]) == Changed(0, lost=("b",))


def test_another_node_at_an_address_takes_the_place_of_the_first() -> None:
    """An address that was given to another node; and nobody is taken for this node itself."""
    liveness = Liveness(OWN, silent_max=1)
    liveness.keep(["h:1"])
    liveness.answered("h:1", at("h:1", "b"))
    assert liveness.answered("h:1", at("h:1", "c")) == Changed(0, seen=(at("h:1", "c"),), lost=("b",))
    assert liveness.answered("h:1", at("h:1", OWN.node_id)) is None
    assert liveness.answered("unknown:1", at("unknown:1", "d")) is None


@pytest.mark.parametrize(
    ("cluster", "kind"),
    [
        (ClusterConfig("127.0.0.1:1", nodes=("127.0.0.1:1",)), ProbingDriver),
        (ClusterConfig("127.0.0.1:1", membership="dns", name="localhost"), ProbingDriver),
        (ClusterConfig("127.0.0.1:1", membership="etcd", endpoints=("http://127.0.0.1:2379",)), EtcdDriver),
    ],
    ids=["static", "dns", "etcd"],
)
def test_the_settings_choose_the_driver(cluster: ClusterConfig, kind: type) -> None:
    """Each word of `membership` has its driver; leases are etcd's alone."""
    driver = make_driver(cluster, OWN, ManualClock())
    assert isinstance(driver, kind)
    assert driver.has_lease is (cluster.membership == "etcd")


def test_a_record_survives_the_wire_and_garbage_does_not_come_in() -> None:
    """What is encoded is read back; what others wrote is checked like a user's input."""
    assert parse_record(encode_record(OTHER)) == OTHER
    for garbage in (
        b"",
        b"[]",
        b"\xff",
        b'{"node_id": "a"}',
        b'{"node_id": "a\\n", "address": "h:1", "capacity_bytes": 1}',
        b'{"node_id": "a", "address": "h", "capacity_bytes": 1}',
        b'{"node_id": "a", "address": "h:70000", "capacity_bytes": 1}',
        b'{"node_id": "a", "address": "h:1/../x", "capacity_bytes": 1}',
        b'{"node_id": "a", "address": "h:1", "capacity_bytes": 0}',
        b'{"node_id": "a", "address": "h:1", "capacity_bytes": 1, "incarnation": -1}',
        b'{"node_id": "' + b"a" * 5000 + b'", "address": "h:1", "capacity_bytes": 1}',
    ):
        with pytest.raises(ValueError, match=r"."):
            parse_record(garbage)
