"""A cluster on paper: state machines of membership around an etcd that is a few dictionaries, in simulated time.

Chance (a seeded Random) decides how long each message takes, which are lost, and which faults strike: nodes that are
killed, stopped and continued, cut off from etcd, drained; an etcd that is away, that has compacted its history, that is
replaced by an empty one. `step` moves the time and checks what must hold at every moment.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from orchestra.cluster.membership import (
    Announce,
    Changed,
    DrainAsked,
    Event,
    Joined,
    LeaseLost,
    Membership,
    PublishRing,
    Register,
    Renew,
    Renewed,
    Snapshot,
    SourceLost,
    Tick,
)
from orchestra.cluster.records import NodeRecord
from orchestra.cluster.ring import RingNode
from orchestra.units import GIB

TTL_S = 10.0
STEP_S = 0.25


@dataclass
class Etcd:
    """The records under their leases, every change by its revision, and how much of the history is kept."""

    name: str
    revision: int = 1
    records: dict[str, NodeRecord] = field(default_factory=dict)
    expires_at_s: dict[str, float] = field(default_factory=dict)
    history: dict[int, Changed] = field(default_factory=dict)
    compacted: int = 0
    is_away: bool = False

    def put(self, record: NodeRecord, expires_at_s: float) -> int:
        self.revision += 1
        self.records[record.node_id] = record
        self.expires_at_s[record.node_id] = expires_at_s
        self.history[self.revision] = Changed(self.revision, seen=(record,))
        return self.revision

    def expire(self, now_s: float) -> None:
        """Drop what is past its time, all at one revision."""
        gone = tuple(sorted(node for node, at_s in self.expires_at_s.items() if at_s <= now_s))
        if gone and not self.is_away:
            self.revision += 1
            for node_id in gone:
                del self.records[node_id], self.expires_at_s[node_id]
            self.history[self.revision] = Changed(self.revision, lost=gone)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.revision, tuple(self.records.values()), self.name)


@dataclass
class Node:
    """One process: its state machine, its connection, and what is on its way to it."""

    own: NodeRecord
    machine: Membership
    watched: tuple[str, int] = ("", -1)  # the etcd, and the revision up to which events are on their way
    inbox: list[tuple[float, Event]] = field(default_factory=list)
    is_stopped: bool = False
    is_cut: bool = False
    is_drained: bool = False


class World:
    """The nodes, their etcd and the time."""

    def __init__(self, seed: int, node_count: int) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.etcd = Etcd("first")
        self.nodes: dict[str, Node] = {}
        self.on_their_way: list[tuple[float, Callable[[], None]]] = []
        self.rings: dict[tuple[str, int], tuple[RingNode, ...]] = {}
        self.instance_count = 0
        self.loss = 0.1  # of requests, and of answers
        self.rings_published = 0
        for number in range(node_count):
            self.start(f"node-{number}")

    def start(self, node_id: str) -> None:
        """Start a process under `node_id`; one that ran there before is gone."""
        self.instance_count += 1
        own = NodeRecord(node_id, "10.0.0.1:7420", 100 * GIB, instance=f"process-{self.instance_count}")
        self.nodes[node_id] = Node(own, Membership(own, has_lease=True))

    def step(self) -> None:
        """Move the time by a step: messages arrive, leases expire, nodes act; then check."""
        self.now_s += STEP_S
        due = [(at_s, act) for at_s, act in self.on_their_way if at_s <= self.now_s]
        self.on_their_way = [(at_s, act) for at_s, act in self.on_their_way if at_s > self.now_s]
        for _, act in sorted(due, key=lambda one: one[0]):
            act()
        self.etcd.expire(self.now_s)
        for node in self.nodes.values():
            self._watch(node)
            if not node.is_stopped:
                self._act(node)
        self.check()

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds / STEP_S)):
            self.step()

    def check(self) -> None:
        """Nobody relies on a lease that others may have seen expire."""
        for node in self.nodes.values():
            if self.now_s < node.machine.owns_until_s:
                recorded = self.etcd.records.get(node.own.node_id)
                assert recorded is None or recorded.instance == node.own.instance or self._was_restarted(recorded), node
                if self.etcd.name == node.machine.source:
                    assert recorded is not None, f"{node.own.node_id} owns without a lease at {self.now_s}"

    def _was_restarted(self, recorded: NodeRecord) -> bool:
        return self.nodes[recorded.node_id].own.instance != recorded.instance

    def _watch(self, node: Node) -> None:
        """Send the node what it has not seen, in order; all of it where the history is gone or the etcd is another."""
        if node.is_cut or self.etcd.is_away:
            if not node.inbox:
                node.inbox.append((self.now_s, SourceLost("unreachable")))
            return
        name, revision = node.watched
        latest = max((at_s for at_s, _ in node.inbox), default=0.0)
        at_s = max(latest, self.now_s + self.random.random())
        if name != self.etcd.name or revision < self.etcd.compacted:
            node.inbox.append((at_s, self.etcd.snapshot()))
        else:
            for changed in range(revision + 1, self.etcd.revision + 1):
                node.inbox.append((at_s, self.etcd.history[changed]))
        node.watched = (self.etcd.name, self.etcd.revision)

    def _act(self, node: Node) -> None:
        arrived = [event for at_s, event in node.inbox if at_s <= self.now_s]
        node.inbox = [(at_s, event) for at_s, event in node.inbox if at_s > self.now_s]
        for event in [Tick(self.now_s), *arrived]:
            for instruction in node.machine.handle(event):
                match instruction:
                    case Register() | Renew() | Announce():
                        self._send(node, instruction, self.now_s)
                    case PublishRing(ring):
                        self.rings_published += 1
                        known = self.rings.setdefault((node.machine.source, ring.revision), ring.nodes)
                        assert known == ring.nodes, f"two rings at revision {ring.revision}"

    def _send(self, node: Node, instruction: Register | Renew | Announce, sent_at_s: float) -> None:
        """The request arrives after a while at the etcd that is there then, or is lost; so does its answer."""
        if self.random.random() < self.loss:
            return
        at_s = self.now_s + self.random.random()
        self.on_their_way.append((at_s, lambda: self._arrive(node, instruction, sent_at_s)))

    def _arrive(self, node: Node, instruction: Register | Renew | Announce, sent_at_s: float) -> None:
        if node.is_cut or self.etcd.is_away or self.nodes[node.own.node_id] is not node:
            return
        held = self.etcd.records.get(node.own.node_id)
        expires_at_s = self.now_s + TTL_S
        answer: Event | None = None
        match instruction:
            case Register(record):
                incarnation = self.etcd.revision
                revision = self.etcd.put(replace(record, incarnation=incarnation), expires_at_s)
                answer = Joined(incarnation, revision, TTL_S, sent_at_s)
            case Renew(incarnation):
                if held is not None and held.incarnation == incarnation:
                    self.etcd.expires_at_s[held.node_id] = expires_at_s
                    answer = Renewed(incarnation, sent_at_s)
                else:
                    answer = LeaseLost(incarnation)
            case Announce(record):
                if held is not None and held.incarnation == record.incarnation:
                    self.etcd.put(record, self.etcd.expires_at_s[held.node_id])
        if answer is not None and self.random.random() >= self.loss:
            node.inbox.append((self.now_s + self.random.random(), answer))

    def strike(self) -> None:
        """Let one thing happen to one node or to the etcd."""
        node = self.nodes[self.random.choice(sorted(self.nodes))]
        match self.random.randrange(9):
            case 0 | 1:
                node.is_stopped = not node.is_stopped
            case 2 | 3:
                node.is_cut = not node.is_cut
            case 4:
                self.start(node.own.node_id)
            case 5:
                self.start(f"node-{len(self.nodes)}")
            case 6:
                self.etcd.is_away = not self.etcd.is_away
                if not self.etcd.is_away:  # it does not count the time in which it was away
                    for node_id in self.etcd.expires_at_s:
                        self.etcd.expires_at_s[node_id] = self.now_s + TTL_S
            case 7:
                self.etcd.compacted = self.etcd.revision
            case 8:
                self._drain_or_replace(node)

    def _drain_or_replace(self, node: Node) -> None:
        if self.random.random() < 0.5:
            node.is_drained = True
            node.inbox.append((self.now_s, DrainAsked()))
        else:
            self.etcd = Etcd(f"etcd-{self.now_s}", is_away=self.etcd.is_away)

    def heal(self) -> None:
        """End every fault that can end."""
        self.loss = 0.0
        if self.etcd.is_away:
            self.etcd.is_away = False
            for node_id in self.etcd.expires_at_s:
                self.etcd.expires_at_s[node_id] = self.now_s + TTL_S
        for node in self.nodes.values():
            node.is_stopped = node.is_cut = False
