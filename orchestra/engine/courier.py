"""The daemon's side of its courier: a second process that receives the bytes of loads and writes them.

One interpreter brings some 1,500 small files a second, whatever is in flight; half of what a file costs is receiving it
and writing it, which needs nothing that the daemon knows (docs/decisions/0007-courier.md). So while a load runs, a
process of its own does that half.

Owns: the process (started for a load, ended some seconds after the last), errands under way, what becomes of them when
it dies. Leaves to others: what is fetched, room, turns, signatures and retries, which stay in the daemon (engine,
stores), and what an errand's bytes must be (courier_process). Nothing depends on it: what it does not do, because it
is not up yet, died, or met anything unusual, the daemon does itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
from collections.abc import Iterator

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout
from orchestra.blocks.store import Placed
from orchestra.engine.courier_wire import (
    Conversation,
    Kind,
    Place,
    Setup,
    carry_message,
    message,
    server_message,
    unpack_answer,
    unpack_placed,
)
from orchestra.stores.carrying import Errand, NotCarriedError, Server
from orchestra.stores.range_client import RangeAnswer

log = logging.getLogger(__name__)

# A start takes 0.15 s of CPU: who loads folder after folder has one process for all.
_KEPT_S = 10.0
# Starts for one load; a process that keeps dying is done without.
_STARTS_MAX = 3
# Without a sign of life for so long while errands wait, it is stopped or stuck, and is ended.
_SILENT_S = 5.0
# All that Python and TLS look at there; none of it is a secret, and the mounts' secrets may be among the others.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SSL_CERT_FILE", "SSL_CERT_DIR", "GLIBC_TUNABLES")


class Courier:
    """One event loop. Starts nothing before somebody holds it."""

    def __init__(self, layout: CacheLayout, geometry: Geometry, *, boot_id: bytes) -> None:
        self._layout = layout
        self._setup = Setup(str(layout.root), geometry.block_size_bytes, geometry.extent_size_bytes, boot_id.hex())
        self._holders = 0
        self._running: asyncio.Task[None] | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._link: _Link | None = None
        self._ready = asyncio.Event()
        self._is_closed = False
        self.carried = 0  # errands done, since the start

    @property
    def is_ready(self) -> bool:
        """Whether errands are taken."""
        return self._link is not None and self._link.is_ready

    @property
    def pid(self) -> int | None:
        """The process's, while there is one."""
        return None if self._process is None else self._process.pid

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Have it started, and keep it while the block runs. Returns at once."""
        self._holders += 1
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="courier")
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._ending = asyncio.get_running_loop().call_later(_KEPT_S, self._end)

    async def wait_ready(self) -> None:
        """Return when a process takes errands; only while it is held, and it may die at once."""
        await self._ready.wait()

    def carrier(self, place: Place) -> PlaceCarrier:
        """Return what a store is given to have one read's bytes put there."""
        return PlaceCarrier(self, place)

    async def carry(self, place: Place, errand: Errand) -> Placed | RangeAnswer:
        """See Carrier."""
        if self._link is None:
            raise NotCarriedError
        outcome = await self._link.carry(place, errand)
        self.carried += isinstance(outcome, Placed)
        return outcome

    async def close(self) -> None:
        """End the process."""
        self._is_closed = True
        self._holders = 0
        if self._ending is not None:
            self._ending.cancel()
        self._end()
        if self._running is not None:
            await asyncio.gather(self._running, return_exceptions=True)

    # -- the process -----------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """End it, whatever it does: what it was about is nobody's yet."""
        self._ending = None
        if self._link is not None:
            self._link.close()

    async def _run(self) -> None:
        try:
            for _ in range(_STARTS_MAX):
                status = await self._run_once()
                if not self._holders:
                    return
                log.warning("the courier ended with status %s; what it was asked for is fetched without it", status)
        except OSError as error:
            log.warning("no courier can be started (%s): loads go on without one", error.strerror)
        finally:
            self._running = None

    async def _run_once(self) -> int:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            command = (sys.executable, "-m", "orchestra.engine.courier_process", str(theirs.fileno()))
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    env=_environment(),
                )
            except BaseException:
                ours.close()
                raise
        self._process = process
        loop = asyncio.get_running_loop()
        try:
            link = _Link(process, self._ready)
            await loop.create_connection(lambda: link, sock=ours)
            self._link = link
            link.say(self._setup.pack())
            if not self._holders:  # let go of while it started
                self._ending = self._ending or loop.call_later(0 if self._is_closed else _KEPT_S, self._end)
            return await process.wait()
        finally:
            self._link = self._process = None
            self._ready.clear()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            self._sweep(process.pid)

    def _sweep(self, pid: int) -> None:
        """Remove what it wrote and could not tell of. (What it told of is looked for in vain then, and read again.)"""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._layout.tmp):
                if entry.name.startswith(f"{pid}-"):
                    _discard(entry.path)


class PlaceCarrier:
    """See stores.carrying.Carrier; `placed` says what was written."""

    __slots__ = ("_courier", "_place", "placed")

    def __init__(self, courier: Courier, place: Place) -> None:
        self._courier = courier
        self._place = place
        self.placed = Placed()

    async def carry(self, errand: Errand) -> RangeAnswer | None:
        """See Carrier."""
        outcome = await self._courier.carry(self._place, errand)
        if isinstance(outcome, Placed):
            self.placed = outcome
            return None
        return outcome


class _Link(Conversation):
    """The connection to one courier, and the errands that it has."""

    def __init__(self, process: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        """`ready` is set when errands are taken."""
        super().__init__()
        self._process = process
        self._ready = ready
        self._serial = itertools.count()
        self._servers: dict[Server, int] = {}
        self._errands: dict[int, asyncio.Future[Placed | RangeAnswer]] = {}
        self._heard_at = self._loop.time()
        self.is_ready = False

    async def carry(self, place: Place, errand: Errand) -> Placed | RangeAnswer:
        """Hand an errand over and wait for what came of it."""
        if not self.is_ready:
            raise NotCarriedError
        index = self._servers.get(errand.server)
        if index is None:
            index = self._servers[errand.server] = len(self._servers)
            self.say(server_message(index, errand.server))
        number = next(self._serial)
        waiting: asyncio.Future[Placed | RangeAnswer] = self._loop.create_future()
        self._errands[number] = waiting
        self.say(carry_message(number, index, place, errand))
        asked_at = self._loop.time()
        try:
            return await waiting
        except asyncio.CancelledError:
            if self._errands.pop(number, None) is not None:
                self.say(message(Kind.CANCEL, number))
                self._end_if_silent(asked_at)
            elif waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                _discard_placed(waiting.result())
            raise

    def close(self) -> None:
        """Take no more errands; those under way are over, and the process, be it stopped."""
        self.is_ready = False
        if self._transport is not None:
            self._transport.abort()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _end_if_silent(self, asked_at: float) -> None:
        """An errand was given up: not for want of a server, if nothing at all was heard meanwhile."""
        if self._loop.time() - max(self._heard_at, asked_at) > _SILENT_S:
            log.warning("the courier (pid %d) is silent and is ended", self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    # -- called by the loop ----------------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol: it has ended, or is to."""
        self.is_ready = False
        self._transport = None
        errands, self._errands = self._errands, {}
        for waiting in errands.values():
            if not waiting.done():
                waiting.set_exception(NotCarriedError())

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._heard_at = self._loop.time()
        for kind, number, body in self._messages.feed(data):
            if kind == Kind.READY:
                self.is_ready = True
                self._ready.set()
                continue
            waiting = self._errands.pop(number, None)
            if waiting is None or waiting.done():  # given up meanwhile
                if kind == Kind.PLACED:
                    _discard_placed(unpack_placed(body))
            elif kind == Kind.PLACED:
                waiting.set_result(unpack_placed(body))
            elif kind == Kind.ANSWERED:
                waiting.set_result(unpack_answer(body))
            elif kind == Kind.STALLED:
                waiting.set_exception(TimeoutError())
            else:
                waiting.set_exception(NotCarriedError())


def _discard_placed(outcome: Placed | RangeAnswer) -> None:
    """Remove a small object that nobody waits for any more."""
    if isinstance(outcome, Placed) and outcome.path:
        _discard(outcome.path)


def _discard(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(("PYTHON", "MALLOC_"))
    }
