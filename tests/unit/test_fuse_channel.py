"""Every request is answered exactly once. The device is one end of a packet socket, the kernel is the test."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from orchestra.errors import NotFoundError
from orchestra.fuse.channel import Channel, Message, Undo
from orchestra.fuse.counters import Counters
from orchestra.fuse.protocol import HEADER_OUT, data_reply


@dataclass
class Device:
    """A channel and the kernel's end of its device."""

    channel: Channel
    kernel: socket.socket

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
        channel = Channel(ours.fileno(), Counters(), threads_max=4)
        yield Device(channel, kernel)
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
