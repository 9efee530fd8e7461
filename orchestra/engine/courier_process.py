"""The courier: a process of the daemon that sends signed requests and puts what comes into the cache directory.

Owns: the connections, and the steps from an answer to bytes that are ready. Leaves to others: everything that is
decided (courier.py, in the daemon): what is asked for, how much at once, and whether what was written counts. It keeps
no accounts and makes nothing visible: a small object lies in tmp/ until the daemon renames it, and a block of an
extent is nobody's until the daemon marks it. So it may be killed at any moment.

It ends when the daemon's end of the socket is closed, however that came about.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import ssl
import sys
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
    unpack_carry,
)
from orchestra.errors import OrchestraError
from orchestra.stores.carrying import Errand, Server
from orchestra.stores.range_answers import check_plain_answer
from orchestra.stores.range_client import NotPlainError, RangeClient, ssl_context_of, ssl_setting_of
from orchestra.stores.translate import Operation

log = logging.getLogger(__name__)

# As in the daemon (daemon/main.py): what is in flight need not be looked at for every few files.
_NEW_OBJECTS_MAX = 10_000


class Carrying(Conversation):
    """The daemon's connection, at its courier's end."""

    def __init__(self) -> None:
        super().__init__()
        self._files: BlockFiles | None = None
        self._geometry = Geometry(4096, 4096)
        self._servers: dict[int, Server] = {}
        self._clients: dict[int, RangeClient] = {}
        self._errands: dict[int, asyncio.Task[None]] = {}
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol: the daemon has ended, or wants us no more."""
        if not self.ended.done():
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        for kind, number, body in self._messages.feed(data):
            match kind:
                case Kind.CARRY:
                    index, place, errand = unpack_carry(body, self._servers)
                    task = self._loop.create_task(self._carry(number, self._clients[index], place, errand))
                    self._errands[number] = task
                case Kind.CANCEL:
                    if number in self._errands:
                        self._errands[number].cancel()
                case Kind.SERVER:
                    self._servers[number] = server = server_of(body)
                    self._clients[number] = _client_of(server)
                case Kind.SETUP:
                    self._set_up(setup_of(body))

    def _set_up(self, setup: Setup) -> None:
        self._geometry = Geometry(setup.block_size_bytes, setup.extent_size_bytes)
        layout = CacheLayout(Path(setup.cache_dir))
        self._files = BlockFiles(layout, self._geometry, boot_id=bytes.fromhex(setup.boot_id), disk=LocalDisk())
        self.say(message(Kind.READY, 0))

    async def _carry(self, number: int, client: RangeClient, place: Place, errand: Errand) -> None:
        try:
            self.say(await self._outcome(number, client, place, errand))
        except TimeoutError:
            self.say(message(Kind.STALLED, number))
        except (NotPlainError, OSError, ssl.SSLError, OrchestraError):
            # The daemon tries itself then, and says what fails in its own words.
            self.say(message(Kind.FAILED, number))
        except Exception:  # the task's outermost frame: an errand without an answer would be waited for
            log.exception("an errand failed for a reason that nobody thought of")
            self.say(message(Kind.FAILED, number))
        finally:
            del self._errands[number]

    async def _outcome(self, number: int, client: RangeClient, place: Place, errand: Errand) -> bytes:
        answer = await client.send(errand.request, errand.byte_range)
        try:
            check_plain_answer(
                answer,
                _OPERATION,
                byte_range=errand.byte_range,
                size_bytes=errand.size_bytes,
                version=errand.version,
                now_s=0.0,
            )
        except OrchestraError:
            return answer_message(number, answer)
        return placed_message(number, self._put(place, errand, answer.data))

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


def main() -> None:
    """Carry for the daemon that started this process; its socket is the descriptor named by the first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, whose end ends us
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS_MAX, *gc.get_threshold()[1:])
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        sock.setblocking(False)
        asyncio.run(serve(sock))


if __name__ == "__main__":
    main()
