"""Misses of a whole process on one connection, for a face that must not give each waiting reader a thread.

Owns: the client's end of `daemon/api/stream.py`. Leaves to others: everything unusual, which is asked for again by
`NodeHandle.readinto`; starting a daemon.

One thread asks and another takes the answers; nothing here is inherited by a fork (the face makes it after forking).
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable

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

    def answers(self) -> list[tuple[int, bool]]:
        """See MissStream."""
        while True:
            try:
                data = self._connection.recv(_RECEIVE_BYTES)
            except OSError:  # also a timeout
                return []
            if not data:
                return []
            if not self._is_switched:
                rest = self._switch(data)
                if rest is None:
                    return []
                data = rest
            *lines, self._rest = (self._rest + data).split(b"\n")
            if lines:
                try:
                    return [(int(line[:-2]), line.endswith(b" 1")) for line in lines]
                except ValueError:  # not our daemon
                    return []

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
