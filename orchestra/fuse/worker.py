"""A process that serves a mount held by a supervisor.

Owns: getting ready before it is needed, taking a slot, noticing that the supervisor is gone. Leaves to others: the
requests (session.py). It may be killed at any moment: the next one of its slot goes on.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import threading
from collections.abc import Callable
from typing import Any

from orchestra.client.contract import Client
from orchestra.errors import MountError
from orchestra.fuse import mount
from orchestra.fuse.background import ReadyPipe
from orchestra.fuse.inodes import InodeTable
from orchestra.fuse.options import MountOptions
from orchestra.fuse.session import Session
from orchestra.fuse.shared import SharedMemory
from orchestra.values import Entry, EntryKind

log = logging.getLogger(__name__)


def serve_slot(
    client: Client,
    options: MountOptions,
    control_fd: int,
    *,
    on_session: Callable[[Session], None] | None = None,
) -> None:
    """Wait until the supervisor gives us a slot, and answer its requests until the mount is gone.

    Returns at once when the supervisor goes before it has given one. Raises MountError if the kernel cannot be served.
    """
    raise_descriptor_limit()
    os.chdir("/")  # a background process must not keep a folder busy
    pipe = ReadyPipe(os.dup(control_fd))
    pipe.say({"standby": os.getpid()})
    line = _read_line(control_fd)
    if not line:
        return
    job = json.loads(line)
    if not job["is_ready"]:
        logging.getLogger().addHandler(pipe)  # what goes wrong now is told to who mounts
    session = _session(client, options, job)
    if on_session is not None:
        on_session(session)
    _start_thread("alive", _watch_supervisor, control_fd, job)
    if session.table.memory.workers_of(job["slot"]) > 1:
        session.take_over()
    if job["slot"] == 0:  # one tells the kernel for all
        changes = session.notices.changes_of(client)
        if changes is not None:
            _start_thread("changes", session.notices.follow, changes)
    if not job["is_ready"]:
        _start_thread("announce", _announce, session, job["target"], pipe)
    session.run()


def raise_descriptor_limit() -> None:
    """Open handles and cached extents need descriptors; the usual soft limit of 1,024 is for select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _start_thread(name: str, work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, name=f"orchestra-fuse-{name}", daemon=True).start()


def _read_line(fd: int) -> bytes:
    """Return what is said up to a line's end, or to the end. Unbuffered: a thread goes on reading there."""
    said = b""
    while not said.endswith(b"\n") and (more := os.read(fd, 65_536)):
        said += more
    return said


def _session(client: Client, options: MountOptions, job: dict[str, Any]) -> Session:
    slot, device_fds, memory_fd = job["slot"], job["device_fds"], job["memory_fd"]
    # That the root is a directory was seen before it was mounted; its time comes with the first question for it.
    root = Entry(options.root, EntryKind.DIRECTORY, 0, 0, "")
    lock_path = f"/proc/self/fd/{memory_fd}" if len(device_fds) > 1 else None
    table = InodeTable(root, SharedMemory(memory_fd), slot=slot, lock_path=lock_path)
    session = Session(device_fds[slot], client, root, options, table=table)
    session.other_devices = tuple(fd for fd in device_fds if fd != device_fds[slot])
    return session


def _announce(session: Session, target: str, pipe: ReadyPipe) -> None:
    """Wait until the root answers through the kernel, then say so."""
    try:
        os.stat(target)
    except OSError as error:
        refusal = session.refusal or MountError(f"the mount on {target} did not come up: {error.strerror}")
        pipe.fail(refusal.message)
        return
    session.details.renew()
    pipe.ready()


def _watch_supervisor(control_fd: int, job: dict[str, Any]) -> None:
    """When the supervisor is gone: take the folder away, so that nobody meets a mount that no one looks after.

    What is open is served to its end; the kernel then ends the session.
    """
    while os.read(control_fd, 1):
        pass
    log.warning("the supervisor of %s is gone: detaching it; what is open is served to its end", job["target"])
    mounted = mount.mount_at(job["target"])
    if mounted is None or mounted.device != job["device"]:
        return
    try:
        mount.unmount(job["target"], lazy=True)
    except MountError as error:
        log.warning("%s", error)
