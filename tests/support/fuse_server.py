"""Serves a folder through FUSE in a process of its own and obeys a test, one JSON line each way.

Run as a script: `fuse_server.py FOLDER MOUNTPOINT OPTIONS_JSON`. The main thread serves (so signals work as in the real
command); a thread reads commands. `Server` is the test's end of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestra.errors import OrchestraError
from orchestra.fuse.mount import mount_at, unmount
from orchestra.fuse.options import Mode, MountOptions
from orchestra.fuse.serve import serve
from orchestra.fuse.session import Session
from orchestra.values import Entry, EntryKind
from tests.support.folder_client import FolderClient


class Server:
    """The test's end: a mount that lives until `close`."""

    def __init__(self, folder: Path, target: Path, *, launcher: Sequence[str] = (), **options: Any) -> None:
        self.target = target
        launcher = launcher or [sys.executable]
        command = [*launcher, __file__, str(folder), str(target), json.dumps(options)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer = self._answer()
        if answer != "ready":
            self.close()
            raise AssertionError(f"the mount did not come up: {answer}")

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def tell(self, command: str, *arguments: Any) -> Any:
        """Call a method of the client, or "counters"; return what it returned."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        assert isinstance(answer, dict) and "result" in answer, f"{command} failed in the server: {answer}"
        return answer["result"]

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.tell("counters")
        return found

    def is_mounted(self) -> bool:
        return mount_at(str(self.target)) is not None

    def close(self) -> int:
        """End the process and leave nothing mounted; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        while self.is_mounted():
            unmount(str(self.target), lazy=True)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return status


def _say(value: Any) -> None:
    os.write(1, (json.dumps(value) + "\n").encode())


def _obey_all(client: FolderClient, sessions: list[Session]) -> None:
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            _say({"result": _obey(client, sessions[0], name, arguments)})
        except (AssertionError, AttributeError, TypeError) as error:  # the test must not wait for ever
            _say({"error": repr(error)})


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


def main() -> int:
    folder, target, text = sys.argv[1:]
    given = json.loads(text)
    client = FolderClient(folder, freshness_s=given.pop("freshness_s", 60.0))
    for path in given.pop("uncached", []):
        client.uncache(path)
    drop_sys_admin = given.pop("drop_sys_admin", False)
    given["mode"] = Mode(given.get("mode", "auto"))
    sessions: list[Session] = []

    def on_session(session: Session) -> None:
        if drop_sys_admin:
            _drop_sys_admin()
        sessions.append(session)
        threading.Thread(target=_obey_all, args=(client, sessions), daemon=True).start()

    try:
        serve(client, target, MountOptions(**given), lambda: _say("ready"), on_session=on_session)
    except OrchestraError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
