"""A mounted folder is a folder: what programs do to read one works on it, in every mode."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from orchestra.fuse.directories import NAMES_PER_REPLY_MAX
from orchestra.fuse.options import PRIMED_ENTRIES_MAX, Mode
from orchestra.units import GIB, MIB
from tests.support.fuse_mounts import MakeServer, needs_fuse, read_count, servers
from tests.support.fuse_server import Server

pytestmark = [pytest.mark.system, needs_fuse]


def _run(*command: str | Path, cwd: Path | None = None, standard_input: str | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, input=standard_input, capture_output=True, text=True, errors="surrogateescape", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeServer]:
    with servers(tmp_path) as make:
        yield make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small files, one larger than a read, one larger than the passthrough threshold, odd names, a deep path."""
    random = Random(7)
    folder = tmp_path / "store"
    (folder / "class a" / "b").mkdir(parents=True)
    (folder / "empty folder").mkdir()
    (folder / "zero").touch()
    for index in range(20):
        (folder / "class a" / f"{index}.png").write_bytes(random.randbytes(500 * index))
    (folder / "class a" / "b" / "large").write_bytes(random.randbytes(3 * MIB + 17))
    (folder / "medium").write_bytes(random.randbytes(700_001))
    for name in ("naïve-日本語-🎻", "new\nline", "n" * 255, "ä" * 127, " trailing ", os.fsdecode(b"not-utf8-\xff")):
        (folder / name).write_text(name, errors="surrogateescape")
    (folder / "/".join(["deep" * 10] * 20)).mkdir(parents=True)
    (folder / "/".join(["deep" * 10] * 20) / "bottom").write_text("here")
    return folder


@pytest.fixture(params=list(Mode))
def server(request: pytest.FixtureRequest, make: MakeServer, folder: Path) -> Server:
    return make(folder, mode=request.param.value)


def _digests(root: Path) -> dict[bytes, str]:
    found = {}
    for folder, _, names in os.walk(os.fsencode(root)):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:  # noqa: PTH123 - a path of bytes
                found[os.path.relpath(path, os.fsencode(root))] = hashlib.md5(file.read()).hexdigest()
    return found


def test_every_byte_under_every_name_is_there(server: Server, folder: Path) -> None:
    """The mounted tree has the names and the digests of the folder behind it, twice."""
    expected = _digests(folder)
    assert len(expected) == 30
    assert _digests(server.target) == expected
    assert _digests(server.target) == expected


def test_listing_programs_agree_with_the_folder(server: Server, folder: Path) -> None:
    """`ls -R` and `find` print the same for both; `find` sees sizes and kinds."""
    for command in (["ls", "-R"], ["find", ".", "-type", "f", "-size", "+1k"], ["find", ".", "-type", "d"]):
        ours, theirs = (sorted(_run(*command, cwd=at).splitlines()) for at in (server.target, folder))
        assert ours == theirs, command


def test_copying_programs_copy_every_byte(server: Server, folder: Path, tmp_path: Path) -> None:
    """`cp -r`, `tar` and `md5sum -c` of the mounted folder."""
    _run("cp", "-r", server.target, tmp_path / "copied")
    assert _digests(tmp_path / "copied") == _digests(folder)
    _run("tar", "-C", server.target, "-cf", tmp_path / "all.tar", ".")
    with tarfile.open(tmp_path / "all.tar") as archive:
        assert sum(member.isfile() for member in archive) == 30
    sums = _run("md5sum", "medium", "class a/b/large", cwd=folder)
    assert _run("md5sum", "-c", standard_input=sums, cwd=server.target).count(": OK") == 2


def test_mapped_and_sent_files_are_the_same_bytes(server: Server, folder: Path, tmp_path: Path) -> None:
    """`mmap` and `sendfile` read through the kernel's page cache or the backing file."""
    for name in ("medium", "class a/b/large"):
        expected = (folder / name).read_bytes()
        with open(server.target / name, "rb") as file:  # noqa: PTH123 - the descriptor is what is tested
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == expected
            with open(tmp_path / "sent", "w+b") as sent:  # noqa: PTH123 - as above
                while os.sendfile(sent.fileno(), file.fileno(), None, 1 << 20):
                    pass
                assert os.pread(sent.fileno(), len(expected) + 1, 0) == expected


def test_random_reads_at_odd_offsets(server: Server, folder: Path) -> None:
    """Any offset and length, up to and past the end."""
    random = Random(3)
    expected = (folder / "class a/b/large").read_bytes()
    with open(server.target / "class a/b/large", "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered
        for _ in range(200):
            offset, length = random.randrange(len(expected) + 10), random.randrange(1, 200_000)
            assert os.pread(file.fileno(), length, offset) == expected[offset : offset + length]
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == len(expected)


def test_writing_of_any_kind_is_refused(server: Server) -> None:
    """EROFS, from the kernel, for whoever tries what."""
    at = server.target
    attempts: dict[str, Callable[[], object]] = {
        "create": lambda: os.open(at / "new", os.O_CREAT | os.O_WRONLY),
        "append": lambda: os.open(at / "medium", os.O_APPEND | os.O_WRONLY),
        "truncate": lambda: os.truncate(at / "medium", 0),
        "unlink": lambda: os.unlink(at / "medium"),
        "rename": lambda: os.rename(at / "medium", at / "other"),
        "mkdir": lambda: os.mkdir(at / "d"),
        "rmdir": lambda: os.rmdir(at / "empty folder"),
        "symlink": lambda: os.symlink("x", at / "link"),
        "link": lambda: os.link(at / "medium", at / "link"),
        "chmod": lambda: os.chmod(at / "medium", 0o777),
        "chown": lambda: os.chown(at / "medium", 1, 1),
        "utime": lambda: os.utime(at / "medium"),
        "setxattr": lambda: os.setxattr(at / "medium", "user.x", b"y"),
    }
    for name, attempt in attempts.items():
        with pytest.raises(OSError, match=r"Read-only file system"):
            attempt()
            pytest.fail(f"{name} was let through")


def test_the_file_system_describes_itself(server: Server, folder: Path) -> None:
    """statfs: full, 255-byte names, read-only; the version as an extended attribute; no special bits."""
    found = os.statvfs(server.target)
    assert (found.f_bavail, found.f_namemax) == (0, 255)
    for flag in (os.ST_RDONLY, os.ST_NOSUID, os.ST_NODEV):
        assert found.f_flag & flag
    assert os.listxattr(server.target / "medium") == ["user.orchestra.version"]
    assert os.getxattr(server.target / "medium", "user.orchestra.version").startswith(b"aae61-")
    with pytest.raises(OSError, match=r"No data available"):
        os.getxattr(server.target / "medium", "user.other")
    status = os.stat(server.target / "medium")
    assert (status.st_size, status.st_mtime_ns) == (700_001, os.stat(folder / "medium").st_mtime_ns)
    assert status.st_nlink == 1


def test_errors_are_those_of_a_local_folder(server: Server) -> None:
    """ENOENT, ENOTDIR, EISDIR, ENAMETOOLONG."""
    for path, code in {
        "nope": errno.ENOENT,
        "nope/deeper": errno.ENOENT,
        "medium/inside": errno.ENOTDIR,
        "x" * 256: errno.ENAMETOOLONG,
    }.items():
        with pytest.raises(OSError) as caught:
            os.stat(server.target / path)
        assert caught.value.errno == code, path
    with pytest.raises(IsADirectoryError):
        (server.target / "class a").read_bytes()


@pytest.mark.slow
def test_20_000_names_list_completely_and_in_order(make: MakeServer, tmp_path: Path) -> None:
    """scandir sees each once and primes its attributes; an offset taken in the middle leads back there."""
    folder = tmp_path / "wide"
    folder.mkdir()
    names = [f"{index:05}" for index in range(20_000)]
    for name in names:
        os.close(os.open(folder / name, os.O_CREAT))
    server = make(folder)
    with os.scandir(server.target) as entries:
        found = [entry.name for entry in entries if entry.is_file()]
    assert found == names
    assert server.counters()["READDIRPLUS"] <= 101  # 32 KiB at a time is how glibc asks
    assert _seek_in_directory(server.target) == _seek_in_directory(folder) == [True, True]
    assert sum(os.stat(server.target / name).st_size for name in names[::500]) == 0
    assert "LOOKUP" not in server.counters()  # the listing brought the attributes


_SEEKING = r"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.c_void_p
libc.readdir.argtypes = libc.telldir.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
libc.telldir.restype = ctypes.c_long
def name(): return ctypes.string_at(libc.readdir(d) + 19)
d = libc.opendir(os.fsencode(sys.argv[1]))
for _ in range(9_000): name()
here = libc.telldir(d)
expected = name()
for _ in range(5_000): name()
libc.seekdir(d, here)
print(name() == expected)
libc.seekdir(d, 0)
print(name() != expected)
"""


def _seek_in_directory(folder: Path) -> list[bool]:
    return [line == "True" for line in _run("python3", "-c", _SEEKING, folder).split()]


def test_offsets_beyond_32_bits(make: MakeServer, tmp_path: Path) -> None:
    """A 5 GiB file, through the process and through passthrough."""
    folder = tmp_path / "far"
    folder.mkdir()
    marks = {0: b"first", 2**31 - 3: b"across 31", 2**32 - 4: b"across 32 bits", 5 * GIB - 4: b"last"}
    with open(folder / "far", "wb") as file:  # noqa: PTH123 - a sparse file
        for offset, mark in marks.items():
            os.pwrite(file.fileno(), mark, offset)
    for name, threshold in (("process", 6 * GIB), ("passthrough", MIB)):
        server = make(folder, name, passthrough_size_bytes=threshold)
        assert os.stat(server.target / "far").st_size == 5 * GIB
        with open(server.target / "far", "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered
            for offset, mark in marks.items():
                assert os.pread(file.fileno(), len(mark), offset) == mark
        assert (read_count(server) > 0) == (name == "process")


def test_owner_and_permissions_are_the_options(make: MakeServer, folder: Path) -> None:
    """--uid, --gid and --umask show, and the kernel enforces them for other users."""
    server = make(folder, uid=1234, gid=4321, umask=0o077, allow_other=True)
    status = os.stat(server.target / "medium")
    assert (status.st_uid, status.st_gid, oct(status.st_mode)) == (1234, 4321, oct(0o100400))
    for parent in server.target.parents:  # pytest's own folders, one more of them under xdist, are their owner's alone
        if parent.stat().st_mode & 0o700 == parent.stat().st_mode & 0o777:
            parent.chmod(0o755)
    read = ["cat", str(server.target / "medium")]
    other = subprocess.run(["setpriv", "--reuid", "4000", "--clear-groups", *read], capture_output=True, check=False)
    assert b"Permission denied" in other.stderr
    owner = subprocess.run(["setpriv", "--reuid", "1234", "--clear-groups", *read], capture_output=True, check=False)
    assert owner.stdout == (folder / "medium").read_bytes()


def test_a_part_of_the_namespace_can_be_the_root(make: MakeServer, folder: Path) -> None:
    """The root option names a path below which everything is shown."""
    server = make(folder, root="/class a")
    assert sorted(os.listdir(server.target)) == sorted(os.listdir(folder / "class a"))
    assert (server.target / "b" / "large").read_bytes() == (folder / "class a" / "b" / "large").read_bytes()


def test_a_huge_folder_is_streamed_and_makes_no_inodes(make: MakeServer, tmp_path: Path) -> None:
    """Names only, some 200 an answer, with the numbers that stat gives; a second listing sends nothing at all."""
    count = PRIMED_ENTRIES_MAX + 500
    store = tmp_path / "store"
    store.mkdir()
    for index in range(count):
        os.mknod(store / f"{index:06}")
    server = make(store)
    before = server.counters()
    with os.scandir(server.target) as entries:
        found = {entry.name: entry.inode() for entry in entries}
    counters = server.counters()
    assert sorted(found) == [f"{index:06}" for index in range(count)]
    assert count // NAMES_PER_REPLY_MAX <= counters["READDIRPLUS"] <= count // 100
    assert counters["inodes"] == before["inodes"]
    for name in ("000000", "010000", f"{count - 1:06}"):
        assert os.stat(server.target / name).st_ino == found[name]
    assert len(os.listdir(server.target)) == count
    assert server.counters()["READDIRPLUS"] == counters["READDIRPLUS"]


@pytest.mark.parametrize("mode", ["auto", "pagecache"])
def test_a_program_can_have_bytes_read_ahead_and_let_go_of(make: MakeServer, tmp_path: Path, mode: str) -> None:
    """readahead(2) and WILLNEED have bytes read before anybody wants them, DONTNEED makes the kernel forget them."""
    store, data = _store_of(tmp_path, 100_000)
    server = make(store, mode=mode)
    fd = os.open(server.target / "file", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    ahead: list[Callable[[], object]] = [
        lambda: libc.readahead(fd, ctypes.c_int64(0), ctypes.c_size_t(len(data))),
        lambda: os.posix_fadvise(fd, 0, len(data), os.POSIX_FADV_WILLNEED),
    ]
    for ask in ahead:
        before = read_count(server)
        ask()
        while read_count(server) == before:  # the kernel asks on its own
            pass
        assert os.pread(fd, len(data) + 1, 0) == data
        asked = read_count(server)
        assert os.pread(fd, len(data) + 1, 0) == data
        assert read_count(server) == asked
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, len(data) + 1, 0) == data
        assert read_count(server) > asked
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("mode", ["auto", "passthrough", "pagecache"])
@pytest.mark.parametrize("size", [100_000, 3 * MIB + 5])
def test_o_direct_reads_what_is_there(make: MakeServer, tmp_path: Path, mode: str, size: int) -> None:
    """Whole pages anywhere, and less at the end; past it nothing."""
    store, data = _store_of(tmp_path, size)
    server = make(store, mode=mode)
    fd = os.open(server.target / "file", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 64 * 1024)
    for place in (0, 8192, size // 4096 * 4096, size // 4096 * 4096 + 4096):
        count = os.preadv(fd, [buffer], place)
        assert buffer[:count] == data[place : place + len(buffer)]
    os.close(fd)


@pytest.mark.parametrize("priority", [["-c", "3"], ["-c", "2", "-n", "7"], ["-c", "1", "-n", "0"]])
def test_a_priority_of_io_changes_no_byte(make: MakeServer, tmp_path: Path, priority: list[str]) -> None:
    """ionice is for the disks below; a mount takes readers of all of them."""
    store, data = _store_of(tmp_path, 300_000)
    server = make(store)
    done = subprocess.run(["ionice", *priority, "cat", str(server.target / "file")], capture_output=True, check=True)
    assert done.stdout == data


def _store_of(tmp_path: Path, size: int) -> tuple[Path, bytes]:
    store, data = tmp_path / "store", Random(size).randbytes(size)
    store.mkdir()
    (store / "file").write_bytes(data)
    return store, data
