"""Every request is answered exactly once. The device is one end of a packet socket, the kernel is the test."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from orchestra.clock import ManualClock
from orchestra.errors import DaemonUnavailableError, NotFoundError
from orchestra.fuse.channel import Channel, Message, Undo
from orchestra.fuse.counters import Counters
from orchestra.fuse.protocol import HEADER_OUT, data_reply


@dataclass
class Device:
    """A channel and the kernel's end of its device."""

    channel: Channel
    kernel: socket.socket
    clock: ManualClock

    def answer(self) -> tuple[int, int, bytes]:
        """Return (errno, unique, body) of the next answer."""
        message = self.kernel.recv(1 << 20)
        _, code, unique = HEADER_OUT.unpack_from(message)
        return -code, unique, message[HEADER_OUT.size :]


@pytest.fixture
def device() -> Iterator[Device]:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.settimeout(20)
    with ours, kernel:
        clock = ManualClock()
        channel = Channel(ours.fileno(), Counters(), threads_max=4, daemon_wait_s=30.0, clock=clock, retry_s=0.001)
        yield Device(channel, kernel, clock)
        channel.close()


def test_a_waiting_request_is_answered_with_its_result(device: Device) -> None:
    """The worker's message goes out as it is."""
    device.channel.wait(5, lambda: (data_reply(5, b"x"), None))
    assert device.answer() == (0, 5, b"x")


def test_an_error_of_the_work_is_the_answer(device: Device) -> None:
    """Errors become their errno."""

    def fail() -> tuple[Message, Undo | None]:
        raise NotFoundError("no")

    device.channel.wait(5, fail)
    assert device.answer() == (errno.ENOENT, 5, b"")


def test_a_defect_is_answered_eio_and_counted(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody foresaw never leaves a reader hanging."""

    def fail() -> tuple[Message, Undo | None]:
        raise ZeroDivisionError

    device.channel.wait(5, fail)
    assert device.answer() == (errno.EIO, 5, b"")
    assert device.channel.counters.errors_unforeseen == 1
    assert "ZeroDivisionError" in caplog.text


def test_an_interrupted_request_is_answered_once_and_its_result_undone(device: Device) -> None:
    """EINTR at once; the late result is thrown away and takes its effects back."""
    go, undone = threading.Event(), threading.Event()

    def work() -> tuple[Message, Undo | None]:
        go.wait(20)
        return data_reply(5, b"late"), undone.set

    device.channel.wait(5, work)
    device.channel.interrupt(5)
    assert device.answer() == (errno.EINTR, 5, b"")
    go.set()
    assert undone.wait(20)
    device.channel.wait(6, lambda: (data_reply(6, b"next"), None))
    assert device.answer() == (0, 6, b"next")
    assert device.channel.counters.answered_late == 1


def test_interrupting_an_answered_request_does_nothing(device: Device) -> None:
    """A late INTERRUPT finds nothing to answer."""
    device.channel.wait(5, lambda: (data_reply(5, b"x"), None))
    assert device.answer()[1] == 5
    device.channel.interrupt(5)
    assert device.channel.counters.interrupted == 0


def test_waiting_requests_do_not_wait_for_one_another(device: Device) -> None:
    """As many as there may be threads run at the same time."""
    together = threading.Barrier(4)

    def work() -> tuple[Message, Undo | None]:
        together.wait(20)
        return data_reply(1, b""), None

    for unique in range(1, 5):
        device.channel.wait(unique, work)
    assert [device.answer()[0] for _ in range(4)] == [0] * 4
    assert device.channel.threads_started == 4


def test_more_requests_than_threads_queue_and_are_all_answered(device: Device) -> None:
    """The number of threads is a bound, not a limit on requests."""
    go = threading.Event()

    def work_for(unique: int) -> tuple[Message, Undo | None]:
        go.wait(20)
        return data_reply(unique, b""), None

    for unique in range(1, 51):
        device.channel.wait(unique, lambda unique=unique: work_for(unique))  # type: ignore[misc]
    assert device.channel.threads_started == 4
    go.set()
    assert sorted(device.answer()[1] for _ in range(50)) == list(range(1, 51))
    for unique in range(51, 101):
        device.channel.wait(unique, lambda unique=unique: work_for(unique))  # type: ignore[misc]
    assert sorted(device.answer()[1] for _ in range(50)) == list(range(51, 101))
    assert device.channel.threads_started == 4


def test_an_answer_to_a_mount_that_is_gone_is_undone(device: Device) -> None:
    """A closed device is not an error of the request."""
    device.channel.device_fd = -1
    undone: list[bool] = []
    device.channel.send_or_undo(data_reply(1, b""), lambda: undone.append(True))
    assert undone == [True]


def test_a_request_waits_for_a_daemon_that_is_being_restarted(device: Device) -> None:
    """Its reader sees a pause and then the bytes."""
    tries: list[int] = []

    def call() -> bytes:
        tries.append(1)
        if len(tries) < 4:
            raise DaemonUnavailableError("no daemon")
        return b"bytes"

    device.channel.wait(5, lambda: (data_reply(5, device.channel.patiently(5, call)), None))
    assert device.answer() == (0, 5, b"bytes")
    assert len(tries) == 4


def test_a_daemon_that_stays_away_is_an_error_in_the_end(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """EIO after daemon_wait_s, with the reason in the log, once for all readers."""

    def call() -> bytes:
        device.clock.advance(8)
        raise DaemonUnavailableError("no daemon answers, start one")

    for unique in (5, 6):
        device.channel.wait(unique, lambda unique=unique: (device.channel.patiently(unique, call), None))  # type: ignore[misc]
        assert device.answer() == (errno.EIO, unique, b"")
    assert device.channel.counters.failed == 2
    assert caplog.text.count("no daemon answers, start one") == 1


def test_an_interrupted_request_waits_for_no_daemon(device: Device) -> None:
    """Its worker is free again at the next try."""
    ended = threading.Event()
    tried = threading.Event()

    def call() -> bytes:
        tried.set()
        raise DaemonUnavailableError("no daemon")

    def work() -> tuple[Message, Undo | None]:
        try:
            return device.channel.patiently(5, call), None
        finally:
            ended.set()

    device.channel.wait(5, work)
    assert tried.wait(20)
    device.channel.interrupt(5)
    assert ended.wait(20)
