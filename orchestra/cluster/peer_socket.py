"""Large answers of other nodes, received by threads: a few calls to the kernel a block.

Owns: the sockets, the threads, the memory that blocks are received into, checksums (which those threads compute).
Leaves to others: what is asked for, what an answer means (peer_client).

Why threads here and none for small objects: a block of 4 MiB comes in some sixty pieces, and for each of them an event
loop wakes up. A thread sleeps until the kernel has gathered a quarter of a mebibyte (SO_RCVLOWAT), and holds no lock
meanwhile. With four connections on two cores a loop reached half of what raw sendfile does, threads with MSG_WAITALL,
which the kernel wakes up for every piece, two thirds of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import crc32c

from orchestra.cluster.peer_wire import HEAD_BYTES_MAX, Cause, PeerError
from orchestra.stores.range_client import Buffers

# As many blocks of 4 MiB as may be in flight between nodes. Threads are made when they are needed.
_THREADS = 32
_ERROR_BODY_BYTES_MAX = 64 * 1024
_FIRST_READ_BYTES = 4096
_TIMEVAL = struct.Struct("@ll")
# Sleeping and waking up costs 10 us on both sides, and copying this much 30. More of it was no better, and leaves the
# other side less room before it has to wait.
_PIECE_BYTES = 256 * 1024
# How long memory is kept after the last request.
_MEMORY_KEPT_S = 2.0


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """A whole answer; `checksums` are of each `step` bytes of `data`. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    data: memoryview
    checksums: tuple[int, ...]


class Receivers:
    """Threads and memory that all peers of a node share. One event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="peers")
        self._buffers = Buffers()
        self._lock = threading.Lock()
        self._running = 0
        self._timer: asyncio.TimerHandle | None = None

    async def exchange(self, connection: BlockSocket, request: bytes, length: int, step: int) -> PeerAnswer:
        """Send the request and return the answer, whose body has at most `length` bytes if it is the one asked for.

        Raises PeerError, IdleClosedError. After an error or a cancellation the socket is shut.
        """
        loop = asyncio.get_running_loop()
        self._running += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        answer = self._threads.submit(self._run, connection, request, length, step)
        try:
            return await asyncio.wrap_future(answer)
        except BaseException:
            connection.shut()
            # Not before the thread has left it: another file could have its number by then.
            answer.add_done_callback(lambda _: connection.close())
            raise
        finally:
            self._running -= 1
            if not self._running:
                self._timer = loop.call_later(_MEMORY_KEPT_S, self._give_back)

    def close(self) -> None:
        """Let the threads end; those that receive end with their sockets."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._threads.shutdown(wait=False)

    def _run(self, connection: BlockSocket, request: bytes, length: int, step: int) -> PeerAnswer:
        status, headers, size = connection.ask(request, length)
        with self._lock:
            buffer = self._buffers.take(size)
        data = memoryview(buffer)
        connection.receive(data)
        if status != 206:
            return PeerAnswer(status, headers, data, ())
        checksums = tuple(crc32c.crc32c(data[at : at + step]) for at in range(0, size, step))
        return PeerAnswer(status, headers, data, checksums)

    def _give_back(self) -> None:
        self._timer = None
        with self._lock:
            self._buffers.clear()


class IdleClosedError(Exception):
    """The connection ended before the first byte of the answer."""


class BlockSocket:
    """One blocking connection, one request at a time; used by one thread at a time, shut from any."""

    def __init__(self, sock: socket.socket, stall_timeout_s: float) -> None:
        """Take over a connected socket. A call that waits returns after at most `stall_timeout_s`."""
        self._socket = sock
        self._stall_timeout_s = stall_timeout_s
        self._early = b""
        self._low_water_bytes = 1
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.is_usable = True
        sock.setblocking(True)
        seconds = int(stall_timeout_s)
        wait = _TIMEVAL.pack(seconds, int((stall_timeout_s - seconds) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def shut(self) -> None:
        """End what goes on on it; whoever waits in a call returns, and closes it then."""
        self.is_usable = False
        with contextlib.suppress(OSError):  # it had ended
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it; no thread uses it."""
        self.is_usable = False
        self._socket.close()

    def ask(self, request: bytes, length: int) -> tuple[int, dict[str, str], int]:
        """Send, and return the status, the headers and the length of the body, which `receive` takes.

        Raises PeerError, IdleClosedError. Blocks.
        """
        try:
            self._socket.sendall(request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise IdleClosedError from error
        except OSError as error:
            raise PeerError(Cause.NO_PROGRESS, f"the request was not taken: {error}") from error
        received = b""
        while True:
            end = received.find(b"\r\n\r\n")
            if end >= 0 and received[9:10] == b"1":  # it says that it is at work
                received = received[end + 4 :]
                continue
            if end >= 0:
                break
            if len(received) > HEAD_BYTES_MAX:
                raise PeerError(Cause.UNREADABLE, "the head of the answer is too long")
            received += self._some(bool(received))
        self._early = received[end + 4 :]
        return self._parsed(received[:end], length)

    def receive(self, data: memoryview) -> None:
        """Fill `data` with the body. Raises PeerError. Blocks."""
        at = len(self._early)
        if at > len(data):
            raise PeerError(Cause.UNREADABLE, "more bytes than the answer's length")
        data[:at] = self._early
        while at < len(data):
            try:
                self._wait_for(min(_PIECE_BYTES, len(data) - at))
                count = self._socket.recv_into(data[at:], len(data) - at, socket.MSG_DONTWAIT)
            except OSError as error:
                raise self._failure(error) from error
            if not count:
                raise PeerError(Cause.CUT_SHORT, f"the body ended after {at} of {len(data)} bytes")
            at += count
        self._set_low_water(1)

    def _wait_for(self, size_bytes: int) -> None:
        """Return when so much is here, or nothing more comes, or the stall timeout is over."""
        self._set_low_water(size_bytes)
        # Not by the call that receives: it would take what is here, and then wait for as much again.
        self._poll.poll(self._stall_timeout_s * 1000)

    def _set_low_water(self, size_bytes: int) -> None:
        if size_bytes != self._low_water_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)
            self._low_water_bytes = size_bytes

    def _some(self, is_begun: bool) -> bytes:
        try:
            data = self._socket.recv(_FIRST_READ_BYTES)
        except (ConnectionResetError, BrokenPipeError) as error:
            if not is_begun:
                raise IdleClosedError from error
            raise self._failure(error) from error
        except OSError as error:
            raise self._failure(error) from error
        if not data and not is_begun:
            raise IdleClosedError
        if not data:
            raise PeerError(Cause.CUT_SHORT, "the answer was cut short")
        return data

    def _failure(self, error: OSError) -> PeerError:
        if isinstance(error, BlockingIOError):
            return PeerError(Cause.NO_PROGRESS, f"no byte for {self._stall_timeout_s:g}s")
        return PeerError(Cause.CUT_SHORT, str(error))

    def _parsed(self, head: bytes, length: int) -> tuple[int, dict[str, str], int]:
        lines = head.decode("latin-1").split("\r\n")
        protocol, _, rest = lines[0].partition(" ")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        size = headers.get("content-length", "")
        is_plain = protocol == "HTTP/1.1" and rest[:3].isdigit() and "transfer-encoding" not in headers
        if not is_plain or not (size.isascii() and size.isdigit()):
            raise PeerError(Cause.UNREADABLE, "the answer has no plain length")
        status = int(rest[:3])
        limit = length if status == 206 else _ERROR_BODY_BYTES_MAX
        if int(size) > limit:
            raise PeerError(Cause.UNREADABLE, f"a body of {size} bytes where {limit} were expected")
        if headers.get("connection", "").lower() == "close":
            self.is_usable = False
        return status, headers, int(size)
