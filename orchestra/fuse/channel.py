"""Answers on their way to the kernel: at once, or from a bounded pool of threads when something must be waited for.

Owns: that every request is answered exactly once, whatever a handler does, also when it is interrupted meanwhile.
Leaves to others: what the answer is. A request that waits is *pending*; whoever takes it out of `_pending` (the worker
with its result, or the loop with an INTERRUPT) is the one who answers, which a dict's atomic `pop` decides.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from orchestra.clock import Clock, SystemClock
from orchestra.errors import DaemonUnavailableError, OrchestraError, errno_of
from orchestra.fuse.counters import Counters
from orchestra.fuse.options import ASIDE_MAX, BACKLOG_MAX, DAEMON_RETRY_S
from orchestra.fuse.protocol import error_reply

log = logging.getLogger(__name__)

_T = TypeVar("_T")
# Answers that say something about the name or the file; everything else is news about the system, and is logged.
_ORDINARY = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESTALE, errno.ENAMETOOLONG, errno.EROFS, errno.ENODATA}
)
# The kernel does not want an answer: its asker is gone, or the mount is.
_REFUSED = frozenset({errno.ENOENT, errno.ENODEV, errno.ECONNABORTED, errno.EBADF, errno.EPERM})
# A complete message for the device.
Message = bytes | bytearray | memoryview
# What takes back the effects (a counted look-up, a counted open) of an answer that the kernel never got.
Undo = Callable[[], object]
# Runs on a worker thread and returns the message; may raise any error, which becomes the answer's errno.
Work = Callable[[], tuple[Message, Undo | None]]


class Channel:
    """The device of one session and the threads that wait on its behalf.

    A face with several worker processes would have one of these in each (FUSE_DEV_IOC_CLONE), since the kernel takes
    the answer to a request only on the descriptor that read it.
    """

    def __init__(
        self,
        device_fd: int,
        counters: Counters,
        *,
        threads_max: int,
        daemon_wait_s: float = 0.0,
        clock: Clock | None = None,
        retry_s: float = DAEMON_RETRY_S,
    ) -> None:
        self.device_fd = device_fd
        self.counters = counters
        self._daemon_wait_ns = int(daemon_wait_s * 1e9)
        self._clock = clock or SystemClock()
        self._retry_s = retry_s
        self._closed = threading.Event()
        self._last_logged = ""
        self._pending: dict[int, None] = {}
        self._queue: queue.SimpleQueue[tuple[int, Work] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(threads_max + BACKLOG_MAX)
        self._lock = threading.Lock()
        self._threads_max = threads_max
        self._threads: list[threading.Thread] = []
        self._aside_queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._aside: threading.Thread | None = None
        self._idle_count = 0
        self._backlog_count = 0

    @property
    def threads_started(self) -> int:
        """How many worker threads exist."""
        return len(self._threads)

    @property
    def pending_count(self) -> int:
        """How many requests wait for a worker's result."""
        return len(self._pending)

    def send(self, message: Message) -> bool:
        """Write one message; return whether the kernel took it (it does not once the asker or the mount is gone)."""
        try:
            os.write(self.device_fd, message)
        except OSError as error:
            # ENOENT: the asker died or was interrupted. ENODEV, ECONNABORTED, EBADF: the mount is gone.
            if error.errno not in _REFUSED:
                raise
            return False
        return True

    def send_error(self, unique: int, errno_code: int) -> None:
        """Answer with an errno, 0 for bare success."""
        self.send(error_reply(unique, errno_code))

    def send_failure(self, unique: int, error: BaseException) -> None:
        """Answer with the errno of `error`; what nobody foresaw is logged with its traceback and becomes EIO."""
        self.send_error(unique, self.errno_for(error))

    def errno_for(self, error: BaseException) -> int:
        """Return the errno that answers `error`, after logging what a person may need to know."""
        code = errno_of(error)
        if not isinstance(error, (OrchestraError, OSError)):
            self.counters.errors_unforeseen += 1
            log.error("a request failed for a reason nobody foresaw and was answered EIO", exc_info=error)
        elif code not in _ORDINARY:
            self.counters.failed += 1
            text = str(error)
            if text != self._last_logged:  # a thousand readers of one broken thing are one line
                self._last_logged = text
                log.warning("answered %s: %s", errno.errorcode.get(code, code), text)
        return code

    def send_or_undo(self, message: Message, undo: Undo | None) -> None:
        """Write an answer; take its effects back if the kernel did not want it any more."""
        if not self.send(message) and undo is not None:
            undo()

    # -- waiting --------------------------------------------------------------------------------------------------

    def wait(self, unique: int, work: Work) -> None:
        """Have a worker thread run `work` and answer `unique` with its result; returns at once.

        Blocks only while THREADS_MAX + BACKLOG_MAX requests are waiting already.
        """
        self.begin_wait(unique)
        self.hand_over(unique, work)

    def begin_wait(self, unique: int) -> None:
        """Note that `unique` waits: it is answered by `send_pending` or `hand_over`, or by an INTERRUPT before."""
        self._pending[unique] = None
        self.counters.waited += 1

    def send_pending(self, unique: int, message: Message) -> None:
        """Answer a request that waits, unless it was answered meanwhile."""
        if self._take(unique):
            self.send(message)
        else:
            self.counters.answered_late += 1

    def patiently(self, unique: int, call: Callable[[], _T]) -> _T:
        """Return what `call` returns, trying again while there is no daemon; on a worker only.

        Gives up, with the client's error, after the session's `daemon_wait_s`, when the request was interrupted
        meanwhile, or when the session ends.
        """
        deadline_ns = self._clock.now_ns() + self._daemon_wait_ns
        while True:
            try:
                return call()
            except DaemonUnavailableError:
                if self._clock.now_ns() >= deadline_ns or unique not in self._pending:
                    raise
                if self._closed.wait(self._retry_s):
                    raise

    def run_aside(self, work: Callable[[], object]) -> None:
        """Have a thread of its own run `work`, which answers nothing; forgotten when ASIDE_MAX are waiting.

        Notifications go this way: they wait for locks that the kernel may hold for a look-up, and that look-up may
        wait for a worker.
        """
        if self._aside_queue.qsize() >= ASIDE_MAX:
            return
        if self._aside is None:
            self._aside = threading.Thread(target=self._run_asides, name="orchestra-fuse-aside", daemon=True)
            self._aside.start()
        self._aside_queue.put(work)

    def _run_asides(self) -> None:
        while (work := self._aside_queue.get()) is not None:
            try:
                work()
            except Exception:
                log.exception("a notification to the kernel failed")

    def interrupt(self, unique: int) -> bool:
        """Answer a waiting request EINTR now; its result will be thrown away. False: it does not wait here, because it
        was answered or is another worker's."""
        if not self._take(unique):
            return False
        self.counters.interrupted += 1
        self.send_error(unique, errno.EINTR)
        return True

    def interrupt_at(self, device_fd: int, unique: int) -> None:
        """The same for a request that was read from another worker's device; that one's answer will be refused."""
        try:
            os.write(device_fd, error_reply(unique, errno.EINTR))
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return
        self.counters.interrupted += 1

    def close(self) -> None:
        """Let the threads end when their present work is done. Does not wait for them: they may wait for a store."""
        self._closed.set()
        for _ in self._threads:
            self._queue.put(None)
        self._aside_queue.put(None)

    def _take(self, unique: int) -> bool:
        return self._pending.pop(unique, self) is None

    def hand_over(self, unique: int, work: Work) -> None:
        """Have a worker thread answer `unique`, which waits already, with the result of `work`."""
        self._room.acquire()
        with self._lock:
            if self._idle_count:
                self._idle_count -= 1
            elif len(self._threads) < self._threads_max:
                name = f"orchestra-fuse-{len(self._threads)}"
                # Daemonic: a thread stuck in a store's answer must not keep the process after the mount has ended.
                thread = threading.Thread(target=self._work_forever, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                self._backlog_count += 1
        self._queue.put((unique, work))

    def _work_forever(self) -> None:
        while (item := self._queue.get()) is not None:
            self._finish(*item)
            del item  # a waiting thread must not hold the last request's buffers
            self._room.release()
            with self._lock:
                if self._backlog_count:
                    self._backlog_count -= 1
                else:
                    self._idle_count += 1

    def _finish(self, unique: int, work: Work) -> None:
        undo: Undo | None = None
        message: Message
        try:
            message, undo = work()
        except BaseException as error:  # noqa: BLE001 - the outermost frame of a request: log it and answer
            message = error_reply(unique, self.errno_for(error))
        try:
            if self._take(unique):
                self.send_or_undo(message, undo)
                return
            self.counters.answered_late += 1
            if undo is not None:
                undo()
        except BaseException as error:  # noqa: BLE001 - as above; a second answer would only be refused (ENOENT)
            self.send_failure(unique, error)
