"""READs of what is not here, without a thread each: one stream to the daemon, whose answers the loop takes too.

Owns: which READs wait on the stream, that each is answered or handed on, and waiting for device and stream at once.
Leaves to others: asking the daemon (client), everything unusual (`Files` reads such a request again on a worker thread,
which waits, restarts, explains).

Measured, 64 readers of 110 kB (docs/decisions/0004-miss-stream.md): with a thread per waiting READ the threads and the
loop spend more time passing the interpreter lock around than working, and so did two threads, one for the requests and
one for the answers. While no READ waits the loop sleeps in its read of the device, as if there were no stream.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestra.client.contract import Client, Handle, MissStream
from orchestra.clock import SystemClock
from orchestra.errors import OrchestraError
from orchestra.fuse.channel import Channel
from orchestra.fuse.options import READ_BYTES_MAX
from orchestra.fuse.protocol import HEAD, HEADER_OUT


@dataclass(frozen=True, slots=True)
class Waiting:
    """One READ, within its object. `context` is the caller's."""

    unique: int
    handle: Handle
    offset: int
    size_bytes: int
    context: Any


class Misses:
    """READs waiting for the daemon; all by the loop's thread.

    `on_read(waiting)` is called when a READ was answered (or its asker gave up), `on_failure(waiting)` when it is to be
    read in the other way.
    """

    def __init__(
        self,
        client: Client,
        channel: Channel,
        *,
        on_read: Callable[[Waiting], None],
        on_failure: Callable[[Waiting], None],
    ) -> None:
        self._client = client
        self._channel = channel
        self._clock = SystemClock()
        self._on_read = on_read
        self._on_failure = on_failure
        self._stream: MissStream | None = None
        self._reply = memoryview(bytearray(HEAD + READ_BYTES_MAX))
        self._poll = select.poll()
        self._deadline_ns = 0  # when a stream that says nothing is given up
        # True while something waits: the loop then calls `wait` before it reads the device.
        self.waiting: dict[int, Waiting] = {}

    def ask(self, waiting: Waiting) -> bool:
        """Have the bytes fetched and the READ answered; False if that cannot be asked for in this way now."""
        stream = self._stream or self._open()
        if stream is None:
            return False
        if not self.waiting:
            # Another worker may take the request that the poll saw: then the read must not sleep.
            os.set_blocking(self._channel.device_fd, False)
            self._deadline_ns = self._clock.now_ns() + stream.patience_ns
        self.waiting[waiting.unique] = waiting
        if stream.ask((waiting.unique, waiting.handle, waiting.offset, waiting.offset + waiting.size_bytes)):
            return True
        del self.waiting[waiting.unique]
        self._sleep_in_the_device()
        return False

    def wait(self) -> bool:
        """Sleep until there is a request or an answer; take the answers; return whether there may be a request."""
        left_ns = max(0, self._deadline_ns - self._clock.now_ns())
        ready = self._poll.poll(left_ns // 1_000_000 + 1)
        device_fd = self._channel.device_fd
        is_asked = is_answered = False
        for descriptor, _ in ready:
            if descriptor == device_fd:
                is_asked = True
            else:
                is_answered = True
        if is_answered:
            self._take_answers()
        elif not left_ns:
            self._end()
        return is_asked

    def close(self) -> None:
        """End the stream; what waits is handed on, and fails there as the session has ended."""
        self._end()

    def _open(self) -> MissStream | None:
        stream = self._stream = self._client.miss_stream()
        if stream is not None:
            self._poll.register(self._channel.device_fd, select.POLLIN)
            self._poll.register(stream.descriptor, select.POLLIN)
        return stream

    def _take_answers(self) -> None:
        assert self._stream is not None, "only what is registered is polled"
        answers = self._stream.answers_now()
        if answers is None:
            self._end()
            return
        for unique, is_present in answers:
            waiting = self.waiting.pop(unique, None)
            if waiting is not None:
                self._finish(waiting, is_present)
        self._deadline_ns = self._clock.now_ns() + self._stream.patience_ns
        self._sleep_in_the_device()

    def _end(self) -> None:
        """There will be no more answers: what waits goes the other way, the next READ opens another stream."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        self._poll.unregister(stream.descriptor)
        stream.shut_down()
        handed_on = list(self.waiting.values())
        self.waiting.clear()
        self._sleep_in_the_device()
        for waiting in handed_on:
            self._on_failure(waiting)

    def _sleep_in_the_device(self) -> None:
        """Let the loop's read of the device wait again, when it is the only thing to wait for."""
        if not self.waiting:
            with contextlib.suppress(OSError):  # the session has ended
                os.set_blocking(self._channel.device_fd, True)

    def _finish(self, waiting: Waiting, is_present: bool) -> None:
        count = None
        if is_present:
            try:
                payload = self._reply[HEAD : HEAD + waiting.size_bytes]
                count = waiting.handle.readinto_fetched(waiting.offset, payload)
            except OrchestraError:  # the other way says it
                count = None
        if count is None:
            self._on_failure(waiting)
            return
        HEADER_OUT.pack_into(self._reply, 0, HEAD + count, 0, waiting.unique)
        self._channel.send_pending(waiting.unique, self._reply[: HEAD + count])
        self._on_read(waiting)
