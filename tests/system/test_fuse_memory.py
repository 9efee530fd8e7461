"""A mount in a container: all its processes under one limit of memory, and more is read than fits."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.fuse.mount import mount_at, unmount
from orchestra.units import GIB, MIB
from tests.support.fuse_mounts import needs_fuse
from tests.support.memory_group import MemoryGroup, memory_group

pytestmark = [pytest.mark.system, pytest.mark.slow, needs_fuse]

# 128 MiB of them are the blocks that the daemon has in flight (fetch.in_flight_max).
_LIMIT_BYTES = 384 * MIB
# More than a GiB, and nearly three times the limit.
_READ_BYTES = GIB + 64 * MIB

_READER = """
import os, random, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
places = list(range(0, int(sys.argv[2]), 1 << 20))
random.Random(5).shuffle(places)
for place in places:
    data = os.pread(fd, 1 << 20, place)
    assert len(data) == 1 << 20 and int.from_bytes(data[:8], "little") == place and not any(data[8:100]), place
"""


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with memory_group(_LIMIT_BYTES) as group:
        yield group


@pytest.mark.timeout(300)
def test_random_reads_of_more_than_the_limit_kill_nothing(group: MemoryGroup, tmp_path: Path) -> None:
    """Daemon, supervisor, workers and reader share 384 MiB; every byte is right, and the limit was really met."""
    store, target = tmp_path / "store", tmp_path / "mnt"
    store.mkdir()
    target.mkdir()
    with (store / "large").open("wb") as file:
        for place in range(0, _READ_BYTES, MIB):  # sparse: each MiB begins with its place
            file.seek(place)
            file.write(place.to_bytes(8, "little"))
        file.truncate(_READ_BYTES)
    config = tmp_path / "orchestra.toml"
    config.write_text(
        f'[cache]\ndir = "{tmp_path}/cache"\nsize = "2GiB"\nfree_space_ratio = 0\n'
        f'[[mount]]\npath = "/data"\nuri = "file://{store}"\n'
    )
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
    orchestra = [sys.executable, "-m", "orchestra", "--config", str(config)]

    def run(*words: str) -> str:
        done = subprocess.run(
            group.command(words), capture_output=True, text=True, check=False, env=environment, timeout=280
        )
        assert (done.returncode, done.stderr) == (0, ""), words
        return done.stdout

    try:
        run(*orchestra, "fuse", "mount", "--mode", "pagecache", str(target))
        served = json.loads(run(*orchestra, "fuse", "ls", "--json"))
        serving = set(next(row["workers"] for row in served if row["folder"] == str(target)))
        assert serving <= group.processes()
        run(sys.executable, "-c", _READER, str(target / "data" / "large"), str(_READ_BYTES))
        assert serving <= group.processes()
        assert group.kills() == 0
        assert group.limit_hits() > 0
        assert 0.9 * _LIMIT_BYTES < group.peak_bytes() <= _LIMIT_BYTES
        assert group.anonymous_bytes() < 0.8 * _LIMIT_BYTES
    finally:
        while mount_at(str(target)) is not None:
            unmount(str(target), lazy=True)
        subprocess.run([*orchestra, "daemon", "stop"], env=environment, check=False, capture_output=True)
        _wait_empty(group)


def _wait_empty(group: MemoryGroup) -> None:
    """The supervisor ends some time after its mount."""
    for pid in group.processes():
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([pidfd], [], [], 60)[0], f"process {pid} is still there"
        os.close(pidfd)
