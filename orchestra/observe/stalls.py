"""What readers waited for: counted where it happens, divided by cause, and one sentence of advice.

Owns: the causes, sums of waiting since the start and by the minute, how a training step's wait is divided, the advice;
all of it pure but for the table, which adds numbers. Leaves to others: measuring (engine, fetch, daemon/api,
torch/watching) and showing (cli/stalls).

What counts as waiting: a flight that some reader asked for, from then on until it landed. Queue: until the budget of
bytes in flight let it go; store, or peer: until the answer of the store, or of another node, was whole; disk: until it
was published. Metadata: look-ups and listings that had to ask. Five clock reads a miss.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestra.clock import Clock, SystemClock
from orchestra.units import format_duration, format_size

# The table's memory of the last hours, for scripts that say nothing about their epochs.
BUCKET_S = 60
_BUCKETS_MAX = 240
# Below this share of its time nobody notices what an epoch waits for data.
NOTICEABLE_RATIO = 0.01
# ... nor of all that a node's readers did, whose time the node does not know: some look-ups by `ls` take as long.
_NOTICEABLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds of waiting by cause."""

    store_s: float = 0.0
    peer_s: float = 0.0
    disk_s: float = 0.0
    metadata_s: float = 0.0
    queue_s: float = 0.0
    decode_s: float = 0.0  # the reader's own work: known to the training process alone

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.store_s + self.peer_s + self.disk_s + self.metadata_s + self.queue_s + self.decode_s

    def __add__(self, other: Waits) -> Waits:
        return Waits(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __sub__(self, other: Waits) -> Waits:
        return Waits(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def scaled(self, factor: float) -> Waits:
        """Every cause times `factor`."""
        return Waits(*(value * factor for value in dataclasses.astuple(self)))

    def largest(self) -> str:
        """The cause that was waited for most, without its unit."""
        return max(CAUSES, key=lambda cause: getattr(self, f"{cause}_s"))


CAUSES = tuple(field.name.removesuffix("_s") for field in dataclasses.fields(Waits))


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """What a node has done for its readers since its start; differences of two are what it did in between."""

    waits: Waits = Waits()
    misses: int = 0  # flights that were waited for, look-ups not counted
    fetched_bytes: int = 0
    store_busy_s: float = 0.0  # with at least one request in flight
    read_bytes: int = 0
    missed_bytes: int = 0
    capacity_bytes: int = 0

    def since(self, before: NodeFigures) -> NodeFigures:
        """What happened after `before`; a node that was started meanwhile counts from its start."""
        if before.misses > self.misses or before.read_bytes > self.read_bytes:
            return self
        return NodeFigures(
            self.waits - before.waits,
            self.misses - before.misses,
            self.fetched_bytes - before.fetched_bytes,
            self.store_busy_s - before.store_busy_s,
            self.read_bytes - before.read_bytes,
            self.missed_bytes - before.missed_bytes,
            self.capacity_bytes,
        )

    def to_json(self) -> dict[str, Any]:
        """As it travels."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> NodeFigures:
        """The figures that `to_json` described; unknown fields are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        waits = {name: float(value) for name, value in dict(body.get("waits", {})).items() if name[:-2] in CAUSES}
        return cls(**{**{name: body[name] for name in known & set(body)}, "waits": Waits(**waits)})


@dataclass(slots=True)
class _Bucket:
    number: int  # of BUCKET_S since boot
    waits: list[int]


class Marks(list[int]):
    """When a flight began, was granted its bytes, had received them and landed: as far as it has come."""

    is_from_peer = False  # another node of the cluster gave the bytes, and not the store


class StallTable:
    """Adds up what was waited for. One event loop; adding costs a list index or two."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.now_ns = (clock or SystemClock()).now_ns
        self._sums_ns = [0] * len(CAUSES)
        self._buckets: deque[_Bucket] = deque(maxlen=_BUCKETS_MAX)
        self.misses = 0

    def add_flight(self, wanted_ns: int, marks: Marks) -> None:
        """A flight landed that was wanted by a reader from `wanted_ns` on. What went by before somebody wanted it,
        nobody waited for."""
        begun_ns, granted_ns, received_ns, landed_ns = marks
        self.misses += 1
        self._add(_QUEUE, max(0, granted_ns - max(begun_ns, wanted_ns)), landed_ns)
        giver = _PEER if marks.is_from_peer else _STORE
        self._add(giver, max(0, received_ns - max(granted_ns, wanted_ns)), landed_ns)
        self._add(_DISK, max(0, landed_ns - max(received_ns, wanted_ns)), landed_ns)

    def add_metadata(self, began_ns: int) -> None:
        """A look-up or listing that began then is answered now."""
        now_ns = self.now_ns()
        self._add(_METADATA, now_ns - began_ns, now_ns)

    def waits(self) -> Waits:
        """Everything since the start."""
        return _waits(self._sums_ns)

    def minutes(self) -> list[tuple[int, Waits]]:
        """(how many minutes ago, what was waited for in it), the latest first; minutes without waiting are left out."""
        now = self.now_ns() // (BUCKET_S * 1_000_000_000)
        return [(now - bucket.number, _waits(bucket.waits)) for bucket in reversed(self._buckets)]

    def _add(self, cause: int, waited_ns: int, now_ns: int) -> None:
        self._sums_ns[cause] += waited_ns
        number = now_ns // (BUCKET_S * 1_000_000_000)
        if not self._buckets or self._buckets[-1].number != number:
            self._buckets.append(_Bucket(number, [0] * len(CAUSES)))
        self._buckets[-1].waits[cause] += waited_ns


_STORE, _PEER, _DISK, _METADATA, _QUEUE = map(CAUSES.index, ("store", "peer", "disk", "metadata", "queue"))


def _waits(sums_ns: Sequence[int]) -> Waits:
    return Waits(*(value / 1e9 for value in sums_ns))


def split_wait(waited_s: float, missed: Waits, readers_s: float) -> Waits:
    """Divide the time that a training step waited: of `readers_s` seconds of the loader's workers (their number times
    how long it was since the last look) they waited for `missed`. What was no miss was their own work: decoding, and
    reading what is here."""
    if waited_s <= 0:
        return Waits()
    share = min(1.0, missed.total_s / max(readers_s, waited_s))
    causes = missed.scaled(waited_s * share / missed.total_s) if missed.total_s > 0 else Waits()
    return dataclasses.replace(causes, decode_s=causes.decode_s + waited_s * (1 - share))


@dataclass(frozen=True, slots=True)
class EpochStalls:
    """One epoch of a training: how long it took, and what its steps waited for."""

    epoch: int
    steps: int
    time_s: float
    waits: Waits
    node: NodeFigures = NodeFigures()  # what the node did in that time

    @property
    def waited_ratio(self) -> float:
        """The share of its time that it waited."""
        return self.waits.total_s / self.time_s if self.time_s > 0 else 0.0


def advice(epoch: EpochStalls) -> str:
    """Return one plain sentence: what bound the epoch, and what would help."""
    if epoch.waited_ratio < NOTICEABLE_RATIO:
        share = f"{100 * epoch.waited_ratio:.1f} %"
        return f"epoch {epoch.epoch} waited for data {share} of its time: there is nothing to gain"
    if epoch.waits.largest() == "store":
        return _advice_about_the_store(epoch)
    waited = f"epoch {epoch.epoch} waited {format_duration(epoch.waits.total_s)} of {format_duration(epoch.time_s)}"
    return f"{waited}, most of it for {_REMEDIES[epoch.waits.largest()]}"


def node_advice(node: NodeFigures) -> str:
    """Return one plain sentence about all that a node's readers did, from its side alone."""
    if node.waits.total_s <= 0:
        return "no reader of this node has waited for anything"
    cause = node.waits.largest()
    waited = f"readers waited {format_duration(node.waits.total_s)} in all"
    if node.waits.total_s < _NOTICEABLE_S:
        return f"{waited}: there is nothing to gain"
    if cause != "store":
        return f"{waited}, most of it for {_REMEDIES[cause]}"
    gave = node.fetched_bytes / node.store_busy_s if node.store_busy_s > 0 else 0.0
    mean_ms = 1000 * node.waits.store_s / max(1, node.misses)
    text = f"{waited}, most of it for the store, which gave {format_size(gave)}/s, {mean_ms:.0f} ms a fetch"
    if node.fetched_bytes > node.capacity_bytes > 0:
        # What left and was fetched again is in it more than once: epochs would add up to any number.
        short = format_size(node.fetched_bytes - node.capacity_bytes)
        return f"{text}; a larger cache (by at most {short}) would keep what was fetched"
    return f"{text}; what was fetched is kept, so reading it again need not wait"


_REMEDIES = {
    "peer": "other nodes of the cluster: look at their disks and the network between them",
    "disk": "the cache's disk: put cache.dir on a faster one",
    "metadata": "look-ups of names: list the folder once before training, or give its mount a longer freshness",
    "queue": "their turn among requests: a larger fetch.in_flight_max lets more be asked for at once",
    "decode": "the loader's own work (decoding, transforms): more workers, or less work for each, would help",
}


def _advice_about_the_store(epoch: EpochStalls) -> str:
    node = epoch.node
    working_s = epoch.time_s - epoch.waits.total_s
    gave = node.fetched_bytes / node.store_busy_s if node.store_busy_s > 0 else 0.0
    read = node.read_bytes / working_s if working_s > 0 else 0.0
    if not gave or not read:
        return f"epoch {epoch.epoch} waited {format_duration(epoch.waits.total_s)} for the store"
    rates = f"the store gave {format_size(gave)}/s, you read {format_size(read)}/s"
    bound = (
        "is bound by the store"
        if gave < read
        else "waits for the store's latency: orchestra.torch.PlannedSampler hides it"
    )
    return f"{rates}: epoch {epoch.epoch} {bound}; {_advice_about_the_cache(epoch)}"


def _advice_about_the_cache(epoch: EpochStalls) -> str:
    short_bytes = epoch.node.read_bytes - epoch.node.capacity_bytes
    following = f"epoch {epoch.epoch + 1}"
    if epoch.node.capacity_bytes and short_bytes > 0:
        return f"{format_size(short_bytes)} more cache would make {following} free of waiting"
    return f"what it read fits in the cache, so {following} need not wait"
