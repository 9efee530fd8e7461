"""File descriptors of the daemon: as many as it may have, and what happens when they are used up.

Owns: the limit, and the log of connections that cannot be taken. Leaves to others: files and stores, whose calls fail
with their own errors then.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

# Each thread of each reader holds a socket, each store up to 128, each extent being filled a file. The usual soft limit
# of 1,024 is for programs that use select(2).
_WANTED = 65_536
# Below it an ordinary training job of 64 readers meets the limit.
_ENOUGH = 1024
# asyncio tries to accept again after a second; until then it reports each connection of the backlog, up to 1,024.
_REPORT_INTERVAL_S = 10.0
_ROOM_INTERVAL_S = 0.5
_USED_UP = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def raise_limit() -> None:
    """Raise the soft limit as far as the hard one allows; warn if that is little."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < _ENOUGH:
        log.warning(
            "at most %d files and sockets may be open at a time, so many readers wait for each other; raise the limit "
            "where the daemon is started (ulimit -n)",
            wanted,
        )


def survive_exhaustion(loop: asyncio.AbstractEventLoop, make_room: Callable[[], object]) -> None:
    """Have `loop` call `make_room` when it cannot take connections, and say so in one line now and then; they wait, and
    it tries again after a second."""
    reported_s = freed_s = -_REPORT_INTERVAL_S

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal reported_s, freed_s
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _USED_UP:
            loop.default_exception_handler(context)
            return
        if loop.time() - freed_s >= _ROOM_INTERVAL_S:
            freed_s = loop.time()
            make_room()
        if loop.time() - reported_s >= _REPORT_INTERVAL_S:
            reported_s = loop.time()
            log.error("connections wait: %s; raise the limit where the daemon is started (ulimit -n)", error.strerror)

    loop.set_exception_handler(handle)
