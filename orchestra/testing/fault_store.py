"""A store that fails when told to: wraps any UnderStore and does something to its k-th request.

Owns: the script of faults, and proof that they fired. Leaves to others: faults on the wire (fault_proxy.py).

    store = FaultStore(inner)
    fault = store.inject(Fail(StoreUnavailableError("503")), on="read", at=2, times=3)
    ...
    assert fault.fired == 3

    stall = store.inject(Stall(), on="read")
    reading = asyncio.create_task(store.read(info, span))
    await stall.wait_fired()      # the read is inside the store now
    stall.release()
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from orchestra.errors import OrchestraError
from orchestra.stores.contract import Buffer, ListPage, UnderStore
from orchestra.stores.pages import PagesThrough
from orchestra.values import ByteRange, ObjectInfo

Kind = Literal["head", "list", "read", "probe"]
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait before asking the store."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Fail:
    """Raise this instead of asking the store."""

    error: OrchestraError


@dataclass(frozen=True, slots=True)
class Stall:
    """Do not answer until the fault is released (or the call cancelled); then ask the store."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Return only the first bytes of a read, as a store does that does not check what it got."""

    keep_bytes: int


@dataclass(frozen=True, slots=True)
class Flip:
    """Return a read with the bits of one byte turned over."""

    at_byte: int = 0


@dataclass(frozen=True, slots=True)
class Swap:
    """Call this before asking the store: replaces or deletes the object underneath, at exactly this moment."""

    call: Callable[[], Awaitable[None]]


Action = Delay | Fail | Stall | Cut | Flip | Swap


class Fault:
    """One entry of the script; `fired` counts the requests it was done to."""

    def __init__(self, action: Action, kind: Kind, at: int, times: int | None) -> None:
        self.action = action
        self.kind = kind
        self.fired = 0
        self._at = at
        self._times = times
        self._seen = 0
        self._fired_event = asyncio.Event()
        self._released = asyncio.Event()

    async def wait_fired(self) -> None:
        """Wait until the fault has been reached once."""
        await self._fired_event.wait()

    async def wait_released(self) -> None:
        """Wait for `release`."""
        await self._released.wait()

    def release(self) -> None:
        """End a stall, now and for later requests."""
        self._released.set()

    def is_due(self, kind: Kind) -> bool:
        """Count a request of `kind`; return whether the fault is for it."""
        if kind != self.kind:
            return False
        self._seen += 1
        due = self._seen >= self._at and (self._times is None or self._seen < self._at + self._times)
        if due:
            self.fired += 1
            self._fired_event.set()
        return due


class FaultStore:
    """Forwards everything; a request with a fault in the script gets it. With several due, all are done in order."""

    def __init__(self, inner: UnderStore) -> None:
        self._inner = inner
        self._faults: list[Fault] = []
        self.requests: dict[Kind, int] = {"head": 0, "list": 0, "read": 0, "probe": 0}

    def inject(self, action: Action, *, on: Kind, at: int = 1, times: int | None = 1) -> Fault:
        """Do `action` to `times` requests of kind `on` (None: to all), from the `at`-th after now. A page is a list
        request."""
        assert at >= 1, "requests are counted from one"
        fault = Fault(action, on, at, times)
        self._faults.append(fault)
        return fault

    @property
    def store_id(self) -> str:
        return self._inner.store_id

    async def _before(self, kind: Kind) -> list[Action]:
        """Do what comes before the request; return what is due for its answer."""
        self.requests[kind] += 1
        due = [fault for fault in self._faults if fault.is_due(kind)]
        for fault in due:
            match fault.action:
                case Delay(seconds):
                    await asyncio.sleep(seconds)
                case Fail(error):
                    raise error
                case Stall():
                    await fault.wait_released()
                case Swap(call):
                    await call()
        return [fault.action for fault in due]

    async def head(self, key: str) -> ObjectInfo:
        await self._before("head")
        return await self._inner.head(key)

    def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        async def faulty(request: Callable[[], Awaitable[ListPage]]) -> ListPage:
            await self._before("list")
            return await request()

        return PagesThrough(self._inner.list_directory(prefix), faulty)

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        due = await self._before("read")
        data = await self._inner.read(info, byte_range)
        for action in due:
            data = _spoiled(data, action)
        return data

    async def probe(self) -> None:
        await self._before("probe")
        await self._inner.probe()

    async def close(self) -> None:
        await self._inner.close()


def _spoiled(data: Buffer, action: Action) -> Buffer:
    if isinstance(action, Cut):
        return bytes(data)[: action.keep_bytes]
    if isinstance(action, Flip):
        spoiled = bytearray(data)
        spoiled[action.at_byte] ^= 0xFF
        return bytes(spoiled)
    return data
