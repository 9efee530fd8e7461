"""Talking to the node daemon: HTTP/1.1 over its unix socket, by plain blocking sockets.

A socket serves one request at a time and is then kept for the next, of whatever thread. Nothing needs a lock that a
fork could break: taking from a list and adding to it are single steps. A request that got no answer because the daemon
died is sent again to its successor: all requests may be repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Iterator
from typing import Any

from orchestra.errors import DaemonUnavailableError, OrchestraError, from_wire
from orchestra.values import Entry, EntryKind

_RECEIVE_BYTES = 64 * 1024
# An answer is a few hundred bytes; a listing of mounts or jobs some kilobytes. Data has a route of its own.
_ANSWER_LIMIT_BYTES = 64 * 1024 * 1024
# The listing of a directory of ten million names.
_BYTES_LIMIT = 1024 * 1024 * 1024
_HEADER_LIMIT_BYTES = 16 * 1024
# Sockets kept between requests; more threads than this at one moment connect anew, which costs 30 us.
_IDLE_SOCKETS_MAX = 64
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class ConnectionLostError(Exception):
    """The daemon is not there, or went away before it answered. Never leaves the client."""


class DaemonConnection:
    """Requests to one daemon. Any thread, any process."""

    def __init__(self, socket_path: str, *, timeout_s: float, owner_uid: int | None = None) -> None:
        """`owner_uid`: whose daemon it has to be, where the socket lies in a folder that others may write to."""
        self._owner_uid = owner_uid
        self.socket_path = socket_path
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._idle: list[socket.socket] = []
        self.messages_sent = 0

    def request(self, method: str, route: str, body: dict[str, Any] | bytes | None = None) -> dict[str, Any]:
        """Send one request, with a JSON object or plain bytes; return the JSON object of the answer.

        Raises the OrchestraError that the daemon answered with, ConnectionLostError if there was no answer,
        DaemonUnavailableError if it did not come in time.
        """
        with self._exchange(method, route, body) as answer:
            payload = answer.read_all()
        return _document(answer.status, payload, self.socket_path)

    def read_into(self, route: str, body: dict[str, Any], buffer: memoryview) -> int:
        """Send a request whose answer is bytes; put them into `buffer` and return how many came."""
        with self._exchange("POST", route, body) as answer:
            if answer.status != 200:
                payload = answer.read_all()
            elif answer.length > len(buffer):
                raise OrchestraError("the daemon sent more bytes than were asked for")
            else:
                return answer.read_into(buffer)
        raise from_wire(json.loads(payload))

    def fetch(self, route: str, body: dict[str, Any]) -> bytes:
        """Send a request whose answer is bytes, however many; return them."""
        with self._exchange("POST", route, body) as answer:
            payload = answer.read_all(_BYTES_LIMIT if answer.status == 200 else _ANSWER_LIMIT_BYTES)
            if answer.status == 200:
                return payload
        raise from_wire(json.loads(payload))

    def open_socket(self) -> socket.socket:
        """Return a new connection to the daemon, the caller's to close. Raises ConnectionLostError."""
        return self._connect()

    def count_message(self) -> None:
        """Count a request that went another way."""
        self.messages_sent += 1

    def close(self) -> None:
        """Close the sockets that no request uses."""
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread took the last one
                self._idle.pop().close()

    def __del__(self) -> None:
        # A face that nobody closes (fsspec keeps its file systems until the process ends) is no leak to warn of.
        for connection in self._idle:
            connection.close()

    @contextlib.contextmanager
    def _exchange(self, method: str, route: str, body: dict[str, Any] | bytes | None) -> Iterator[_Answer]:
        """Send a request and give its answer, whose body is to be read inside. The socket is kept if all went well."""
        message = _message(method, route, body)
        self.messages_sent += 1
        connection = self._take_idle()
        try:
            if connection is not None:
                try:
                    answer = _Answer(connection, message)
                except ConnectionLostError:
                    # The daemon closed it while it was idle, or is another one now: a new connection tells.
                    connection.close()
                    self.close()
                    connection = None
            if connection is None:
                connection = self._connect()
                answer = _Answer(connection, message)
            yield answer
        except BaseException as error:
            # Also Ctrl-C in the middle of an answer: the rest of it must not be taken for the next one.
            if connection is not None:
                connection.close()
            if isinstance(error, TimeoutError):
                text = f"the daemon at {self.socket_path} did not answer within {self._timeout_s:.0f} s"
                raise DaemonUnavailableError(text) from error
            raise
        if answer.is_last or len(self._idle) >= _IDLE_SOCKETS_MAX:
            connection.close()
        else:
            self._idle.append(connection)

    def _take_idle(self) -> socket.socket | None:
        if self._pid != os.getpid():  # the parent's: closing our copies leaves the parent's open
            self.close()
            self._pid = os.getpid()
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return None

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout_s)
        try:
            connection.connect(self.socket_path)
        except OSError as error:
            connection.close()
            raise ConnectionLostError(f"no daemon answers at {self.socket_path}: {error.strerror or error}") from error
        if self._owner_uid is not None:
            uid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            if uid != self._owner_uid:
                connection.close()
                raise DaemonUnavailableError(
                    f"refusing {self.socket_path}: uid {uid} listens there, and not uid {self._owner_uid}, the owner "
                    "of the cache directory"
                )
        return connection


class Posting:
    """Requests whose sender does not wait: each answer is looked at when the next request is sent. One thread, one
    process."""

    def __init__(self, connections: DaemonConnection) -> None:
        self._connections = connections
        self._socket: socket.socket | None = None  # has an answer outstanding

    @property
    def is_waiting(self) -> bool:
        """Whether an answer is outstanding and has not begun to come."""
        return self._socket is not None and not _is_readable(self._socket)

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Send a request and return the answer to the one before; None if there was none before. While that answer is
        outstanding nothing is sent, and None is returned.

        Raises what DaemonConnection.request raises; then what was outstanding is forgotten.
        """
        if self.is_waiting:
            return None
        connection, self._socket = self._socket, None
        document = None
        try:
            if connection is not None:
                try:
                    answer = _Answer(connection)
                    document = _document(answer.status, answer.read_all(), self._connections.socket_path)
                except ConnectionLostError:  # it is another daemon now, or none: a new connection tells
                    connection.close()
                    connection = None
            if connection is None:
                connection = self._connections.open_socket()
            _guarded(connection.sendall, _message("POST", route, body))
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, TimeoutError):
                raise DaemonUnavailableError("the daemon began an answer and did not end it") from error
            raise
        self._connections.count_message()
        self._socket = connection
        return document

    def close(self) -> None:
        """Forget what is outstanding. Idempotent."""
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()


class _Answer:
    """The answer to one request on one socket. Raises TimeoutError, and ConnectionLostError if it does not come."""

    def __init__(self, connection: socket.socket, message: bytes = b"") -> None:
        """Send `message`, unless that was done, and read the head of the answer."""
        self._connection = connection
        if message:
            _guarded(connection.sendall, message)
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            piece = _guarded(connection.recv, _RECEIVE_BYTES)
            if not piece or len(received) > _HEADER_LIMIT_BYTES + _RECEIVE_BYTES:
                raise ConnectionLostError("the daemon closed the connection before it answered")
            received += piece
        status_line, *lines = received[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status = int(status_line.split(" ", 2)[1])
        self.length = int(headers.get("content-length", 0))
        self.is_last = headers.get("connection", "").lower() == "close"
        self._begun = received[end + 4 : end + 4 + self.length]

    def read_all(self, limit_bytes: int = _ANSWER_LIMIT_BYTES) -> bytes:
        """Return the whole body."""
        if self.length > limit_bytes:
            raise DaemonUnavailableError(f"the daemon's answer of {self.length} bytes is over the limit")
        body = bytearray(self.length)
        self.read_into(memoryview(body))
        return bytes(body)

    def read_into(self, buffer: memoryview) -> int:
        """Put the whole body into `buffer`; return its length."""
        at = len(self._begun)
        buffer[:at] = self._begun
        while at < self.length:
            count = _guarded(self._connection.recv_into, buffer[at : self.length])
            if not count:
                raise ConnectionLostError("the daemon closed the connection in the middle of its answer")
            at += count
        return self.length


def _is_readable(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _guarded(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except TimeoutError:
        raise
    except OSError as error:
        raise ConnectionLostError(f"the connection to the daemon broke: {error.strerror or error}") from error


def _document(status: int, payload: bytes, socket_path: str) -> dict[str, Any]:
    """The JSON object of an answer. Raises the OrchestraError that it holds."""
    try:
        document = json.loads(payload) if payload else {}
    except ValueError as error:
        raise DaemonUnavailableError(f"{socket_path} does not speak orchestra's protocol") from error
    if status != 200:
        raise from_wire(document)
    return dict(document)


def _message(method: str, route: str, body: dict[str, Any] | bytes | None) -> bytes:
    is_plain = isinstance(body, bytes)
    payload = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
    head = f"{method} {route} HTTP/1.1\r\nHost: orchestra\r\n"
    if payload:
        kind = "octet-stream" if is_plain else "json"
        head += f"Content-Type: application/{kind}\r\nContent-Length: {len(payload)}\r\n"
    return head.encode("latin-1") + b"\r\n" + payload


def entry_from_wire(path: str, body: dict[str, Any]) -> Entry:
    """Return the entry that the daemon described."""
    try:
        return Entry(path, EntryKind(body["kind"]), body["size_bytes"], body["mtime_ns"], body["version"])
    except (KeyError, ValueError) as error:
        raise OrchestraError(f"the daemon's answer about {path} cannot be understood") from error


def range_to_wire(entry: Entry, digest: str, start: int, stop: int) -> dict[str, Any]:
    """Return how the bytes [start, stop) of an object are asked for."""
    return {
        "path": entry.path,
        "version": entry.version,
        "digest": digest,
        "size_bytes": entry.size_bytes,
        "start": start,
        "stop": stop,
    }
