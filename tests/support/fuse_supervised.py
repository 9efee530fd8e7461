"""Mounts a folder with a supervisor and workers in processes of their own, and proves what is in flight where.

Run as a script it is a worker (`worker FOLDER GATE OPTIONS CONTROL_FD`) or becomes the supervisor (`mount ...`).
`Supervised` is the test's end. A worker's slow calls for paths with "slow" in them report on a pipe, with the worker's
pid, and then wait for a lock file, so that a test knows which process holds a request when it kills it. The start of a
worker waits for another, so that a test knows who is there.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestra.fuse import registry
from orchestra.fuse.children import CONTROL
from orchestra.fuse.launch import launch
from orchestra.fuse.mount import mount_at, unmount
from orchestra.fuse.options import MountOptions
from orchestra.fuse.worker import serve_slot
from tests.support.folder_client import FolderClient

T = TypeVar("T")


class GatedClient(FolderClient):
    """Slow calls for paths with "slow" in them wait at the gate."""

    def __init__(self, folder: str, gate: Path) -> None:
        super().__init__(folder)
        self._gate = gate

    def is_uncached(self, path: str) -> bool:
        return "slow" in path

    def pass_gate(self, path: str) -> None:
        if "slow" not in path:
            return
        said = os.open(self._gate / "held", os.O_WRONLY)
        os.write(said, f"{os.getpid()} {path}\n".encode())
        os.close(said)
        with (self._gate / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)


class Supervised:
    """The test's end: a mount that lives until `close`."""

    def __init__(self, folder: Path, root: Path, *, workers: int = 1, **options: Any) -> None:
        self.target = root / "supervised"
        self.gate = root / "gate"
        self.target.mkdir()
        self.gate.mkdir()
        os.mkfifo(self.gate / "held")
        self._held = os.open(self.gate / "held", os.O_RDWR)
        self._lock = (self.gate / "lock").open("w")
        self._starts = (self.gate / "starts").open("w")
        self.environment = {**os.environ, "XDG_STATE_HOME": str(root / "state")}
        os.environ["XDG_STATE_HOME"] = self.environment["XDG_STATE_HOME"]
        command = [sys.executable, __file__, "mount", str(folder), str(self.gate), json.dumps(options)]
        self.process = subprocess.Popen(
            [*command, str(self.target), str(workers)], stdout=subprocess.PIPE, env=self.environment
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    @property
    def workers(self) -> list[int]:
        """The pids that serve now."""
        record = registry.record_of(str(self.target))
        return [] if record is None else record.workers or []

    def children(self) -> list[int]:
        """Every process of the supervisor: workers, who stands by, the watcher."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def wait_child_count(self, count: int) -> None:
        """Wait until the supervisor has so many processes."""
        wait_until(lambda: len(self.children()) == count)

    def closed_gate(self) -> AbstractContextManager[None]:
        """Hold every slow call in it."""
        return _held(self._lock)

    def closed_starts(self) -> AbstractContextManager[None]:
        """Hold every start of a worker in it."""
        return _held(self._starts)

    def wait_held(self) -> tuple[int, str]:
        """Wait for the next slow call; return (pid of the worker, path)."""
        assert select.select([self._held], [], [], 60)[0], "no slow call came"
        said = b""
        while not said.endswith(b"\n"):
            said += os.read(self._held, 1)
        pid, path = said.decode().split()
        return int(pid), path

    def is_mounted(self) -> bool:
        return mount_at(str(self.target)) is not None

    def close(self) -> int:
        """End it and leave nothing mounted; return the exit status. Idempotent."""
        if self._held < 0:
            return self.process.returncode
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        while self.is_mounted():
            unmount(str(self.target), lazy=True)
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._held)
        self._held = -1
        self._lock.close()
        self._starts.close()
        return status


@contextmanager
def _held(lock: IO[str]) -> Iterator[None]:
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something that nobody tells of: look again and again."""
    poll = select.poll()
    for _ in range(200):
        if is_so():
            return
        poll.poll(100)
    raise AssertionError("it did not come to that")


def kill(pid: int) -> None:
    """SIGKILL a process and wait until it has ended."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


def beside(work: Callable[[], T]) -> Future[T]:
    """Do `work` on a thread of its own."""
    return ThreadPoolExecutor(1).submit(work)


def main() -> None:
    role, folder, gate, text, *rest = sys.argv[1:]
    client = GatedClient(folder, Path(gate))
    options = MountOptions(**json.loads(text))
    if role == "worker":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Path(gate, "starts").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
        serve_slot(client, options, int(rest[0]))
        return
    target, workers = rest
    command = [sys.executable, __file__, "worker", folder, gate, text, CONTROL]
    launch(client, target, options, command, workers=int(workers), greeting="ready")


if __name__ == "__main__":
    main()
