"""Talking to the daemon: answers and errors, sockets that are used again, and every way in which the other end fails.

The daemon here is a few lines that answer by script, so that each failure comes exactly where the test wants it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestra.client.wire import ConnectionLostError, DaemonConnection
from orchestra.errors import DaemonUnavailableError, NotFoundError, OrchestraError, StaleObjectError, to_wire


def answer(body: bytes, status: int = 200, extra: str = "") -> bytes:
    return f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


class ScriptedDaemon:
    """Serves each connection in a thread; `reply` gets the request's bytes and the number of the request on its
    connection, and returns what to send, or None to close without an answer."""

    def __init__(self, path: Path) -> None:
        self.reply: Callable[[bytes, int], bytes | None] = lambda request, number: answer(b"{}")
        self.connections = 0
        self.requests: list[bytes] = []
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        number = 0
        with connection:
            while True:
                try:
                    request = _whole_request(connection)
                    if not request:
                        break
                    number += 1
                    self.requests.append(request)
                    reply = self.reply(request, number)
                    if reply is None:
                        break
                    connection.sendall(reply)
                except OSError:
                    break
            self._open.discard(connection)

    def hang_up(self) -> None:
        """Close every connection, as a daemon does that ends."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # its own thread may just be closing it
                connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(10)


def _whole_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    while lengths and len(body) < lengths[0]:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ScriptedDaemon]:
    running = ScriptedDaemon(tmp_path / "d.sock")
    yield running
    running.stop()


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[DaemonConnection]:
    opened = DaemonConnection(str(tmp_path / "d.sock"), timeout_s=10.0)
    yield opened
    opened.close()


def test_a_request_brings_its_answer(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """Method, route and JSON go out; the JSON object comes back; the request is counted."""
    daemon.reply = lambda request, _: answer(b'{"count": 3, "name": "\\udcff"}')
    assert connection.request("POST", "/v1/list", {"path": "/é"}) == {"count": 3, "name": "\udcff"}
    head, _, body = daemon.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/list HTTP/1.1\r\n")
    assert json.loads(body) == {"path": "/é"}
    assert connection.messages_sent == 1


def test_an_error_comes_back_as_itself(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """What the daemon raised is raised here, with its class and its sentence; the connection goes on."""
    daemon.reply = lambda *_: answer(json.dumps(to_wire(NotFoundError("no such file: /x"))).encode(), 404)
    for _ in range(2):
        with pytest.raises(NotFoundError, match="no such file: /x"):
            connection.request("POST", "/v1/stat", {})
    assert daemon.connections == 1


def test_one_socket_serves_many_requests(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """Requests that follow one another need one connection, from whatever thread they come."""
    threads = [threading.Thread(target=connection.request, args=("GET", "/v1/status")) for _ in range(20)]
    for thread in threads:
        thread.start()
        thread.join()
    assert daemon.connections == 1
    assert connection.messages_sent == 20


def test_requests_at_one_time_do_not_mix(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """Twenty threads that ask at once each get their own answer."""
    barrier = threading.Barrier(20)
    wrong: list[str] = []

    def echo(request: bytes, _: int) -> bytes:
        return answer(request.partition(b"\r\n\r\n")[2])

    def ask(number: int) -> None:
        barrier.wait()
        for turn in range(20):
            body = {"asked": f"{number}.{turn}"}
            if connection.request("POST", "/v1/echo", body) != body:
                wrong.append(body["asked"])

    daemon.reply = echo
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(daemon.requests) == 400
    assert daemon.connections <= 20


def test_an_idle_connection_that_was_closed_is_no_outage(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """A daemon that hangs up on idle clients, or was replaced by another, is simply asked again."""
    connection.request("GET", "/v1/status")
    daemon.hang_up()
    assert connection.request("GET", "/v1/status") == {}
    assert daemon.connections == 2


def test_the_last_answer_on_a_connection_is_heeded(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """After "Connection: close" the next request goes to a new one."""
    daemon.reply = lambda *_: answer(b"{}", extra="Connection: close\r\n")
    connection.request("GET", "/v1/status")
    connection.request("GET", "/v1/status")
    assert daemon.connections == 2


def test_nobody_there(connection: DaemonConnection) -> None:
    """Without a socket the connection is lost, and the error says where it was looked for."""
    with pytest.raises(ConnectionLostError, match=r"no daemon answers at .*d.sock: No such file"):
        connection.request("GET", "/v1/status")


def test_a_socket_that_nobody_serves(tmp_path: Path, connection: DaemonConnection) -> None:
    """The file that a killed daemon left behind refuses, and that is a lost connection too."""
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "d.sock"))
    left.close()
    with pytest.raises(ConnectionLostError, match="Connection refused"):
        connection.request("GET", "/v1/status")


CUTS = [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 -\r\nContent-Length: 10\r\n\r\n", answer(b'{"a": 1234}')[:-3]]


@pytest.mark.parametrize("sent", CUTS)
def test_an_answer_that_breaks_off_is_no_answer(
    daemon: ScriptedDaemon, connection: DaemonConnection, sent: bytes
) -> None:
    """Wherever the daemon dies in its answer, the connection is lost; half an answer is never taken for a whole one."""

    def cut(request: bytes, _: int) -> None:
        for one in list(daemon._open):
            one.sendall(sent)

    daemon.reply = cut
    with pytest.raises(ConnectionLostError):
        connection.request("GET", "/v1/status")
    daemon.reply = lambda *_: answer(b'{"fine": 1}')
    assert connection.request("GET", "/v1/status") == {"fine": 1}


def test_a_daemon_that_hangs_is_given_up(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    """No answer within the deadline is an error that names the socket; the late answer is not taken for the next."""
    late = threading.Event()

    def hang(request: bytes, _: int) -> bytes:
        if b"slow" in request:
            late.wait(10)
            return answer(b'{"late": 1}')
        return answer(b'{"quick": 1}')

    daemon.reply = hang
    connection = DaemonConnection(str(tmp_path / "d.sock"), timeout_s=0.05)
    with pytest.raises(DaemonUnavailableError, match=r"d.sock did not answer within 0 s"):
        connection.request("GET", "/slow")
    late.set()
    assert connection.request("GET", "/quick") == {"quick": 1}
    connection.close()


def test_what_is_not_our_protocol_is_said_to_be(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """Another program's answer is not taken for a lost daemon, which would be restarted."""
    daemon.reply = lambda *_: answer(b"<html>")
    with pytest.raises(DaemonUnavailableError, match="does not speak orchestra's protocol"):
        connection.request("GET", "/v1/status")


def test_bytes_go_straight_into_the_buffer(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """A data answer fills the caller's buffer, and may be shorter than it."""
    data = os.urandom(300_000)
    daemon.reply = lambda *_: answer(data)
    buffer = bytearray(400_000)
    assert connection.read_into("/v1/read", {}, memoryview(buffer)) == 300_000
    assert buffer[:300_000] == data
    assert buffer[300_000:] == bytes(100_000)


def test_more_bytes_than_asked_for_are_refused(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """They would not fit, and are no answer to the question; the connection is not used again."""
    daemon.reply = lambda *_: answer(b"x" * 11)
    with pytest.raises(OrchestraError, match="more bytes than were asked for"):
        connection.read_into("/v1/read", {}, memoryview(bytearray(10)))
    daemon.reply = lambda *_: answer(b"{}")
    assert connection.request("GET", "/v1/status") == {}
    assert daemon.connections == 2


def test_an_error_instead_of_bytes(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """A read that fails at the daemon raises its error and writes nothing into the buffer."""
    daemon.reply = lambda *_: answer(json.dumps(to_wire(StaleObjectError("it changed"))).encode(), 412)
    buffer = bytearray(100)
    with pytest.raises(StaleObjectError, match="it changed"):
        connection.read_into("/v1/read", {}, memoryview(buffer))
    assert buffer == bytes(100)


def test_a_forked_child_has_connections_of_its_own(daemon: ScriptedDaemon, connection: DaemonConnection) -> None:
    """Parent and child never write into one another's connection, and the parent's goes on working."""
    connection.request("GET", "/v1/status")
    pid = os.fork()
    if not pid:
        try:
            connection.request("GET", "/v1/status")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    connection.request("GET", "/v1/status")
    assert daemon.connections == 2
    assert len(daemon.requests) == 3


def test_a_connection_that_nobody_closes_is_no_leak(
    daemon: ScriptedDaemon, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """What a face keeps until its process ends closes its sockets without a warning."""
    connection = DaemonConnection(str(tmp_path / "d.sock"), timeout_s=5.0)
    connection.request("GET", "/v1/status")
    assert len(connection._idle) == 1
    del connection
    gc.collect()
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]
