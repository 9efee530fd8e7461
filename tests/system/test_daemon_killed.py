"""kill -9 of the daemon again and again, while eight readers read cold files: four through the mount, four by fsspec.

The guards: each kill met a daemon that lived and reads that had begun and not ended, and none of these daemons was the
same. Kills follow progress and no clock: one for every few files read.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from orchestra.fuse.mount import mount_at, unmount
from tests.support.cache import data_of
from tests.support.fuse_mounts import needs_fuse
from tests.support.node import PATIENCE_S, DaemonNode, folder_daemon_node

pytestmark = [pytest.mark.system, pytest.mark.slow, needs_fuse]

READERS_OF_EACH_KIND = 4
FILES_OF_EACH_KIND = 100
# Blocks of 64 KiB: every file is two of them, so that a daemon may die between the two.
SIZE = 100_000
KILLS = 8
FILES_BETWEEN_KILLS = 15
assert KILLS * FILES_BETWEEN_KILLS < 2 * FILES_OF_EACH_KIND, "readers are at work at the last kill"


class Race:
    """Readers take names until none is left, and tell how far they are."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._names = {kind: [f"{kind}{number}" for number in range(FILES_OF_EACH_KIND)] for kind in ("m", "f")}
        self._in_flight = 0
        self._done = 0
        self.failures: list[str] = []

    def run(self, kind: str, read: Callable[[str], bytes]) -> None:
        """Read every name of a kind with whoever else does, and compare."""
        while True:
            with self._moved:
                if not self._names[kind]:
                    return
                name = self._names[kind].pop()
                self._in_flight += 1
            try:
                said = "" if read(name) == data_of(name, SIZE) else "other bytes"
            except OSError as error:
                said = f"{type(error).__name__}: {error}"
            with self._moved:
                self._in_flight -= 1
                self._done += 1
                self.failures += [f"{name}: {said}"] if said else []
                self._moved.notify_all()

    def wait_done(self, count: int) -> int:
        """Wait until so many files were read; return how many reads are under way then."""
        with self._moved:
            assert self._moved.wait_for(lambda: self._done >= count, PATIENCE_S), "the readers stand still"
            return self._in_flight


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[tuple[DaemonNode, Path]]:
    """A node of a folder with the files of both kinds, and its mount, by the command as a user types it."""
    cache = {"block_size": "64KiB", "extent_size": "256KiB"}
    target = tmp_path / "mnt"
    target.mkdir()
    with folder_daemon_node(tmp_path, cache=cache) as (node, store):
        for kind in ("m", "f"):
            for number in range(FILES_OF_EACH_KIND):
                (store / f"{kind}{number}").write_bytes(data_of(f"{kind}{number}", SIZE))
        command = [sys.executable, "-m", "orchestra", "--config", str(node.config_path), "fuse", "mount", str(target)]
        environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=PATIENCE_S)
        try:
            yield node, target
        finally:
            while mount_at(str(target)) is not None:
                unmount(str(target), lazy=True)


def test_a_daemon_killed_again_and_again_costs_its_readers_nothing_but_time(
    mounted: tuple[DaemonNode, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error and no wrong byte, through the mount and through fsspec, over eight deaths with reads in flight."""
    node, target = mounted
    monkeypatch.setenv("ORCHESTRA_CONFIG", str(node.config_path))
    filesystem = fsspec.filesystem("orchestra", skip_instance_cache=True)
    race = Race()
    readers = {
        "m": lambda name: (target / "data" / name).read_bytes(),
        "f": lambda name: bytes(filesystem.cat_file(f"/data/{name}")),
    }
    threads = [
        threading.Thread(target=race.run, args=(kind, read), daemon=True)
        for kind, read in readers.items()
        for _ in range(READERS_OF_EACH_KIND)
    ]
    for thread in threads:
        thread.start()
    killed = []
    for number in range(1, KILLS + 1):
        in_flight = race.wait_done(number * FILES_BETWEEN_KILLS)
        assert in_flight, "nobody was reading"
        killed.append(node.start()["pid"])  # the one that lives, or a new one if none does
        os.kill(killed[-1], signal.SIGKILL)
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a reader hangs"
    assert race.failures == []
    assert len(set(killed)) == KILLS
    assert race.wait_done(0) == 0
