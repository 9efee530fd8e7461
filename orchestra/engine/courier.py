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
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    turns_message,
    unpack_answer,
    unpack_placed,
    unpack_turns,
)
from orchestra.engine.lanes import Lane
from orchestra.stores.carrying import Errand, NotCarriedError, PlacingStore, Server
from orchestra.stores.range_client import RangeAnswer
from orchestra.stores.timeout import attempt_limit_s

log = logging.getLogger(__name__)

# A start takes 0.15 s of CPU: who loads folder after folder has one process for all.
_KEPT_S = 10.0
# Starts for one load; a process that keeps dying is done without.
_STARTS_MAX = 3
# Without a sign of life for so long while errands wait, it is stopped or stuck, and is ended.
_SILENT_S = 5.0
# How often it is looked whether an errand is late, in parts of the time that one may take.
_LOOK_RATIO = 0.25
# All that Python and TLS look at there; none of it is a secret, and the mounts' secrets may be among the others.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SSL_CERT_FILE", "SSL_CERT_DIR", "GLIBC_TUNABLES")

# Called with what became of an errand.
Ended = Callable[[Placed | RangeAnswer | TimeoutError | NotCarriedError], None]


@dataclass(slots=True)
class _Sent:
    """An errand that the courier has; it is given up at `until`."""

    ended: Ended
    lane: Lane
    asked_at: float
    until: float


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
        self._carried = 0  # by processes that have ended

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

    def send(self, store: PlacingStore, place: Place, errand: Errand, ended: Ended) -> int:
        """Have the bytes of one read of `store` put there, in one of its turns; only while it `is_ready`. Returns what
        `take_back` and `hasten` want.

        `ended` is called once, later: with what was written, what the server said instead, TimeoutError for a server
        (or a courier) that makes no progress, or NotCarriedError. It must not raise.
        """
        assert self._link is not None, "is_ready says so"
        return self._link.carry(store, place, errand, ended)

    def take_back(self, number: int) -> None:
        """Have the errand given up; nothing more is said of it, and nothing of it stays."""
        if self._link is not None:
            self._link.take_back(number)

    def hasten(self, number: int, urgency: int) -> None:
        """Have the errand sent before all others, if it was not sent yet: somebody of that urgency waits for it."""
        if self._link is not None:
            self._link.hasten(number, urgency)

    @property
    def carried(self) -> int:
        """Errands done, since the start."""
        return self._carried + (0 if self._link is None else self._link.carried)

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
            self._carried = self.carried
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


class _Link(Conversation):
    """The connection to one courier, and the errands that it has."""

    def __init__(self, process: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        """`ready` is set when errands are taken."""
        super().__init__()
        self._process = process
        self._ready = ready
        self._serial = itertools.count()
        self._lanes: dict[tuple[PlacingStore, Server], tuple[int, Lane]] = {}
        self._errands: dict[int, _Sent] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._heard_at = self._loop.time()
        self.is_ready = False
        self.carried = 0

    def carry(self, store: PlacingStore, place: Place, errand: Errand, ended: Ended) -> int:
        """See Courier.send."""
        index, lane = self._lane(store, errand.server)
        number = next(self._serial)
        limit_s = errand.server.stall_timeout_s
        now = self._loop.time()
        # As long as a request may take; and as long again, because it may wait behind others.
        until = now + 2 * attempt_limit_s(limit_s, errand.byte_range.length)
        self._errands[number] = _Sent(ended, lane, now, until)
        self.say(carry_message(number, index, place, errand))
        lane.begin()
        if self._looking is None:
            self._looking = self._loop.call_later(limit_s * _LOOK_RATIO, self._look, limit_s)
        return number

    def take_back(self, number: int) -> None:
        """See Courier."""
        sent = self._errands.pop(number, None)
        if sent is not None:
            self.say(message(Kind.CANCEL, number))
            sent.lane.end(1)

    def hasten(self, number: int, urgency: int) -> None:
        """See Courier."""
        sent = self._errands.get(number)
        if sent is not None:
            self.say(message(Kind.HASTEN, number))
            sent.lane.hasten(urgency)

    def _lane(self, store: PlacingStore, server: Server) -> tuple[int, Lane]:
        known = self._lanes.get((store, server))
        if known is None:
            index = len(self._lanes)
            known = (index, Lane(store, lambda kind, count: self.say(turns_message(kind, index, count))))
            self._lanes[store, server] = known
            self.say(server_message(index, server))
        return known

    def close(self) -> None:
        """Take no more errands; those under way are over, and the process, be it stopped."""
        self.is_ready = False
        if self._transport is not None:
            self._transport.abort()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _look(self, limit_s: float) -> None:
        """Give up what is late. The courier itself notices a server that makes no progress; this is for one that
        trickles, and for a courier that is stopped or stuck."""
        self._looking = None
        now = self._loop.time()
        late = [(number, sent) for number, sent in self._errands.items() if sent.until <= now]
        # One that has no turns has nothing to say.
        asked = [sent.asked_at for _, sent in late if sent.lane.turns]
        if asked and now - max(self._heard_at, asked[0]) > _SILENT_S:
            log.warning("the courier (pid %d) is silent and is ended", self._process.pid)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        for number, sent in late:
            self.take_back(number)
            sent.ended(TimeoutError())
        if self._errands:
            self._looking = self._loop.call_later(limit_s * _LOOK_RATIO, self._look, limit_s)

    # -- called by the loop ----------------------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol: it has ended, or is to."""
        self.is_ready = False
        self._transport = None
        if self._looking is not None:
            self._looking.cancel()
        errands, self._errands = self._errands, {}
        for _, lane in self._lanes.values():
            lane.close()
        for sent in errands.values():
            sent.ended(NotCarriedError())

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._heard_at = self._loop.time()
        lanes: list[Lane] = []
        for kind, number, body in self._messages.feed(data):
            if kind == Kind.READY:
                self.is_ready = True
                self._ready.set()
                continue
            if kind == Kind.RETURNED:
                self._lane_at(number).returned(unpack_turns(body))
                continue
            sent = self._errands.pop(number, None)
            if sent is None:  # given up meanwhile
                if kind == Kind.PLACED:
                    _discard_placed(unpack_placed(body))
                continue
            if kind == Kind.PLACED:
                self.carried += 1
                sent.ended(unpack_placed(body))
            elif kind == Kind.ANSWERED:
                sent.ended(unpack_answer(body))
            elif kind == Kind.STALLED:
                sent.ended(TimeoutError())
            else:
                sent.ended(NotCarriedError())
            lanes.append(sent.lane)
        for lane in set(lanes):
            lane.end(lanes.count(lane))

    def _lane_at(self, index: int) -> Lane:
        return next(lane for at, lane in self._lanes.values() if at == index)


def _discard_placed(placed: Placed) -> None:
    """Remove a small object that nobody waits for any more."""
    if placed.path:
        _discard(placed.path)


def _discard(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(("PYTHON", "MALLOC_"))
    }
