"""The daemon's life: start, serve, keep the books, stop.

Owns: the process (signals, socket, log, readiness). Leaves to others: what it is made of (assembly) and what it answers
(api). It never forks after its start: the store client's threads would not survive that.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from weakref import WeakSet

import orchestra
from orchestra.clock import SystemClock
from orchestra.config import Config
from orchestra.daemon.api.app import make_app, make_hot_handler, serving
from orchestra.daemon.api.between import clustered
from orchestra.daemon.api.context import Activity
from orchestra.daemon.api.hot import HotConnection
from orchestra.daemon.api.stream import EnsureStream
from orchestra.daemon.assembly import Node, assemble, disassemble
from orchestra.daemon.descriptors import raise_limit, survive_exhaustion
from orchestra.daemon.guests import answering_guests
from orchestra.daemon.nodes.control import controlled
from orchestra.errors import CacheDirectoryError, OrchestraError, to_wire
from orchestra.observe.access_ring import AccessNote
from orchestra.observe.logs import log_to_file, log_to_stderr

log = logging.getLogger(__name__)

# How often readers' notes are looked at: often while a stream is being read ahead of, else now and then.
_NOTES_INTERVAL_FAST_S = 0.02
_NOTES_INTERVAL_S = 0.5
# How often the index is written: what a crash loses is the order of use of that long, and a recount at the start.
_FLUSH_INTERVAL_S = 2.0
# Connections that wait to be accepted: every thread of every reader of the node may come at one moment.
_BACKLOG = 1024
# aiohttp counts this from the last request that it saw itself, so it must not be short; readers close when they end.
_KEEPALIVE_S = 86400.0
# New objects between two looks of the garbage collector. A fetched file makes dozens and leaves hardly any, while what
# is in flight was looked at every 15 files with Python's 700: 60 of 560 us of a load's CPU a file, 5 so. What it is
# there for are errors and their tracebacks: 10,000 objects of those are a few megabytes.
_NEW_OBJECTS_MAX = 10_000
# How long requests under way may go on after the daemon was told to stop.
_DRAIN_TIMEOUT_S = 5.0


def run(config: Config, *, autostarted: bool = False, ready_fd: int | None = None) -> None:
    """Serve until told to stop (SIGTERM, SIGINT, POST /v1/stop, or idleness when `autostarted`).

    `ready_fd` gets one line when requests are answered: {} or the error that kept the daemon from starting.
    Raises CacheDirectoryError, ConfigError.
    """
    notify = _notifier(ready_fd)
    try:
        asyncio.run(_serve(config, autostarted=autostarted, in_background=ready_fd is not None, notify=notify))
    except OrchestraError as error:
        notify(json.dumps(to_wire(error)))
        raise
    except Exception as error:
        log.exception("the daemon ends")
        notify(json.dumps(to_wire(CacheDirectoryError(f"the daemon of cache.dir {config.cache.dir} failed: {error}"))))
        raise
    finally:
        notify("")


def _notifier(ready_fd: int | None) -> Callable[[str], None]:
    """Return a function that writes its first message to `ready_fd` and closes it."""
    fds = [] if ready_fd is None else [ready_fd]

    def notify(message: str) -> None:
        while fds:
            fd = fds.pop()
            with contextlib.suppress(OSError):  # whoever started us may be gone; the daemon is not for it alone
                os.write(fd, message.encode())
            os.close(fd)

    return notify


async def _serve(config: Config, *, autostarted: bool, in_background: bool, notify: Callable[[str], None]) -> None:
    started = datetime.datetime.fromtimestamp(SystemClock().wall_s()).astimezone().isoformat(timespec="seconds")
    node = assemble(config, started=started)
    if in_background:
        log_to_file(node.layout.log)
    else:
        log_to_stderr()
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    raise_limit()
    _spare_the_collector()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    activity = Activity(node.clock)
    try:
        async with (
            answering(node, stop, activity),
            answering_guests(node, activity),
            clustered(node, activity),
            controlled(node),
        ):
            log.info(
                "orchestra %s serves %s (%d mounts)", orchestra.__version__, node.layout.root, len(node.mounts.table)
            )
            notify("{}")
            await _keep(node, activity, stop, idle_timeout_s=config.daemon.idle_timeout_s if autostarted else None)
            log.info("stopping")
    finally:
        await disassemble(node)
        for number in (signal.SIGTERM, signal.SIGINT):  # the loop, which takes them, is closed next
            signal.signal(number, signal.SIG_IGN)


def _spare_the_collector() -> None:
    """What was made so far stays for good and is not looked at again; the rest is looked at less often."""
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS_MAX, *gc.get_threshold()[1:])


@contextlib.asynccontextmanager
async def answering(node: Node, stop: asyncio.Event, activity: Activity) -> AsyncIterator[None]:
    """Answer requests on the node's socket inside the block, then let those under way finish; POST /v1/stop sets
    `stop`. Taking the node apart is the caller's."""
    app = make_app(node, stop, activity)
    async with serving(app, drain_timeout_s=_DRAIN_TIMEOUT_S, keepalive_s=_KEEPALIVE_S) as web_server:
        path = _free_socket(node.layout.socket)
        hot, streams = make_hot_handler(node, activity), partial(EnsureStream, node, activity)
        loop = asyncio.get_running_loop()
        connections: WeakSet[HotConnection] = WeakSet()

        def connection() -> HotConnection:
            made = HotConnection(web_server(), hot, streams)
            connections.add(made)
            return made

        def close_idle() -> None:
            for made in list(connections):
                made.close_if_idle()

        survive_exhaustion(loop, close_idle)
        server = await loop.create_unix_server(connection, str(path), backlog=_BACKLOG)
        path.chmod(0o600)
        inode = path.stat().st_ino
        try:
            yield
        finally:
            _remove_socket(path, inode)  # first: whoever comes now starts a successor, and waits for our lock
            server.close()
            await activity.wait_drained(_DRAIN_TIMEOUT_S)


async def _keep(node: Node, activity: Activity, stop: asyncio.Event, *, idle_timeout_s: float | None) -> None:
    """Keep the books until `stop` is set, or until nothing happened for `idle_timeout_s`."""
    async with asyncio.TaskGroup() as tasks:
        keeping = [tasks.create_task(_watch_accesses(node, activity)), tasks.create_task(_flush_index(node, stop))]
        if idle_timeout_s is not None:
            keeping.append(tasks.create_task(_stop_when_idle(idle_timeout_s, activity, stop)))
        await stop.wait()
        for task in keeping:
            task.cancel()


def _free_socket(path: Path) -> Path:
    """Remove what a dead daemon left (the owner lock says that no live one uses it) and make the folder."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    info = path.parent.stat()
    if info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise CacheDirectoryError(f"refusing {path.parent} for the daemon's socket: others may write there")
    path.unlink(missing_ok=True)
    return path


def _remove_socket(path: Path, inode: int) -> None:
    """Remove our socket, unless the cache directory was removed under us and another daemon lives there by now."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()


async def _watch_accesses(node: Node, activity: Activity) -> None:
    failed_errno: int | None = None
    turnover_count = 0
    while True:
        # Also where eviction chooses: what was read 0.5 s ago may be a whole epoch ago.
        is_choosing = node.blocks.turnover_count != turnover_count
        turnover_count = node.blocks.turnover_count
        await asyncio.sleep(_NOTES_INTERVAL_FAST_S if node.prefetch.is_following or is_choosing else _NOTES_INTERVAL_S)
        if node.jobs.is_busy or node.dataset.is_busy or node.plans.is_busy:
            activity.note()
        try:
            notes = node.accesses.collect()
        except OSError as error:  # no descriptor, or a disk that fails: what was read is learned later, or not at all
            if error.errno != failed_errno:
                log.warning("readers' notes cannot be read: %s", error)
            failed_errno = error.errno
            continue
        failed_errno = None
        if not notes:
            continue
        activity.note()
        follow_notes(node, notes)


def follow_notes(node: Node, notes: Sequence[AccessNote]) -> None:
    """Tell prefetch and eviction what readers read."""
    node.prefetch.on_notes(notes)
    for note in notes:
        blocks = range(note.first_block, note.first_block + note.block_count)
        for _, run in node.geometry.extents_of(blocks):
            node.blocks.touch(note.digest.hex(), run.start)


async def _flush_index(node: Node, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    await node.space.adopt()
    while True:
        await asyncio.sleep(_FLUSH_INTERVAL_S)
        if not node.lock.is_in_place():
            log.error("the cache directory %s was removed or replaced under this daemon: it stops", node.layout.root)
            stop.set()
        await loop.run_in_executor(node.writers, node.blocks.keep_limits)
        await loop.run_in_executor(node.writers, node.blocks.flush)


async def _stop_when_idle(limit_s: float, activity: Activity, stop: asyncio.Event) -> None:
    while (left_s := limit_s - activity.idle_s()) > 0:
        await asyncio.sleep(left_s)
    log.info("nothing to do for %.0f s", limit_s)
    stop.set()
