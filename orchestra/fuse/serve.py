"""The life of one mount: check, attach, watch, serve, announce, end.

Owns: the order of these and what signals do. Leaves to others: each step. `serve` returns when the mount is gone; it is
the foreground of `orchestra fuse mount` and what tests run.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from orchestra.client.contract import Client
from orchestra.errors import MountError
from orchestra.fuse import mount, watcher
from orchestra.fuse.names import root_entry
from orchestra.fuse.options import DRAIN_S, Mode, MountOptions
from orchestra.fuse.session import Session

log = logging.getLogger(__name__)

_CAP_SYS_ADMIN = 1 << 21
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Stop(BaseException):
    """Raised in the loop by a second signal: end now, whatever is open."""


def serve(
    client: Client,
    folder: str,
    options: MountOptions,
    ready: Callable[[], None],
    *,
    on_session: Callable[[Session], None] | None = None,
) -> None:
    """Mount `client` on `folder` and answer the kernel until it is unmounted.

    `ready` is called once, from another thread, when the root has answered through the kernel; `on_session` before
    the first request is read. In the main thread SIGTERM and SIGINT unmount: at once if nothing is open, else the
    folder is detached and open files are served for DRAIN_S more. Raises MountError, or what the client says of the
    root.
    """
    root = root_entry(client, options.root)
    check_privilege(options)
    target = mount.check_mount_point(folder, options.cache_dir)
    raise_descriptor_limit()
    with _watched(target):
        device_fd = mount.attach(target, options)
        session = Session(device_fd, client, root, options)
        if on_session is not None:
            on_session(session)
        _Life(session, target, options, ready).run()
        log.info("%s has ended: %s", target, {name: n for name, n in session.counters.snapshot().items() if n})
        if not session.channel.pending_count:  # else a late worker could write to a number that is another file's
            os.close(device_fd)


class _Life:
    """A session, its mount and the threads beside its loop."""

    def __init__(self, session: Session, target: str, options: MountOptions, ready: Callable[[], None]) -> None:
        self._session = session
        self._target = target
        self._options = options
        self._ready = ready
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._ending = False
        self._catches_signals = threading.current_thread() is threading.main_thread()
        mounted = mount.mount_at(target)
        self._device = None if mounted is None else mounted.device

    def run(self) -> None:
        """Serve until the end; leaves nothing mounted."""
        announcer = threading.Thread(target=self._announce, name="orchestra-fuse-announce", daemon=True)
        announcer.start()
        try:
            with self._signals():
                self._session.run()
            watcher.detach_if_dead(self._target)  # the connection was aborted, not unmounted
        except _Stop:
            log.warning("ended while files were open on %s", self._target)
            self._detach()
        except BaseException:
            self._detach()
            raise
        finally:
            self._ended.set()
        if self._failure is not None:
            raise self._session.refusal or self._failure

    def _announce(self) -> None:
        """Wait until the root answers through the kernel, then say so."""
        try:
            os.stat(self._target)
            mount.raise_read_ahead(self._target, self._options.read_ahead_kib)
            self._ready()
        except BaseException as error:  # noqa: BLE001 - this thread's outermost frame; `run` raises it
            if self._ended.is_set():
                return
            log.error("the mount on %s did not come up: %s", self._target, error)
            self._failure = error
            self._ending = True
            self._end()

    def _end(self) -> None:
        """Unmount, from beside the loop, since the kernel may ask something meanwhile."""
        try:
            if self._is_ours():
                mount.unmount(self._target)
        except mount.BusyError:
            log.warning("%s is busy: detached; its open files are served for %g s more", self._target, DRAIN_S)
            self._detach()
        except MountError as error:
            log.warning("%s", error)
        if not self._ended.wait(DRAIN_S) and self._catches_signals:
            os.kill(os.getpid(), signal.SIGTERM)

    def _is_ours(self) -> bool:
        """Whether our mount is still on the folder. Its device number is not used again while our descriptor is open
        and the connection lives, so somebody else's later mount is never taken for it."""
        mounted = mount.mount_at(self._target)
        return mounted is not None and mounted.device == self._device

    def _detach(self) -> None:
        """Lazily unmount what is still there."""
        if self._device is None or not self._is_ours():
            return
        try:
            mount.unmount(self._target, lazy=True)
        except MountError as error:
            log.warning("%s", error)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if not self._catches_signals:
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._ending:
            raise _Stop
        self._ending = True
        threading.Thread(target=self._end, name="orchestra-fuse-end", daemon=True).start()


def check_privilege(options: MountOptions) -> None:
    """Raise MountError if the mode needs a privilege that this process has not."""
    if options.mode is not Mode.PASSTHROUGH:
        return
    fields = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    if not int(fields["CapEff"], 16) & _CAP_SYS_ADMIN:
        raise MountError("mode passthrough needs CAP_SYS_ADMIN: mount as root, or use mode auto")


def raise_descriptor_limit() -> None:
    """Open handles and cached extents need descriptors; the usual soft limit of 1,024 is for select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _watched(target: str) -> Iterator[None]:
    """Run a watcher beside the mount; it ends by itself when this process does."""
    ours_read, ours_write = os.pipe()
    command = [sys.executable, "-I", "-S", str(watcher.__file__), target]
    process = subprocess.Popen(
        command,
        stdin=ours_read,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C and a signal to our group are not for it
    )
    os.close(ours_read)
    try:
        yield
    finally:
        os.close(ours_write)
        process.wait()
