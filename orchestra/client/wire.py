"""Talking to the node daemon: HTTP/1.1 over its unix socket, by a plain blocking socket.

A socket of its own for every thread and every process: nothing is shared, so nothing needs a lock that a fork could
break. A request that got no answer because the daemon died is sent again to its successor: all requests may be repeated.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import Any

from orchestra.errors import DaemonUnavailableError, OrchestraError, from_wire

_RECEIVE_BYTES = 64 * 1024
# An answer is a few hundred bytes; a listing of mounts or jobs some kilobytes. Data has a route of its own.
_ANSWER_LIMIT_BYTES = 64 * 1024 * 1024
_HEADER_LIMIT_BYTES = 16 * 1024


class ConnectionLostError(Exception):
    """The daemon is not there, or went away before it answered. Never leaves the client."""


class DaemonConnection:
    """Requests to one daemon. Any thread, any process."""

    def __init__(self, socket_path: str, *, timeout_s: float) -> None:
        self._socket_path = socket_path
        self._timeout_s = timeout_s
        self._local = threading.local()
        self.messages_sent = 0

    def request(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send one request; return the JSON object of the answer.

        Raises the OrchestraError that the daemon answered with, ConnectionLostError if there was no answer.
        """
        status, payload = self._exchange(method, route, body)
        try:
            answer = json.loads(payload) if payload else {}
        except ValueError as error:
            raise DaemonUnavailableError(f"{self._socket_path} does not speak orchestra's protocol") from error
        if status != 200:
            raise from_wire(answer)
        return dict(answer)

    def read_into(self, route: str, body: dict[str, Any], buffer: memoryview) -> int:
        """Send a request whose answer is bytes; put them into `buffer` and return how many came."""
        connection = self._send("POST", route, body)
        status, received, length = self._receive_head(connection)
        if status != 200:
            payload = self._receive_body(connection, received, length)
            raise from_wire(json.loads(payload))
        if length > len(buffer):
            self.close()
            raise OrchestraError("the daemon sent more bytes than were asked for")
        buffer[: len(received)] = received
        at = len(received)
        while at < length:
            count = self._guard(connection.recv_into, buffer[at:length])
            if not count:
                self.close()
                raise ConnectionLostError("the daemon cut the answer short")
            at += count
        return length

    def close(self) -> None:
        """Close this thread's socket."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def _exchange(self, method: str, route: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        connection = self._send(method, route, body)
        status, received, length = self._receive_head(connection)
        return status, self._receive_body(connection, received, length)

    def _send(self, method: str, route: str, body: dict[str, Any] | None) -> socket.socket:
        payload = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {route} HTTP/1.1\r\nHost: orchestra\r\n"
        if payload:
            head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        connection = self._connection()
        self.messages_sent += 1
        try:
            connection.sendall(head.encode("latin-1") + b"\r\n" + payload)
        except OSError:
            # The daemon may have closed an idle connection just now; a new one tells.
            self.close()
            connection = self._connection()
            self._guard(connection.sendall, head.encode("latin-1") + b"\r\n" + payload)
        return connection

    def _connection(self) -> socket.socket:
        local = self._local
        connection: socket.socket | None = getattr(local, "connection", None)
        if connection is not None and local.pid == os.getpid():
            return connection
        if connection is not None:
            connection.close()  # the parent's: closing our copy leaves the parent's open
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout_s)
        try:
            connection.connect(self._socket_path)
        except OSError as error:
            connection.close()
            local.connection = None
            raise ConnectionLostError(f"no daemon answers at {self._socket_path}: {error.strerror}") from error
        local.connection, local.pid = connection, os.getpid()
        return connection

    def _receive_head(self, connection: socket.socket) -> tuple[int, bytes, int]:
        """Return (status, what came after the head, content length)."""
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            piece = self._guard(connection.recv, _RECEIVE_BYTES)
            if not piece or len(received) > _HEADER_LIMIT_BYTES + _RECEIVE_BYTES:
                self.close()
                raise ConnectionLostError("the daemon closed the connection before it answered")
            received += piece
        lines = received[:end].decode("latin-1").split("\r\n")
        length = 0
        for line in lines[1:]:
            name, _, value = line.partition(":")
            if name.lower() == "content-length":
                length = int(value)
        return int(lines[0].split(" ", 2)[1]), received[end + 4 :], length

    def _receive_body(self, connection: socket.socket, received: bytes, length: int) -> bytes:
        if length > _ANSWER_LIMIT_BYTES:
            self.close()
            raise DaemonUnavailableError(f"the daemon's answer of {length} bytes is over the limit")
        pieces = [received]
        at = len(received)
        while at < length:
            piece = self._guard(connection.recv, min(length - at, 1 << 20))
            if not piece:
                self.close()
                raise ConnectionLostError("the daemon closed the connection in the middle of its answer")
            pieces.append(piece)
            at += len(piece)
        return b"".join(pieces)

    def _guard(self, call: Any, *arguments: Any) -> Any:
        """Run a socket call; after a failure the connection is of no more use."""
        try:
            return call(*arguments)
        except TimeoutError as error:
            self.close()
            raise DaemonUnavailableError(
                f"the daemon at {self._socket_path} did not answer within {self._timeout_s:.0f} s"
            ) from error
        except OSError as error:
            self.close()
            raise ConnectionLostError(f"the connection to the daemon broke: {error.strerror}") from error
        except BaseException:
            self.close()  # Ctrl-C in the middle of an answer: the rest of it must not be taken for the next one
            raise
