"""What a FUSE session counts: requests by opcode, and what became of them."""

from __future__ import annotations

from orchestra.fuse.protocol import OPCODE_COUNT, Opcode


class Counters:
    """Plain integers, each written by one thread or approximately; read them at any time with `snapshot`."""

    __slots__ = (
        "answered_late",
        "backing_closed",
        "backing_opened",
        "backing_refused",
        "entries_expired",
        "errors_unforeseen",
        "failed",
        "interrupted",
        "names_hidden",
        "reads_cached",
        "reads_waited",
        "requests",
        "resent",
        "stale",
        "waited",
    )

    def __init__(self) -> None:
        self.requests = [0] * OPCODE_COUNT
        self.waited = 0  # requests that went to a worker thread
        self.reads_cached = 0  # READs answered by the loop at once
        self.reads_waited = 0  # READs that had to be fetched
        self.backing_opened = 0  # files registered for passthrough
        self.backing_closed = 0
        self.backing_refused = 0  # the kernel said no
        self.resent = 0  # requests that the kernel sent again after a worker's death
        self.interrupted = 0  # requests answered EINTR because their caller got a signal
        self.answered_late = 0  # results thrown away because the request had been interrupted
        self.names_hidden = 0  # times that a name which no path can spell was left out
        self.entries_expired = 0  # notifications sent after a stale read
        self.errors_unforeseen = 0  # EIO from a defect of ours, with a traceback in the log
        self.failed = 0  # requests that the client could not serve: store, credentials, daemon; the log says why
        self.stale = 0  # reads of objects that changed under an open file

    def snapshot(self) -> dict[str, int]:
        """Return all counters; requests as "LOOKUP": n, those at zero left out."""
        found = {Opcode(op).name: n for op, n in enumerate(self.requests) if n and op in _KNOWN}
        found["unknown_requests"] = sum(n for op, n in enumerate(self.requests) if op not in _KNOWN)
        found.update({name: getattr(self, name) for name in self.__slots__ if name != "requests"})
        return found


_KNOWN = frozenset(int(op) for op in Opcode)
