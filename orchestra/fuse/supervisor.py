"""The process that holds a mount: /dev/fuse, the shared memory, and the workers that answer.

Owns: that there is a worker for every slot as long as the mount lives, and how the mount ends. It answers no request,
knows no path, and imports neither client nor session, so that little can happen to it. Leaves to others: mounting and
becoming this (launch.py), serving (worker.py), processes (children.py).

One more worker than slots stands by with everything imported, so that a killed one is replaced within milliseconds.
When more die than stand by, those who live answer for them, and who is missing is started, one after the other. If we
die, the workers' control sockets end: they detach the folder and serve what is open to its end. SIGTERM and SIGINT end
the mount, SIGHUP exchanges this program and then the workers, one by one, for those on the disk now.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import sys
import threading
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestra.clock import SystemClock
from orchestra.errors import MountError
from orchestra.fuse import children, mount, registry, shared, watcher
from orchestra.fuse.background import ReadyPipe
from orchestra.fuse.children import Child
from orchestra.fuse.options import DRAIN_S, READ_AHEAD_KIB
from orchestra.fuse.protocol import DEV_IOC_CLONE, InitFlag, resend_message

log = logging.getLogger(__name__)

# Workers that die so often in a row within a second of their start will not live: some request or defect kills them.
# Some 10 s of trying, as each waits for the next one's start.
QUICK_DEATHS_MAX = 20
_QUICK_NS = 1_000_000_000
# The first spare is started when the mount's own start is over; it costs half a second of a core.
_SPARE_AFTER_S = 2.0
_SPARE_RETRY_S = 30.0  # where it ended by itself
# How long one whom readers waited for goes before other programs once it answers them.
_CALM_AFTER_S = 1.0
# The watcher does nothing, so that only somebody's SIGKILL or a broken installation ends it.
_WATCHER_AFTER_S = 1.0
_UNMOUNTED, _DETACHED, _BUSY, _NOT_UNMOUNTED = b"U", b"D", b"B", b"N"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a supervisor is told; `running` is what an earlier program in its process left."""

    target: str
    device: str  # "major:minor" of the mount
    device_fds: tuple[int, ...]  # one a slot; the first is the mount's own
    memory_fd: int
    command: tuple[str, ...]  # starts a worker
    record: dict[str, Any]
    read_ahead_kib: int
    ready_fd: int | None = None
    greeting: str | None = None  # printed when the mount is ready
    alive_fd: int = -1
    watched_fd: int = -1  # the other end of `alive_fd`, for the next watcher
    watcher_pid: int = 0  # 0: somebody killed it, and the next one is to be started
    running: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, text: str) -> Plan:
        """Read what `json.dumps(asdict(plan))` wrote."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("device_fds", "command", "running"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


class Supervisor:
    """See the module."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._clock = SystemClock()
        self._ready_pipe = None if plan.ready_fd is None else ReadyPipe(plan.ready_fd)
        self._children: list[Child] = []
        self._outdated: set[Child] = set()  # serve until a successor of the new program stands by
        self._vacant: list[int] = []
        self._is_ready = False  # the kernel has been answered once
        self._is_announced = False
        self._is_ending = False
        self._status = 0
        self._quick_deaths = 0
        self._spare_at_ns: int | None = None
        self._kill_at_ns: int | None = None
        self._calm_at_ns: int | None = None
        self._watcher_fd = -1
        self._watcher_at_ns: int | None = None
        self._wakeup, self._wakeup_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    # -- life -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until the mount is gone; return the exit status."""
        for fd in _held_by(self._plan):  # not by the watcher, which must see our end
            os.set_inheritable(fd, False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self._wakeup_in)
        if self._plan.running:
            self._resume()
        else:
            self._begin()
        while self._children or self._vacant:
            self._wait()
        self._finish()
        return self._status

    def _begin(self) -> None:
        watched_fd, alive_fd = os.pipe2(os.O_CLOEXEC)
        self._plan = replace(self._plan, alive_fd=alive_fd, watched_fd=watched_fd)
        self._start_watcher()
        self._vacant = [0]
        for _ in self._plan.device_fds:
            self._start_one()

    def _resume(self) -> None:
        """Take over from the program that this process ran before, and exchange its workers."""
        self._children = [Child.of(state) for state in self._plan.running]
        self._is_ready = self._is_announced = True
        for child in [child for child in self._children if child.slot is None]:
            child.kill()  # has the old program
            child.reap()
            self._children.remove(child)
        self._outdated = {child for child in self._children if child.slot is not None}
        self._plan = replace(self._plan, running=())
        if self._plan.watcher_pid:
            self._watcher_fd = os.pidfd_open(self._plan.watcher_pid)
        elif self._plan.watched_fd >= 0:
            self._start_watcher()
        self._start_one()

    def _finish(self) -> None:
        if self._is_ours():
            watcher.detach_if_dead(self._plan.target)  # the connection was aborted, not unmounted
        registry.remove_record(registry.MountRecord(**self._plan.record))
        with contextlib.suppress(BrokenPipeError):  # somebody killed the watcher
            os.write(self._plan.alive_fd, b".")
        os.close(self._plan.alive_fd)
        if self._plan.watcher_pid:
            os.waitpid(self._plan.watcher_pid, 0)

    # -- what happens ---------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait for one thing to happen, and see to it."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        by_fd = {}
        for child in self._children:
            by_fd[child.pidfd] = by_fd[child.control.fileno()] = child
            poll.register(child.pidfd, select.POLLIN)
            poll.register(child.control, select.POLLIN)
        if self._plan.watcher_pid:
            poll.register(self._watcher_fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self._timeout_ms())}
        for fd in ready & by_fd.keys():
            child = by_fd[fd]
            if fd != child.pidfd and child.pidfd not in ready:
                for message in child.hear():
                    self._on_message(child, message)
        for child in [by_fd[fd] for fd in ready & by_fd.keys() if by_fd[fd].pidfd == fd]:
            self._on_death(child)
        if self._plan.watcher_pid and self._watcher_fd in ready:
            self._on_watcher_death()
        if self._wakeup in ready:
            for event in os.read(self._wakeup, 64):
                self._on_event(event)
        self._on_time()

    def _timeout_ms(self) -> int | None:
        timers = (self._spare_at_ns, self._kill_at_ns, self._calm_at_ns, self._watcher_at_ns)
        moments = [moment for moment in timers if moment is not None]
        return max(0, (min(moments) - self._clock.now_ns()) // 1_000_000 + 1) if moments else None

    def _on_time(self) -> None:
        now_ns = self._clock.now_ns()
        if self._spare_at_ns is not None and now_ns >= self._spare_at_ns:
            self._spare_at_ns = None
            self._start_missing()
        if self._calm_at_ns is not None and now_ns >= self._calm_at_ns:
            self._calm_at_ns = None
            for child in self._children:
                if child.is_hastened and child.is_standing_by:
                    child.calm()
        if self._watcher_at_ns is not None and now_ns >= self._watcher_at_ns:
            self._watcher_at_ns = None
            self._start_watcher()
        if self._kill_at_ns is not None and now_ns >= self._kill_at_ns:
            self._kill_at_ns = None
            self._kill_all()

    def _on_message(self, child: Child, message: dict[str, Any]) -> None:
        if "standby" in message:
            child.is_standing_by = True
            if child.is_hastened:
                self._calm_at_ns = self._clock.now_ns() + int(_CALM_AFTER_S * 1e9)
            self._fill_vacancies()
            self._announce_if_full()
            if child.slot is None and self._outdated:
                self._outdated.pop().kill()  # its death gives the slot to this one
            self._start_missing()
        elif "note" in message:
            if self._ready_pipe is not None:
                self._ready_pipe.note(str(message["note"]))
        elif "ready" in message and not self._is_ready:
            self._is_ready = True  # the kernel has been answered; now the others may read its requests
            self._vacant += range(1, len(self._plan.device_fds))
            self._fill_vacancies()
            self._announce_if_full()
            self._start_missing()
        elif "error" in message:
            log.error("%s", message["error"])
            if not self._is_announced:
                self._fail(str(message["error"]))

    def _announce_if_full(self) -> None:
        """When the mount answers and every slot is served for the first time: say so."""
        if self._is_announced or not self._is_ready or self._vacant:
            return
        self._is_announced = True
        self._raise_read_ahead()
        self._write_record()
        if self._ready_pipe is not None:
            self._ready_pipe.ready()
        if self._plan.greeting is not None:
            os.write(1, self._plan.greeting.encode("utf-8", "surrogateescape") + b"\n")
        self._spare_at_ns = self._clock.now_ns() + int(_SPARE_AFTER_S * 1e9)

    def _raise_read_ahead(self) -> None:
        wanted_kib = self._plan.read_ahead_kib
        if mount.raise_read_ahead(self._plan.target, wanted_kib) is None and wanted_kib != READ_AHEAD_KIB:
            sentence = "the kernel's read-ahead stays as it is: only root can set --read-ahead"
            log.warning("%s", sentence)
            if self._ready_pipe is not None:
                self._ready_pipe.note(sentence)

    def _on_death(self, child: Child) -> None:
        for message in child.hear():
            self._on_message(child, message)
        status = child.reap()
        self._children.remove(child)
        was_outdated = child in self._outdated
        self._outdated.discard(child)
        if self._is_ending:
            return
        if child.slot is None:
            log.warning("a worker that stood by ended with status %d", status)
            if self._vacant:
                self._note_death(quick=True, slot=None)
            self._outdated.clear()  # an upgrade whose program does not start is given up
            after_s = _SPARE_AFTER_S if status == -signal.SIGKILL else _SPARE_RETRY_S
            self._spare_at_ns = self._clock.now_ns() + int(after_s * 1e9)
        elif status == 0:
            self._is_ending = True  # the kernel has no more requests: unmounted
            for other in self._children:
                if other.slot is None:
                    other.kill()
        else:
            if not was_outdated:
                log.warning("worker %d of %s ended with status %d", child.pid, self._plan.target, status)
            if self._is_announced and not self._can_resend():
                self._fail(f"this kernel cannot send again what a worker of {self._plan.target} held: it was unmounted")
                return
            lived_ns = self._clock.now_ns() - child.serving_since_ns
            self._note_death(quick=lived_ns < _QUICK_NS, slot=child.slot)

    def _can_resend(self) -> bool:
        """Whether the kernel is Linux 6.9 or later: what the dead held would else be waited for for ever."""
        return bool(shared.read_word(self._plan.memory_fd, shared.INIT_FLAGS) & InitFlag.HAS_RESEND)

    def _note_death(self, *, quick: bool, slot: int | None) -> None:
        self._quick_deaths = self._quick_deaths + 1 if quick else 0
        if self._quick_deaths >= QUICK_DEATHS_MAX:
            self._fail(f"the workers of {self._plan.target} die as soon as they are started: it was unmounted")
            return
        if slot is not None:
            shared.retire(self._plan.memory_fd, slot)
            self._vacant.append(slot)
        self._fill_vacancies()
        if slot in self._vacant and any(child.slot is not None for child in self._children):
            with contextlib.suppress(OSError):  # the mount is gone
                os.write(self._plan.device_fds[0], resend_message())  # to those who live
        self._start_missing()

    # -- workers --------------------------------------------------------------------------------------------------

    def _start_missing(self) -> None:
        """See that one is being started while a slot is vacant or nobody stands by. One at a time: together all of them
        would be late on a busy machine, and one is enough to answer."""
        if self._is_ending:
            return
        try:
            self._start_missing_one()
        except OSError as error:  # no memory or no descriptor for one more process
            log.warning("no worker of %s can be started now: %s", self._plan.target, error.strerror)
            self._spare_at_ns = self._clock.now_ns() + int(_SPARE_AFTER_S * 1e9)

    def _start_missing_one(self) -> None:
        others = [child for child in self._children if child.slot is None]
        is_spare_due = self._is_announced and self._spare_at_ns is None
        if all(child.is_standing_by for child in others) and (self._vacant or (is_spare_due and not others)):
            others.append(self._start_one())
        if self._is_announced and len(others) == len(self._children):  # nobody answers
            others[0].hasten()

    def _start_one(self) -> Child:
        plan = self._plan
        descriptors = [*plan.device_fds, plan.memory_fd, plan.alive_fd]
        self._children.append(children.start(plan.command, descriptors))
        return self._children[-1]

    def _fill_vacancies(self) -> None:
        """Give the slots that nobody serves to those who stand by."""
        for child in [child for child in self._children if child.is_standing_by and child.slot is None]:
            if not self._vacant:
                return
            self._give(child, self._vacant.pop(0))

    def _give(self, child: Child, slot: int) -> None:
        plan = self._plan
        child.slot = slot
        child.serving_since_ns = self._clock.now_ns()
        child.tell(
            {
                "slot": slot,
                "target": plan.target,
                "device": plan.device,
                "device_fds": plan.device_fds,
                "memory_fd": plan.memory_fd,
                "is_ready": self._is_ready,
            }
        )
        if self._is_announced:
            self._write_record()

    def _write_record(self) -> None:
        workers = sorted(child.pid for child in self._children if child.slot is not None)
        self._plan = replace(self._plan, record=self._plan.record | {"workers": workers})
        try:
            registry.write_record(registry.MountRecord(**self._plan.record))
        except OSError as error:  # a container's file system may be read-only: the folder answers all the same
            log.warning("`orchestra fuse ls` will not list %s: %s", self._plan.target, error)

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill()

    # -- the watcher ----------------------------------------------------------------------------------------------

    def _start_watcher(self) -> None:
        plan = self._plan
        command = [sys.executable, "-I", "-S", str(watcher.__file__), plan.target, plan.device]
        self._plan = replace(plan, watcher_pid=children.spawn(command, [], stdin=plan.watched_fd))
        self._watcher_fd = os.pidfd_open(self._plan.watcher_pid)

    def _on_watcher_death(self) -> None:
        os.waitpid(self._plan.watcher_pid, 0)
        os.close(self._watcher_fd)
        self._plan = replace(self._plan, watcher_pid=0)
        log.warning("the watcher of %s was killed: starting another", self._plan.target)
        if self._plan.watched_fd >= 0:  # unless an earlier program began this mount, and kept no end of the pipe
            self._watcher_at_ns = self._clock.now_ns() + int(_WATCHER_AFTER_S * 1e9)

    # -- the end --------------------------------------------------------------------------------------------------

    def _on_event(self, event: int) -> None:
        if event == signal.SIGHUP:
            if self._is_announced and not self._is_ending:
                self._become_new()
        elif event in (signal.SIGTERM, signal.SIGINT):
            if self._is_ending:
                log.warning("ended while files were open on %s", self._plan.target)
                self._detach()
                self._kill_all()
            else:
                self._end()
        elif event == _DETACHED[0]:
            log.info("%s was detached already: its workers serve what is still open, without us", self._plan.target)
            self._children.clear()
        elif event == _BUSY[0]:
            log.warning("%s is busy: detached; its open files are served for %g s more", self._plan.target, DRAIN_S)
            self._detach()
            self._kill_at_ns = self._clock.now_ns() + int(DRAIN_S * 1e9)
        elif event == _NOT_UNMOUNTED[0]:
            self._kill_all()

    def _end(self) -> None:
        """Unmount, from beside the loop: the kernel may ask something before it lets go."""
        self._is_ending = True
        self._vacant.clear()
        for child in self._children:
            if child.slot is None:
                child.kill()
        threading.Thread(target=self._unmount, name="orchestra-fuse-end", daemon=True).start()

    def _unmount(self) -> None:
        try:
            said = _UNMOUNTED
            if self._is_ours():
                mount.unmount(self._plan.target)
            elif not self._is_anywhere():
                said = _DETACHED
        except mount.BusyError:
            said = _BUSY
        except MountError as error:
            log.warning("%s", error)
            said = _NOT_UNMOUNTED
        os.write(self._wakeup_in, said)

    def _fail(self, sentence: str) -> None:
        """There is no mount, or none any more."""
        log.error("%s", sentence)
        if self._ready_pipe is not None:
            self._ready_pipe.fail(sentence)
        self._status = 1
        self._is_ending = True
        self._vacant.clear()
        self._detach()
        self._kill_all()

    def _detach(self) -> None:
        if not self._is_ours():
            return
        try:
            mount.unmount(self._plan.target, lazy=True)
        except MountError as error:
            log.warning("%s", error)

    def _is_ours(self) -> bool:
        """Whether our mount is still on the folder: its number is not used again while we hold its descriptor."""
        mounted = mount.mount_at(self._plan.target)
        return mounted is not None and mounted.device == self._plan.device

    def _is_anywhere(self) -> bool:
        """Whether our mount can be seen at all: another one may cover it, or show it elsewhere."""
        return any(mounted.device == self._plan.device for mounted in mount.mounted_folders())

    def _become_new(self) -> None:
        """Run the program that is on the disk now in this process, with everything that we hold."""
        if not self._can_resend():
            log.error("workers can be exchanged on Linux 6.9 and later: mount %s anew", self._plan.target)
            return
        plan = replace(
            self._plan, ready_fd=None, greeting=None, running=tuple(child.state() for child in self._children)
        )
        for fd in _held_by(plan):
            os.set_inheritable(fd, True)
        log.info("exchanging the program and the workers of %s", plan.target)
        os.execv(sys.executable, command_of(plan))


def _held_by(plan: Plan) -> list[int]:
    return [fd for fd in (*plan.device_fds, plan.memory_fd, plan.alive_fd, plan.watched_fd) if fd >= 0]


def command_of(plan: Plan) -> list[str]:
    """Return the command line of a supervisor; there is no secret in a plan."""
    return [sys.executable, "-m", "orchestra.fuse.supervisor", json.dumps(asdict(plan))]


def clone_device(device_fd: int) -> int:
    """Return another descriptor of the same mount, with a queue of its own for the requests it has read."""
    fd = os.open(mount.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, DEV_IOC_CLONE, device_fd.to_bytes(4, "little"))
    return fd


def main() -> int:
    """Run the supervisor that the command line describes."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    return Supervisor(Plan.of(sys.argv[1])).run()


if __name__ == "__main__":
    sys.exit(main())
