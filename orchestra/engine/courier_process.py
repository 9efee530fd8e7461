"""The courier: a process of the daemon that sends signed requests and puts what comes into the cache directory.

Owns: the connections, and the steps from an answer to bytes that are ready. Leaves to others: everything that is
decided (courier.py, in the daemon): what is asked for, how much at once, and whether what was written counts. It keeps
no accounts and makes nothing visible: a small object lies in tmp/ until the daemon renames it, and a block of an
extent is nobody's until the daemon marks it. So it may be killed at any moment.

It ends when the daemon's end of the socket is closed, however that came about, and at once when the daemon is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import signal
import socket
import ssl
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import crc32c

from orchestra.blocks.disk import LocalDisk
from orchestra.blocks.files import BlockFiles
from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout
from orchestra.blocks.store import Placed
from orchestra.engine.courier_wire import (
    Conversation,
    Kind,
    Place,
    Setup,
    answer_message,
    message,
    placed_message,
    server_of,
    setup_of,
    turns_message,
    unpack_carry,
    unpack_turns,
)
from orchestra.errors import OrchestraError
from orchestra.stores.carrying import Errand, Server
from orchestra.stores.range_answers import check_plain_answer
from orchestra.stores.range_client import NotPlainError, RangeAnswer, RangeClient, ssl_context_of, ssl_setting_of
from orchestra.stores.translate import Operation

log = logging.getLogger(__name__)

# As in the daemon (daemon/main.py): what is in flight need not be looked at for every few files.
_NEW_OBJECTS_MAX = 10_000


_PR_SET_PDEATHSIG = 1


class _Lane:
    """The errands of one store: those under way, and those that wait for one of its turns."""

    def __init__(self, index: int, server: Server) -> None:
        self.index = index
        self.client = _client_of(server)
        self.turns = 0
        self.shed = 0  # turns to give back as soon as nothing is under way in them
        self.waiting: OrderedDict[int, tuple[Place, Errand]] = OrderedDict()
        self.under_way: dict[int, Callable[[], object]] = {}  # and what takes each back


class Carrying(Conversation):
    """The daemon's connection, at its courier's end."""

    def __init__(self) -> None:
        super().__init__()
        self._files: BlockFiles | None = None
        self._geometry = Geometry(4096, 4096)
        self._servers: dict[int, Server] = {}
        self._lanes: dict[int, _Lane] = {}
        self._lane_of: dict[int, _Lane] = {}  # of an errand
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol: the daemon has ended, or wants us no more. So nothing more is wanted of the store:
        what it sends while this process ends would be paid for, and is lost."""
        for lane in self._lanes.values():
            lane.waiting.clear()
            for take_back in lane.under_way.values():
                take_back()
            lane.under_way.clear()
        if not self.ended.done():
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        called: set[_Lane] = set()
        for kind, number, body in self._messages.feed(data):
            match kind:
                case Kind.CARRY:
                    index, place, errand = unpack_carry(body, self._servers)
                    lane = self._lane_of[number] = self._lanes[index]
                    lane.waiting[number] = (place, errand)
                    called.add(lane)
                case Kind.GRANT:
                    lane = self._lanes[number]
                    lane.turns += unpack_turns(body)
                    called.add(lane)
                case Kind.SHED:
                    lane = self._lanes[number]
                    lane.shed += unpack_turns(body)
                    called.add(lane)
                case Kind.HASTEN:
                    self._hasten(number)
                case Kind.CANCEL:
                    self._cancel(number)
                case Kind.SERVER:
                    self._servers[number] = server = server_of(body)
                    self._lanes[number] = _Lane(number, server)
                case Kind.SETUP:
                    self._set_up(setup_of(body))
        for lane in called:
            self._go_on(lane)

    def _set_up(self, setup: Setup) -> None:
        self._geometry = Geometry(setup.block_size_bytes, setup.extent_size_bytes)
        layout = CacheLayout(Path(setup.cache_dir))
        self._files = BlockFiles(layout, self._geometry, boot_id=bytes.fromhex(setup.boot_id), disk=LocalDisk())
        self.say(message(Kind.READY, 0))

    def _hasten(self, number: int) -> None:
        lane = self._lane_of.get(number)
        if lane is not None and number in lane.waiting:
            lane.waiting.move_to_end(number, last=False)

    def _cancel(self, number: int) -> None:
        lane = self._lane_of.pop(number, None)
        if lane is not None and lane.waiting.pop(number, None) is None:
            lane.under_way.pop(number)()
            self._go_on(lane)

    def _go_on(self, lane: _Lane) -> None:
        """Give back the turns that are wanted back, and send what there are turns for."""
        returned = min(lane.shed, lane.turns - len(lane.under_way))
        if returned > 0:
            lane.turns -= returned
            lane.shed -= returned
            self.say(turns_message(Kind.RETURNED, lane.index, returned))
        while lane.waiting and len(lane.under_way) < lane.turns:
            number, (place, errand) = lane.waiting.popitem(last=False)
            ended = partial(self._ended, number, place, errand)
            lane.under_way[number] = lane.client.send_soon(errand.request, errand.byte_range, ended)

    def _ended(self, number: int, place: Place, errand: Errand, outcome: RangeAnswer | BaseException) -> None:
        lane = self._lane_of.pop(number)
        del lane.under_way[number]
        self._go_on(lane)  # first, so that the store works while we do
        try:
            self.say(self._said(number, place, errand, outcome))
        except (NotPlainError, OSError, ssl.SSLError, OrchestraError):
            # The daemon tries itself then, and says what fails in its own words.
            self.say(message(Kind.FAILED, number))
        except Exception:  # the errand's outermost frame: one without an answer would be waited for
            log.exception("an errand failed for a reason that nobody thought of")
            self.say(message(Kind.FAILED, number))

    def _said(self, number: int, place: Place, errand: Errand, outcome: RangeAnswer | BaseException) -> bytes:
        if isinstance(outcome, TimeoutError):
            return message(Kind.STALLED, number)
        if isinstance(outcome, BaseException):
            raise outcome
        try:
            check_plain_answer(
                outcome,
                _OPERATION,
                byte_range=errand.byte_range,
                size_bytes=errand.size_bytes,
                version=errand.version,
                now_s=0.0,
            )
        except OrchestraError:
            return answer_message(number, outcome)
        return placed_message(number, self._put(place, errand, outcome.data))

    def _put(self, place: Place, errand: Errand, data: memoryview) -> Placed:
        files, geometry = self._files, self._geometry
        assert files is not None, "SETUP comes first"
        if not place.inode:
            with files.small_ready(place.digest, data) as temporary:
                return Placed(path=temporary.path)
        extent = place.block // geometry.blocks_per_extent
        offset = (place.block - extent * geometry.blocks_per_extent) * geometry.block_size_bytes
        crc = crc32c.crc32c(data)
        files.write_placed(place.digest, extent, place.inode, data, offset)
        return Placed(crc=crc)


# An answer that is refused is judged again by the daemon, which knows what was asked for.
_OPERATION = Operation("read", "", "")


def _client_of(server: Server) -> RangeClient:
    context = None
    if server.base_url.startswith("https:"):
        context = ssl_context_of(ssl_setting_of(server.ca_file, allow_invalid=server.allow_invalid_certificates))
    return RangeClient(server.base_url, ssl_context=context, stall_timeout_s=server.stall_timeout_s)


async def serve(sock: socket.socket) -> None:
    """Carry for the daemon at the other end of `sock` until it closes."""
    loop = asyncio.get_running_loop()
    _, carrying = await loop.create_connection(Carrying, sock=sock)
    await carrying.ended


def _end_with_the_daemon() -> None:
    """Have the kernel end this process, be it stopped, when the thread has ended that started it (the daemon's loop).
    The next daemon empties tmp/ once: what was written there later would stay, and in nobody's accounts."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def main() -> None:
    """Carry for the daemon that started this process; its socket is the descriptor named by the first argument."""
    _end_with_the_daemon()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, whose end ends us
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS_MAX, *gc.get_threshold()[1:])
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        sock.setblocking(False)
        asyncio.run(serve(sock))


if __name__ == "__main__":
    main()
