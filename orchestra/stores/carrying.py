"""Reads whose bytes another process receives and puts in their place: what stores and that process say to each other.

Owns: the words, and the way through the wrappers around a store. Leaves to others: the process and its place for the
bytes (engine/courier.py), requests and what an answer must look like (http_client, range_answers). A store signs,
counts and limits such a read as any other; only the connection, and the bytes, are elsewhere.

Nothing here waits or makes a task: the wrappers' coroutines, and the tasks that wait in them, are most of what a small
file costs. So a carried read is tried once; whoever has it carried reads it in the usual way when that came to nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from orchestra.stores.contract import UnderStore
from orchestra.stores.range_client import RangeAnswer
from orchestra.values import ByteRange, ObjectInfo


class NotCarriedError(Exception):
    """Nothing came of it, and nothing is in its place: read it. No error of the store; never leaves the engine."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go, and how connections are made."""

    base_url: str
    stall_timeout_s: float
    ca_file: str = ""
    allow_invalid_certificates: bool = False


@dataclass(slots=True, eq=False)
class Errand:
    """A request that only has to be sent, and what its answer has to be. Not shown: it is signed."""

    server: Server
    request: bytes = field(repr=False)
    byte_range: ByteRange
    size_bytes: int
    version: str
    ticket: int = 0  # says under which limit it was made (limit.py)


# What became of an errand: None when exactly the bytes that were asked for are in their place, what the server said
# instead, TimeoutError for one that makes no progress, CancelledError when it was taken back, NotCarriedError.
Outcome = RangeAnswer | TimeoutError | asyncio.CancelledError | NotCarriedError | None


@runtime_checkable
class PlacingStore(UnderStore, Protocol):
    """A store whose reads can be carried: each is an `errand` that is concluded, sent in a turn that was taken."""

    @property
    def can_place(self) -> bool:
        """Whether the rest may be called; the same for the store's whole life."""
        ...

    def take_turn(self, who: object, urgency: int, granted: Callable[[], bool]) -> None:
        """Call `granted` when one more request may be in flight, now or later; it says whether the turn is taken, and
        must not raise. A turn is good for any number of requests, one after another."""
        ...

    def give_turn_back(self) -> None:
        """One less will be in flight."""
        ...

    def turns_wanted(self, who: object, urgency: int, turns: int) -> int:
        """How many of its `turns` somebody of that urgency should give back, for others or for the store's sake."""
        ...

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None:
        """Return the request, which counts from now on and has to be concluded; None if it takes a wait to make it, or
        cannot be carried."""
        ...

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None:
        """End the errand. Raises what `read` raises (once, without another try), and NotCarriedError."""
        ...


def as_placing(store: UnderStore | None) -> PlacingStore | None:
    """Return the store if its reads can be carried."""
    return store if isinstance(store, PlacingStore) and store.can_place else None


class PlacesThrough:
    """The way through a wrapper that has nothing to say to it."""

    def __init__(self, inner: UnderStore) -> None:
        self._placing = as_placing(inner)

    @property
    def can_place(self) -> bool:
        return self._placing is not None

    @property
    def placing(self) -> PlacingStore:
        """The wrapped store; only where `can_place`."""
        assert self._placing is not None, "can_place says so"
        return self._placing

    def take_turn(self, who: object, urgency: int, granted: Callable[[], bool]) -> None:
        self.placing.take_turn(who, urgency, granted)

    def give_turn_back(self) -> None:
        self.placing.give_turn_back()

    def turns_wanted(self, who: object, urgency: int, turns: int) -> int:
        return self.placing.turns_wanted(who, urgency, turns)

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None:
        return self.placing.errand(info, byte_range)

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None:
        self.placing.conclude(errand, info, outcome)
