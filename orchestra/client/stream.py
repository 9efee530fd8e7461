"""Misses of a whole process on one connection, for a face that must not give each waiting reader a thread.

Owns: the client's end of `daemon/api/stream.py`. Leaves to others: everything unusual, which is asked for again by
`NodeHandle.readinto`; starting a daemon.

One thread asks and one takes the answers; nothing here is inherited by a fork (the face makes it after forking).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from functools import partial

from orchestra.client.contract import Handle
from orchestra.client.handle import NodeHandle

_UPGRADE = b"POST /v1/ensure_stream HTTP/1.1\r\nHost: orchestra\r\nConnection: Upgrade\r\n\r\n"
_RECEIVE_BYTES = 64 * 1024


class MissStream:
    """See `orchestra.client.contract.MissStream`."""

    def __init__(self, connection: socket.socket, count_message: Callable[[], None]) -> None:
        """Take over a connected socket, whose timeout bounds each wait for an answer."""
        self._connection = connection
        self._count_message = count_message
        self._rest = b""
        self._head = b""
        self._is_switched = False
        self._is_begun = False

    def ask(self, *wanted: tuple[int, Handle, int, int]) -> bool:
        """See MissStream."""
        lines = [] if self._is_begun else [_UPGRADE]
        for serial, handle, start, stop in wanted:
            assert isinstance(handle, NodeHandle), "the handle of another client"
            entry = handle.entry
            if not entry.path.isascii():
                try:
                    entry.path.encode()
                except UnicodeEncodeError:  # a name that is no UTF-8: the other route carries it
                    return False
            line = json.dumps((serial, entry.path, entry.version, handle.digest_hex, entry.size_bytes, start, stop))
            lines.append(f"{line}\n".encode())
        message = b"".join(lines)
        self._is_begun = True
        self._count_message()
        try:
            # A daemon that reads nothing must not hold up who asks: what does not fit ends the stream.
            if self._connection.send(message, socket.MSG_DONTWAIT) == len(message):
                return True
        except OSError:
            pass
        self.shut_down()
        return False

    @property
    def descriptor(self) -> int:
        """See MissStream."""
        return self._connection.fileno()

    @property
    def patience_ns(self) -> int:
        """See MissStream."""
        return int((self._connection.gettimeout() or 0) * 1e9)

    def answers(self) -> list[tuple[int, bool]]:
        """See MissStream."""
        answers: list[tuple[int, bool]] | None = []
        while answers is not None and not answers:
            answers = self._take(lambda: self._connection.recv(_RECEIVE_BYTES))
        return answers or []

    def answers_now(self) -> list[tuple[int, bool]] | None:
        """See MissStream."""
        # A socket with a timeout does not block by itself; its own `recv` would look first whether there is anything.
        return self._take(partial(os.read, self._connection.fileno(), _RECEIVE_BYTES))

    def _take(self, receive: Callable[[], bytes]) -> list[tuple[int, bool]] | None:
        """Return the answers that one receive completes; None at the end, and after a timeout."""
        try:
            data = receive()
        except BlockingIOError:
            return []
        except OSError:  # also a timeout
            return None
        if data and not self._is_switched:
            rest = self._switch(data)
            if rest is None:
                return None
            if not rest:
                return []
            data = rest
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            return [(int(line[:-2]), line.endswith(b" 1")) for line in lines]
        except ValueError:  # not our daemon
            return None

    def _switch(self, data: bytes) -> bytes | None:
        """Take the head of the answer; None if it is not the one that was hoped for."""
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return b""
        if not self._head.startswith(b"HTTP/1.1 101 "):
            return None
        self._is_switched = True
        return self._head[end + 4 :]

    def shut_down(self) -> None:
        """See MissStream. The descriptor is closed with the object: the other thread may be about to use it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        self._connection.close()
