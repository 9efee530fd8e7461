"""The processes of a supervisor: starting them, hearing them, telling them, and knowing when they have ended.

Owns: descriptors and pids. Leaves to others: which worker does what (supervisor.py). A child is started with nothing
but the descriptors named; its control socket carries JSON lines both ways, and its end tells it that we are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

CONTROL = "{control}"  # stands for the descriptor's number in a command
_LINE_BYTES_MAX = 65_536
_HASTE = -20  # among ten busy programs on two cores a start then takes what it takes alone


@dataclass(slots=True, eq=False)
class Child:
    """A worker process. `slot` is None while it stands by."""

    pid: int
    control: socket.socket
    pidfd: int = -1
    slot: int | None = None
    is_standing_by: bool = False  # has imported everything and waits for a slot
    serving_since_ns: int = 0
    is_hastened: bool = False
    _heard: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        self.pidfd = os.pidfd_open(self.pid)
        self.control.setblocking(False)

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message; one that has ended hears nothing, which its pidfd says."""
        try:
            self.control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def hear(self) -> list[dict[str, Any]]:
        """Return what it has said since the last time."""
        try:
            said = self.control.recv(_LINE_BYTES_MAX)
        except OSError:
            return []
        *lines, self._heard = (self._heard + said).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """End it at once."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def hasten(self) -> None:
        """Put it before all other programs, where that is ours to do (root): readers wait for it."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.pid, _HASTE)
            self.is_hastened = True

    def calm(self) -> None:
        """Put it among the others again: each of its threads, as a priority is a thread's."""
        self.is_hastened = False
        with contextlib.suppress(OSError):  # it has ended
            for thread in os.listdir(f"/proc/{self.pid}/task"):
                os.setpriority(os.PRIO_PROCESS, int(thread), os.getpriority(os.PRIO_PROCESS, 0))

    def reap(self) -> int:
        """Return the exit status of a child that has ended (negative: the signal), and let go of it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.control.close()
        return os.waitstatus_to_exitcode(status)

    def state(self) -> dict[str, Any]:
        """What a later program in our process needs to know it by; its control socket is then inherited."""
        os.set_inheritable(self.control.fileno(), True)
        return {"pid": self.pid, "control_fd": self.control.fileno(), "slot": self.slot}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Child:
        """The inverse of `state`."""
        os.set_inheritable(state["control_fd"], False)
        return cls(state["pid"], socket.socket(fileno=state["control_fd"]), slot=state["slot"], is_standing_by=False)


def start(command: Sequence[str], descriptors: Sequence[int]) -> Child:
    """Start a worker by `command`, in which CONTROL is replaced; it has `descriptors` under their numbers here."""
    ours, theirs = socket.socketpair()
    with theirs:
        words = [word.replace(CONTROL, str(theirs.fileno())) for word in command]
        return Child(spawn(words, [*descriptors, theirs.fileno()]), ours)


def spawn(command: Sequence[str], descriptors: Sequence[int], *, stdin: int | None = None) -> int:
    """Start a process that inherits standard output and error and these descriptors; return its pid.

    It is a process group of its own: Ctrl-C is for the supervisor, which ends the others in their order.
    """
    actions: list[tuple[Any, ...]] = []
    if stdin is None:
        actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
    else:
        actions.append((os.POSIX_SPAWN_DUP2, stdin, 0))
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in descriptors]  # onto itself: not closed on exec
    return os.posix_spawnp(
        command[0],
        list(command),
        os.environ,
        file_actions=actions,
        setpgroup=0,
        setsigdef=[signal.SIGINT, signal.SIGTERM],
    )
