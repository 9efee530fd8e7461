"""READs of what is not here, without a thread each: one stream to the daemon, one thread that takes its answers.

Owns: which READs wait on the stream, and that each is answered or handed on. Leaves to others: asking the daemon
(client), everything unusual (`Files` reads such a request again on a worker thread, which waits, restarts, explains).

Measured, 64 readers of 110 kB (docs/decisions/0004-miss-stream.md): with a thread per waiting READ the threads and the
loop spend more time passing the interpreter lock around than working.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestra.client.contract import Client, Handle, MissStream
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
    """READs waiting for the daemon. `ask` and `close` are called by the loop's thread only.

    `on_read(waiting)` is called when a READ was answered (or its asker gave up), `on_failure(waiting)` when it is to be
    read in the other way; both on the thread of the answers.
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
        self._on_read = on_read
        self._on_failure = on_failure
        self._waiting: dict[int, Waiting] = {}
        self._stream: MissStream | None = None
        self._ended = threading.Event()  # the stream of `_stream` gives no more answers

    def ask(self, waiting: Waiting) -> bool:
        """Have the bytes fetched and the READ answered; False if that cannot be asked for in this way now."""
        stream = self._stream
        if stream is None or self._ended.is_set():
            stream = self._open()
            if stream is None:
                return False
        unique = waiting.unique
        self._waiting[unique] = waiting
        if stream.ask((unique, waiting.handle, waiting.offset, waiting.offset + waiting.size_bytes)):
            # The stream may have ended between our look and our asking, with nobody left to see the answer.
            return not self._ended.is_set() or self._waiting.pop(unique, None) is None
        # Whoever takes it out answers it: the thread of the answers may have seen the stream end before we did.
        return self._waiting.pop(unique, None) is None

    def close(self) -> None:
        """End the stream; what waits is handed on, and fails there as the session has ended."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.shut_down()

    def _open(self) -> MissStream | None:
        stream = self._client.miss_stream()
        self._stream = stream
        if stream is not None:
            self._ended = threading.Event()
            name = "orchestra-fuse-misses"
            threading.Thread(target=self._take_answers, args=(stream, self._ended), name=name, daemon=True).start()
        return stream

    def _take_answers(self, stream: MissStream, ended: threading.Event) -> None:
        reply = memoryview(bytearray(HEAD + READ_BYTES_MAX))
        try:
            while answers := stream.answers():
                for unique, is_present in answers:
                    waiting = self._waiting.pop(unique, None)
                    if waiting is not None:
                        self._finish(waiting, is_present, reply)
        finally:  # also after a defect, which the thread's hook reports: reads then go the other way
            ended.set()
            while self._waiting:
                try:
                    _, waiting = self._waiting.popitem()
                except KeyError:  # the loop's thread took the last one
                    break
                self._on_failure(waiting)
            stream.shut_down()

    def _finish(self, waiting: Waiting, is_present: bool, reply: memoryview) -> None:
        count = None
        if is_present:
            try:
                count = waiting.handle.readinto_fetched(waiting.offset, reply[HEAD : HEAD + waiting.size_bytes])
            except OrchestraError:  # the other way says it
                count = None
        if count is None:
            self._on_failure(waiting)
            return
        HEADER_OUT.pack_into(reply, 0, HEAD + count, 0, waiting.unique)
        self._channel.send_pending(waiting.unique, reply[: HEAD + count])
        self._on_read(waiting)
