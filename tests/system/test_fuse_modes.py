"""Passthrough, page cache and versions: how an opened file is served, counted in messages."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from orchestra.fuse.options import OPEN_WORTH_BYTES
from orchestra.units import MIB
from tests.support.fuse_mounts import MakeServer, needs_fuse, read_count, servers
from tests.support.fuse_server import Server

pytestmark = [pytest.mark.system, needs_fuse]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeServer]:
    with servers(tmp_path) as make:
        yield make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = Random(11)
    folder = tmp_path / "store"
    folder.mkdir()
    for index in range(20):
        (folder / f"small{index}").write_bytes(random.randbytes(110_000))
    (folder / "large").write_bytes(random.randbytes(5 * MIB + 3))
    return folder


def _read(server: Server, name: str) -> bytes:
    """Read a whole file without Python's open(), which asks whether it is a terminal: one IOCTL a file."""
    fd = os.open(server.target / name, os.O_RDONLY)
    try:
        return os.read(fd, os.fstat(fd).st_size + 1)
    finally:
        os.close(fd)


def _wait_for(server: Server, name: str, count: int) -> None:
    """Wait for a counter; the kernel sends RELEASE and FORGET some time after the call that caused them."""
    while server.counters().get(name, 0) < count:
        pass


def test_a_large_complete_file_is_read_by_the_kernel_itself(make: MakeServer, folder: Path) -> None:
    """Passthrough: one backing file an open inode, and no READ reaches the process, ever."""
    server = make(folder)
    expected = (folder / "large").read_bytes()
    first, second = (os.open(server.target / "large", os.O_RDONLY) for _ in range(2))
    assert os.pread(first, len(expected), 0) == os.pread(second, len(expected), 0) == expected
    assert server.counters()["backing_opened"] == 1
    os.close(first)
    os.close(second)
    _wait_for(server, "backing_closed", 1)
    assert _read(server, "large") == expected
    _wait_for(server, "backing_closed", 2)
    counters = server.counters()
    assert (read_count(server), counters["backing_opened"], counters["RELEASE"]) == (0, 2, 3)
    assert counters["handles_open"] == 0


def test_a_small_file_is_kept_by_the_kernel(make: MakeServer, folder: Path) -> None:
    """In mode auto the second pass over small files sends OPEN and RELEASE, and no READ."""
    server = make(folder)
    for _ in range(2):
        for index in range(20):
            assert _read(server, f"small{index}") == (folder / f"small{index}").read_bytes()
    _wait_for(server, "RELEASE", 40)
    counters = server.counters()
    assert (counters["READ"], counters["OPEN"], counters["RELEASE"]) == (20, 40, 40)
    assert "FLUSH" not in counters
    assert (counters["backing_opened"], counters["handles_made"]) == (0, 0)


def test_a_mount_of_small_files_stops_being_asked_for_opens(make: MakeServer, folder: Path) -> None:
    """After so many OPENs of small files, and none of a large one, a warm pass sends nothing; a large file that comes
    later is read through the process, every byte right."""
    server = make(folder, small_opens_max=30)
    for _ in range(3):
        for index in range(20):
            assert _read(server, f"small{index}") == (folder / f"small{index}").read_bytes()
    _wait_for(server, "RELEASE", 30)
    counters = server.counters()
    assert (counters["READ"], counters["OPEN"], counters["RELEASE"]) == (20, 31, 30)
    assert _read(server, "large") == (folder / "large").read_bytes()
    server.tell("wait_no_handles")
    counters = server.counters()
    assert (counters["OPEN"], counters["backing_opened"]) == (31, 0)
    assert counters["READ"] > 20


def test_a_mount_that_has_met_a_large_file_keeps_passthrough(make: MakeServer, folder: Path) -> None:
    """One look at a large file is enough while the small ones are few, and the kernel is asked for every OPEN."""
    server = make(folder, small_opens_max=5)
    os.stat(server.target / "large")
    for index in range(20):
        assert _read(server, f"small{index}") == (folder / f"small{index}").read_bytes()
    assert _read(server, "large") == (folder / "large").read_bytes()
    counters = server.counters()
    assert (counters["OPEN"], counters["backing_opened"]) == (21, 1)


def test_a_large_file_among_many_small_ones_does_not_keep_the_opens(make: MakeServer, folder: Path) -> None:
    """What was opened weighs against what could pass through; and while a large file is open, nothing changes."""
    server = make(folder, small_opens_max=5)
    expected = (folder / "large").read_bytes()
    large = os.open(server.target / "large", os.O_RDONLY)
    enough = 2 * len(expected) // OPEN_WORTH_BYTES + 20  # it was met, and opened
    for index in range(enough):
        _read(server, f"small{index % 20}")
    assert os.pread(large, len(expected), 0) == expected
    assert server.counters()["OPEN"] == enough + 1
    os.close(large)
    _wait_for(server, "backing_closed", 1)
    for _ in range(2):
        for index in range(20):
            assert _read(server, f"small{index}") == (folder / f"small{index}").read_bytes()
    assert server.counters()["OPEN"] == enough + 2
    assert _read(server, "large") == expected
    counters = server.counters()
    assert (counters["OPEN"], counters["backing_opened"]) == (enough + 2, 1)


def test_in_pagecache_mode_a_warm_pass_sends_nothing_at_all(make: MakeServer, folder: Path) -> None:
    """After one refused OPEN the kernel opens, reads and closes by itself."""
    server = make(folder, mode="pagecache")
    names = [f"small{index}" for index in range(20)] + ["large"]
    for name in names:
        assert _read(server, name) == (folder / name).read_bytes()
    server.tell("wait_no_handles")  # the last is closed after its READ was answered
    cold = server.counters()
    assert cold["OPEN"] == 1
    assert "RELEASE" not in cold
    for name in names:
        assert _read(server, name) == (folder / name).read_bytes()
    assert server.counters() == cold


def test_mode_passthrough_passes_small_files_too(make: MakeServer, folder: Path) -> None:
    """Every complete file, whatever its size."""
    server = make(folder, mode="passthrough")
    assert _read(server, "small0") == (folder / "small0").read_bytes()
    assert (read_count(server), server.counters()["backing_opened"]) == (0, 1)


def test_a_file_opened_before_it_was_complete_stays_with_the_process_until_all_have_closed(
    make: MakeServer, folder: Path
) -> None:
    """The kernel answers EIO to an inode opened in two ways; from the next first open on it is passed through."""
    server = make(folder)
    expected = (folder / "large").read_bytes()
    server.tell("uncache", "/large")
    before = os.open(server.target / "large", os.O_RDONLY)
    server.tell("cache", "/large")
    assert _read(server, "large") == expected
    assert server.counters()["backing_opened"] == 0
    os.close(before)
    _wait_for(server, "RELEASE", 2)
    reads = read_count(server)
    assert _read(server, "large") == expected
    assert (server.counters()["backing_opened"], read_count(server)) == (1, reads)


def test_a_file_being_passed_through_stays_so_when_it_is_evicted(make: MakeServer, folder: Path) -> None:
    """The backing file lives as long as it is open; a second open shares it."""
    server = make(folder)
    expected = (folder / "large").read_bytes()
    first = os.open(server.target / "large", os.O_RDONLY)
    server.tell("uncache", "/large")
    second = os.open(server.target / "large", os.O_RDONLY)
    assert os.pread(first, len(expected), 0) == os.pread(second, len(expected), 0) == expected
    assert (server.counters()["backing_opened"], read_count(server)) == (1, 0)
    os.close(first)
    os.close(second)


def test_without_the_privilege_reads_go_through_the_process(make: MakeServer, folder: Path) -> None:
    """A kernel that refuses a backing file is asked once; every byte is still right."""
    server = make(folder, drop_sys_admin=True)
    for _ in range(3):
        assert _read(server, "large") == (folder / "large").read_bytes()
    counters = server.counters()
    assert (counters["backing_opened"], counters["backing_refused"]) == (0, 1)
    assert counters["reads_cached"] > 0


@pytest.mark.parametrize("mode", ["auto", "passthrough", "pagecache"])
@pytest.mark.parametrize("name", ["small0", "large"])
def test_a_rewritten_object_is_new_bytes_for_who_opens_it_and_old_ones_for_who_has_it_open(
    make: MakeServer, folder: Path, mode: str, name: str
) -> None:
    """Two versions of one path are two inodes: neither pages nor backing files are ever shared."""
    server = make(folder, mode=mode, freshness_s=0.0)
    old, new = (folder / name).read_bytes(), os.urandom((folder / name).stat().st_size + 5)
    with open(server.target / name, "rb", buffering=0) as opened:  # noqa: PTH123 - stays open
        assert opened.read() == old
        inode = os.fstat(opened.fileno()).st_ino
        (folder / "draft").write_bytes(new)
        (folder / "draft").rename(folder / name)
        assert _read(server, name) == new
        assert os.stat(server.target / name).st_ino != inode
        assert os.fstat(opened.fileno()).st_size == len(old)
        assert os.pread(opened.fileno(), len(old), 0) == old
    assert _read(server, name) == new


@pytest.mark.parametrize("mode", ["auto", "pagecache"])
def test_a_read_that_finds_its_version_gone_gets_estale_and_the_next_open_the_new_version(
    make: MakeServer, folder: Path, mode: str
) -> None:
    """Also when the old version was missing from the cache, and long before the freshness of a minute has passed."""
    server = make(folder, mode=mode)
    new = os.urandom(50_000)
    for uncached in (False, True):
        name = f"small{int(uncached)}"
        fd = os.open(server.target / name, os.O_RDONLY)
        if uncached:
            server.tell("uncache", f"/{name}")
        (folder / name).write_bytes(new)
        with pytest.raises(OSError) as caught:
            os.pread(fd, 1000, 0)
        assert caught.value.errno == errno.ESTALE
        os.close(fd)
        _wait_for(server, "entries_expired", int(uncached) + 1)  # sent beside the answer, by another thread
        assert _read(server, name) == new
    assert server.counters()["stale"] >= 2


def test_forgotten_inodes_leave_the_table(make: MakeServer, folder: Path) -> None:
    """When the kernel drops its caches, what is held for it goes too."""
    server = make(folder)
    for index in range(20):
        _read(server, f"small{index}")
    assert server.counters()["inodes"] == 21
    Path("/proc/sys/vm/drop_caches").write_text("2")
    while server.counters()["inodes"] > 1:
        pass
    assert server.counters()["errors_unforeseen"] == 0
    assert _read(server, "small3") == (folder / "small3").read_bytes()


def test_an_unchanged_directory_is_listed_from_the_kernels_copy(make: MakeServer, folder: Path) -> None:
    """The third listing sends no READDIR; a changed directory is read anew."""
    server = make(folder, freshness_s=0.0)

    def names_and_messages() -> tuple[int, int]:
        count = len(os.listdir(server.target))
        counters = server.counters()
        return count, counters.get("READDIR", 0) + counters.get("READDIRPLUS", 0)

    seen = [names_and_messages() for _ in range(4)]
    assert {count for count, _ in seen} == {21}
    assert seen[1][1] == seen[2][1] == seen[3][1]
    (folder / "new").touch()
    assert names_and_messages()[0] == 22


def test_names_that_no_path_can_spell_do_not_spoil_their_directory(make: MakeServer, folder: Path) -> None:
    """They are left out; the rest lists."""
    server = make(folder)
    server.tell("extra", "/..", "/x\0y", "/" + "n" * 300)
    assert len(os.listdir(server.target)) == 21
    assert server.counters()["names_hidden"] >= 3
