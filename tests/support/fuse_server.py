"""Serves a folder through FUSE as `orchestra fuse mount` does, and obeys a test, one JSON line each way.

Run as a script it becomes the supervisor (`mount FOLDER MOUNTPOINT OPTIONS_JSON NAME READY_FD`), which runs it as the
worker (`worker ... CONTROL_FD`): that one connects to the test's socket and obeys there. `Server` is the test's end.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestra.errors import OrchestraError
from orchestra.fuse.background import ReadyPipe
from orchestra.fuse.children import CONTROL
from orchestra.fuse.launch import launch
from orchestra.fuse.mount import mount_at, unmount
from orchestra.fuse.options import Mode, MountOptions
from orchestra.fuse.session import Session
from orchestra.fuse.worker import serve_slot
from orchestra.values import Entry, EntryKind
from tests.support.folder_client import FolderClient


class Server:
    """The test's end: a mount that lives until `close`. `process` is its supervisor."""

    def __init__(self, folder: Path, target: Path, *, launcher: Sequence[str] = (), **options: Any) -> None:
        self.target = target
        self._commands: IO[str] | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("")  # a name of no file: any user may connect
        self._listener.listen()
        name = self._listener.getsockname().hex()
        ready, theirs = os.pipe()
        command = [*(launcher or [sys.executable]), __file__, "mount", str(folder), str(target), json.dumps(options)]
        self.process = subprocess.Popen(
            [*command, name, str(theirs)],
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs,),
            env=os.environ | {"XDG_STATE_HOME": str(target.parent / "state")},
        )
        os.close(theirs)
        with os.fdopen(ready) as said:
            answers = [json.loads(line) for line in said]
        if not answers or "ready" not in answers[-1]:
            self.close()
            raise AssertionError(f"the mount did not come up: {answers[-1:]}")

    def _channel(self) -> IO[str]:
        """The line to the worker, which connected before the mount was ready."""
        if self._commands is None:
            assert select.select([self._listener], [], [], 60)[0], "no worker connected"
            with self._listener.accept()[0] as connection:
                self._commands = connection.makefile("rw")
        return self._commands

    def tell(self, command: str, *arguments: Any) -> Any:
        """Call a method of the client, or "counters"; return what it returned."""
        channel = self._channel()
        channel.write(json.dumps([command, *arguments]) + "\n")
        channel.flush()
        answer = json.loads(channel.readline() or "null")
        assert isinstance(answer, dict) and "result" in answer, f"{command} failed in the server: {answer}"
        return answer["result"]

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.tell("counters")
        return found

    def is_mounted(self) -> bool:
        return mount_at(str(self.target)) is not None

    def close(self) -> int:
        """End the processes and leave nothing mounted; return the supervisor's exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        while self.is_mounted():
            unmount(str(self.target), lazy=True)
        if self._commands is not None:
            self._commands.close()
        self._listener.close()
        return status


def _obey_all(client: FolderClient, session: Session, name: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(name)
        with connection.makefile("rw") as channel:
            while line := channel.readline():
                command, *arguments = json.loads(line)
                answer: dict[str, Any]
                try:
                    answer = {"result": _obey(client, session, command, arguments)}
                except (AssertionError, AttributeError, TypeError) as error:  # the test must not wait for ever
                    answer = {"error": repr(error)}
                channel.write(json.dumps(answer) + "\n")
                channel.flush()


def _obey(client: FolderClient, session: Session, name: str, arguments: list[str]) -> Any:
    if name == "extra":
        client.extra = [Entry(path, EntryKind.FILE, 0, 0, "v") for path in arguments]
        return None
    if name == "defect":
        client.defects.update(arguments)
        return None
    if name != "counters":
        return getattr(client, name)(*arguments)
    return session.counters.snapshot() | {
        "inodes": len(session.table),
        "threads": session.channel.threads_started,
        "pending": session.channel.pending_count,
        "handles_open": client.handles_open,
        "handles_made": client.handles_made,
    }


def _drop_sys_admin() -> None:
    """Give up CAP_SYS_ADMIN, which registering a backing file needs, for good (capset(2), version 3)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("<Ii", 0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    for index in range(3):  # effective, permitted, inheritable of the first 32 capabilities
        sets[index] &= ~(1 << 21)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def _work(client: FolderClient, options: MountOptions, name: bytes, control_fd: int, *, drop_sys_admin: bool) -> None:
    """Be the worker."""

    def on_session(session: Session) -> None:
        if drop_sys_admin:
            _drop_sys_admin()
        threading.Thread(target=_obey_all, args=(client, session, name), daemon=True).start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor
    serve_slot(client, options, control_fd, on_session=on_session)


def main() -> None:
    role, folder, target, text, name, fd = sys.argv[1:]
    given = json.loads(text)
    client = FolderClient(folder, freshness_s=given.pop("freshness_s", 60.0))
    for path in given.pop("uncached", []):
        client.uncache(path)
    drop_sys_admin = given.pop("drop_sys_admin", False)
    options = MountOptions(**given | {"mode": Mode(given.get("mode", "auto"))})
    if role == "worker":
        _work(client, options, bytes.fromhex(name), int(fd), drop_sys_admin=drop_sys_admin)
        return
    command = [sys.executable, __file__, "worker", folder, target, text, name, CONTROL]
    try:
        launch(client, target, options, command, ready_fd=int(fd))
    except OrchestraError as error:
        ReadyPipe(int(fd)).fail(error.message)
        sys.exit(1)


if __name__ == "__main__":
    main()
