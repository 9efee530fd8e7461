"""Telling the kernel that names lead elsewhere now.

Owns: the process that writes the notifications (notifier.py says why there is one), started at the first and again
after it has ended; and which names a change is about. Leaves to others: what has changed (the client says it), what is
there now (the next look-up says it).
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Iterable, Sequence

from orchestra.client.contract import Changes, Client, Extent
from orchestra.fuse import children, notifier
from orchestra.fuse.counters import Counters
from orchestra.fuse.inodes import InodeTable
from orchestra.fuse.protocol import expire_entry_message
from orchestra.fuse.shared import CHANGES_SEEN

log = logging.getLogger(__name__)


class Notices:
    """Expires names of one mount. Any thread but the loop's: a call may wait until the kernel has taken it."""

    def __init__(self, device_fd: int, table: InodeTable, counters: Counters) -> None:
        self.flags = 0  # until INIT has said what the kernel knows
        self._device_fd = device_fd
        self._table = table
        self._counters = counters
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._unanswered = 0
        self._pid = 0
        self._is_closed = False

    def expire(self, path: str, *, within_s: float | None = None) -> None:
        """Have the kernel look `path` up again at its next use, also if it knows that nothing is there.

        With `within_s` that is so afterwards, unless it takes longer: while somebody looks a name of the same directory
        up, the kernel waits for our answer to that.
        """
        parent_path, _, name = path.rpartition("/")
        parent = self._table.nodeid_of(parent_path or "/")
        if parent is None or not name:
            return
        self._counters.entries_expired += 1
        if not self._lock.acquire(timeout=-1 if within_s is None else within_s):
            return
        try:
            if not self._is_closed:
                self._send(expire_entry_message(parent, os.fsencode(name), self.flags), within_s)
        finally:
            self._lock.release()

    def expire_all(self, changes: Iterable[tuple[Extent, str]]) -> None:
        """The same for whatever the changes are about."""
        directories: set[str] = set()
        trees: list[str] = []
        for extent, path in changes:
            if extent is not Extent.CHILDREN:
                self.expire(path)
            if extent is Extent.CHILDREN:
                directories.add(path)
            elif extent is Extent.BELOW:
                trees.append(path)
        if directories or trees:
            for path in self._table.paths():
                if _parent(path) in directories or _is_below(path, trees):
                    self.expire(path)

    def follow(self, changes: Changes) -> None:
        """Expire what changes, until there are no more changes."""
        while (found := changes.wait()) is not None:
            self.expire_all(found)
            self._keep_place(changes)

    def changes_of(self, client: Client) -> Changes | None:
        """Return what changes from where the last worker of this slot was; None where nobody tells."""
        seen = self._table.memory.words[CHANGES_SEEN]
        changes = client.changes(seen - 1 if seen else None)
        if changes is not None:
            self._keep_place(changes)
        return changes

    def _keep_place(self, changes: Changes) -> None:
        self._table.memory.put(CHANGES_SEEN, changes.position + 1)

    def close(self) -> None:
        """Let the process end. What still changes is told to nobody: the device's number may be another file's."""
        with self._lock:
            self._is_closed = True
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _send(self, message: bytes, within_s: float | None) -> None:
        for _ in range(2):
            if self._socket is None:
                self._socket = self._start()
            try:
                self._socket.settimeout(within_s)
                self._socket.send(message)
                self._unanswered += 1
                self._take_answers(self._socket, within_s or 0.0)
                return
            except TimeoutError:  # it waits for the kernel
                return
            except OSError:  # it was killed
                self._socket.close()
                self._socket = None
        log.warning("the kernel was not told of a change: its names expire by themselves")

    def _take_answers(self, answers: socket.socket, within_s: float) -> None:
        """Wait so long for all answers; take those that are there in any case, so that they do not pile up."""
        poll = select.poll()
        poll.register(answers, select.POLLIN)
        while self._unanswered and poll.poll(within_s * 1000):
            if not answers.recv(1):
                raise ConnectionResetError
            self._unanswered -= 1

    def _start(self) -> socket.socket:
        if self._pid:
            os.waitpid(self._pid, os.WNOHANG)  # one that still ends is left to init when we do
        self._unanswered = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-I", "-S", str(notifier.__file__), str(self._device_fd)]
            self._pid = children.spawn(command, [self._device_fd], stdin=theirs.fileno())
        return ours


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _is_below(path: str, trees: Sequence[str]) -> bool:
    return any(path.startswith(tree if tree == "/" else f"{tree}/") for tree in trees)
