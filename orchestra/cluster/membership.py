"""Who is in the cluster, as a state machine: events in, instructions out, no clock and no network of its own.

Owns: the records of all nodes, the ring that follows from them, this node's lease. Leaves to others: where events come
from and who carries instructions out (drivers, `member`), what a peer that does not answer costs (peers).

With a driver that has leases (etcd) the records and revisions are the driver's alone, so that two nodes at one revision
have one ring. Its loss changes nothing but one thing: a node that could not renew stops *writing* as an owner after two
thirds of its lease, before anybody else can see it expire; reads go on by the last ring. Without leases (static, dns)
each node judges by its own probes: revisions are its own, and rings are compared by their digests.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from orchestra.cluster.records import NodeRecord
from orchestra.cluster.ring import NODES_MAX, Ring, RingNode, ring_of

# Of a lease's time: renewed after a third, so that one lost request costs nothing; not relied on after two thirds, so
# that a late tick, a stall of seconds and a clock that runs 1 % slow all stay within it.
RENEW_SHARE = 1 / 3
OWNING_SHARE = 2 / 3
# A registration that was not answered is tried again after this.
REGISTER_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Changed:
    """Everything that changed at one revision: records seen (new or other than before) and ids that are gone.

    Without a lease `revision` is 0: this node counts its own changes.
    """

    revision: int
    seen: tuple[NodeRecord, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All records at one revision; who is missing is gone. `source` names the store of records: another one counts
    revisions anew."""

    revision: int
    records: tuple[NodeRecord, ...]
    source: str = ""


@dataclass(frozen=True, slots=True)
class Joined:
    """This node's record stands since `revision`, under a lease of `ttl_s` that was asked for at `sent_at_s`."""

    incarnation: int
    revision: int
    ttl_s: float
    sent_at_s: float


@dataclass(frozen=True, slots=True)
class Renewed:
    """The lease of `incarnation` was renewed by a request sent at `sent_at_s`."""

    incarnation: int
    sent_at_s: float


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The lease of `incarnation` has expired or was revoked."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """This node is to hand over what it owns; `is_over`: it is to own its share again."""

    is_over: bool = False


@dataclass(frozen=True, slots=True)
class SourceLost:
    """The driver cannot reach its source; it goes on trying."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """It is `now_s` by this node's clock, which never goes back."""

    now_s: float


Event = Changed | Snapshot | Joined | Renewed | LeaseLost | DrainAsked | SourceLost | Tick


@dataclass(frozen=True, slots=True)
class Connect:
    """Reach this node at this address from now on; it is new, has moved, or is another incarnation."""

    record: NodeRecord


@dataclass(frozen=True, slots=True)
class Disconnect:
    """The node is gone."""

    node_id: str


@dataclass(frozen=True, slots=True)
class PublishRing:
    """Place by this ring from now on."""

    ring: Ring


@dataclass(frozen=True, slots=True)
class Register:
    """Write this record under a new lease and as a new incarnation."""

    record: NodeRecord


@dataclass(frozen=True, slots=True)
class Announce:
    """Write this record, which has changed, under the lease there is."""

    record: NodeRecord


@dataclass(frozen=True, slots=True)
class Renew:
    """Renew the lease of `incarnation`."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class StartOwning:
    """This node may write as an owner; `incarnation` goes with what it writes."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class StopOwning:
    """Write nothing as an owner any more."""

    reason: str


Instruction = Connect | Disconnect | PublishRing | Register | Announce | Renew | StartOwning | StopOwning


class LeaseState(enum.Enum):
    """Where this node stands with its lease."""

    NONE = "none"
    REGISTERING = "registering"
    HELD = "held"
    SUPERSEDED = "superseded"  # another process registered under this node's id: this one never does so again


class Membership:
    """The state machine. `handle` is the only way in; it never raises for what a driver can deliver."""

    def __init__(self, own: NodeRecord, *, has_lease: bool) -> None:
        self._own = own
        self._has_lease = has_lease
        self._records: dict[str, NodeRecord] = {}
        self._revision = 0
        self._source = ""
        self._ring = Ring(0, ())
        self._lease = LeaseState.NONE
        self._incarnation = 0
        self._joined_revision = 0
        self._ttl_s = 0.0
        self._sent_at_s = 0.0
        self._act_at_s = 0.0  # when to renew, or to register
        self._is_owning = False
        self._source_error = ""

    @property
    def ring(self) -> Ring:
        """The ring published last; without nodes before the first."""
        return self._ring

    @property
    def source(self) -> str:
        """Which store of records the revisions count in."""
        return self._source

    @property
    def records(self) -> tuple[NodeRecord, ...]:
        """All nodes known, by id; those that drain among them."""
        return tuple(self._records[node_id] for node_id in sorted(self._records))

    @property
    def lease(self) -> LeaseState:
        """Where this node stands with its lease; NONE for ever without one."""
        return self._lease

    @property
    def source_error(self) -> str:
        """Why the source of membership cannot be reached; "" while it can."""
        return self._source_error

    @property
    def owns_until_s(self) -> float:
        """Until when this node may write as an owner (a writer may have been stopped since the last tick); 0: it may
        not."""
        return self._sent_at_s + self._ttl_s * OWNING_SHARE if self._is_owning else 0.0

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event; return what is to be done, in order."""
        match event:
            case Tick(now_s):
                return self._tick(now_s)
            case Changed():
                return self._changed(event)
            case Snapshot():
                return self._snapshot(event)
            case Joined():
                return self._joined(event)
            case Renewed():
                return self._renewed(event)
            case LeaseLost(incarnation):
                return self._lease_lost() if incarnation == self._incarnation else []
            case DrainAsked(is_over):
                return self._drain(is_draining=not is_over)
            case SourceLost(reason):
                self._source_error = reason
                return []

    def _tick(self, now_s: float) -> list[Instruction]:
        if not self._has_lease:
            return []
        instructions: list[Instruction] = []
        if self._is_owning and now_s >= self.owns_until_s:
            instructions += self._stop_owning(f"its lease was not renewed for {now_s - self._sent_at_s:.1f}s")
        if now_s < self._act_at_s:
            return instructions
        if self._lease is LeaseState.HELD:
            self._act_at_s = now_s + self._ttl_s * RENEW_SHARE
            instructions.append(Renew(self._incarnation))
            recorded = self._records.get(self._own.node_id)
            if self._own.is_draining is not (recorded is not None and recorded.is_draining):
                instructions += self._announce()  # the announcement before was lost
        elif self._lease in (LeaseState.NONE, LeaseState.REGISTERING):
            self._lease = LeaseState.REGISTERING
            self._act_at_s = now_s + REGISTER_AGAIN_S
            instructions.append(Register(self._own))
        return instructions

    def _joined(self, event: Joined) -> list[Instruction]:
        if self._lease is not LeaseState.REGISTERING or event.incarnation <= self._incarnation:
            return []
        self._lease = LeaseState.HELD
        self._incarnation = event.incarnation
        self._joined_revision = event.revision
        self._ttl_s = event.ttl_s
        self._sent_at_s = event.sent_at_s
        self._act_at_s = event.sent_at_s + event.ttl_s * RENEW_SHARE
        self._is_owning = True
        started: list[Instruction] = [StartOwning(event.incarnation)]
        return started + self._announce() if self._own.is_draining else started

    def _announce(self) -> list[Instruction]:
        return [Announce(replace(self._own, incarnation=self._incarnation))]

    def _renewed(self, event: Renewed) -> list[Instruction]:
        if self._lease is not LeaseState.HELD or event.incarnation != self._incarnation:
            return []
        self._source_error = ""
        self._sent_at_s = max(self._sent_at_s, event.sent_at_s)
        if self._is_owning:
            return []
        self._is_owning = True
        return [StartOwning(self._incarnation)]

    def _lease_lost(self) -> list[Instruction]:
        if self._lease is not LeaseState.HELD:
            return []
        self._lease = LeaseState.NONE
        self._act_at_s = 0.0  # the next tick registers
        return self._stop_owning("its lease has expired")

    def _stop_owning(self, reason: str) -> list[Instruction]:
        if not self._is_owning:
            return []
        self._is_owning = False
        return [StopOwning(reason)]

    def _drain(self, *, is_draining: bool) -> list[Instruction]:
        if self._own.is_draining is is_draining:
            return []
        self._own = replace(self._own, is_draining=is_draining)
        if not self._has_lease:
            return self._changed(Changed(0, seen=(self._own,)))
        return self._announce() if self._lease is LeaseState.HELD else []

    def _changed(self, event: Changed) -> list[Instruction]:
        if self._has_lease and event.revision < self._revision:
            return []
        self._source_error = ""
        self._revision = event.revision if self._has_lease else self._revision + 1
        instructions: list[Instruction] = []
        for node_id in event.lost:
            instructions += self._forget(node_id)
        for record in event.seen:
            instructions += self._learn(record)
        return instructions + self._publish()

    def _snapshot(self, event: Snapshot) -> list[Instruction]:
        if event.source == self._source and event.revision < self._revision:
            return []  # a member that lags behind
        self._source_error = ""
        instructions: list[Instruction] = []
        if event.source != self._source:
            # Another store of records: its revisions, and so its incarnations, say nothing beside the old ones.
            instructions += self._lease_lost() if self._source else []
            self._source = event.source
            self._incarnation = 0 if self._lease is not LeaseState.HELD else self._incarnation
        self._revision = event.revision
        for node_id in sorted(self._records.keys() - {record.node_id for record in event.records}):
            instructions += self._forget(node_id)
        for record in event.records:
            instructions += self._learn(record)
        if self._own.node_id not in self._records:
            instructions += self._own_is_gone()
        return instructions + self._publish()

    def _forget(self, node_id: str) -> list[Instruction]:
        if self._records.pop(node_id, None) is None:
            return []
        if node_id != self._own.node_id:
            return [Disconnect(node_id)]
        return self._own_is_gone()

    def _own_is_gone(self) -> list[Instruction]:
        # What was gone before we joined was an older incarnation's.
        return self._lease_lost() if self._revision > self._joined_revision else []

    def _learn(self, record: NodeRecord) -> list[Instruction]:
        if record.node_id == self._own.node_id:
            self._records[record.node_id] = record if self._has_lease else self._own
            return self._see_own(record)
        known = self._records.get(record.node_id)
        self._records[record.node_id] = record
        if known is None or (known.address, known.incarnation) != (record.address, record.incarnation):
            return [Connect(record)]
        return []

    def _see_own(self, record: NodeRecord) -> list[Instruction]:
        if self._lease is not LeaseState.HELD or record.incarnation <= self._incarnation:
            return []
        if record.instance == self._own.instance:  # a registration of ours that was given up and came through late
            return self._lease_lost()
        self._lease = LeaseState.SUPERSEDED
        return self._stop_owning(f"another process at {record.address} registered as node {record.node_id}")

    def _publish(self) -> list[Instruction]:
        nodes = [RingNode(one.node_id, one.capacity_bytes) for one in self.records if not one.is_draining][:NODES_MAX]
        ring = ring_of(self._revision, nodes)
        if ring.nodes == self._ring.nodes:
            return []
        self._ring = ring
        return [PublishRing(ring)]
