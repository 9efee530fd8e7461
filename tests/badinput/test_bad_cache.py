"""The rows of reliability.md's list of bad inputs that are about the cache: its directory, its lock, its files.

A directory that cannot be a cache is refused in one line, by `prepare` and by the command line, with nothing changed
in it. Damage inside a cache costs a fetch: no reader sees wrong bytes or an error, and the daemon goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import MARKER, prepare
from orchestra.cli.main import main
from orchestra.client.node import NodeClient
from orchestra.daemon.lock import OwnerLock
from orchestra.errors import CacheDirectoryError
from orchestra.values import ObjectId
from tests.support.cache import BLOCK, EXTENT, data_of
from tests.support.node import ThreadNode, thread_node, write_config
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


# -- rows 15 to 18: directories that cannot be a cache -------------------------------------------------------------


@dataclass(frozen=True)
class BadDirectory:
    """What is done to a folder, which path below it is the cache, and the words of the refusal, in order."""

    row: str
    make: Callable[[Path], object]
    words: tuple[str, ...]
    at: str = "cache"


def folder(path: Path, mode: int = 0o700) -> Path:
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


def foreign(path: Path) -> None:
    (folder(path) / "thesis.tex").write_text("work of years")


def marked(text: str) -> Callable[[Path], object]:
    return lambda root: (folder(root / "cache") / MARKER).write_text(text)


def given_away(root: Path) -> None:
    os.chown(folder(root / "cache"), 65534, 65534)


def linked_by_another(root: Path) -> None:
    shared = folder(root / "shared", 0o777)
    folder(root / "real")
    (shared / "cache").symlink_to(root / "real")
    os.lchown(shared / "cache", 65534, 65534)


GOOD_MARKER = '{"format": 1, "block_size_bytes": 4096, "extent_size_bytes": 16384}'
ROWS = [
    BadDirectory("15-file", lambda root: (root / "cache").write_text("x"), ("cache.dir {dir} is a file, not a dir",)),
    BadDirectory("15-parent", lambda root: (root / "f").touch(), ("cache.dir {dir}", "parent is a file"), "f/cache"),
    BadDirectory("15-unwritable", lambda root: None, ("cache.dir {dir} cannot be made: ",), "../../../proc/cache"),
    BadDirectory(
        "16-all", lambda root: folder(root / "cache", 0o777), ("refusing cache directory {dir}: writable by",)
    ),
    BadDirectory("16-group", lambda root: folder(root / "cache", 0o770), ("writable by others; run: chmod 700 {dir}",)),
    BadDirectory(
        "18-foreign", lambda root: foreign(root / "cache"), ("{dir} is not empty and holds no orchestra-cach",)
    ),
    BadDirectory("18-root", lambda root: None, ("refusing", "/: ") if os.geteuid() else ("/ is not empty",), "/"),
    BadDirectory("18-etc", lambda root: None, ("/etc",), "/etc"),
    BadDirectory("25-later-format", marked('{"format": 9}'), ("{dir} has format 9, this orchestra reads 1: use anot",)),
    BadDirectory("88-marker-cut", marked('{"format": 1, "bl'), ("is damaged; empty the directory {dir} to start af",)),
    BadDirectory("88-marker-empty", marked(""), ("orchestra-cache.json is damaged",)),
    BadDirectory("88-marker-list", marked("[1]"), ("orchestra-cache.json is damaged",)),
    BadDirectory(
        "88-marker-folder", lambda root: folder(root / "cache" / MARKER), ("orchestra-cache.json is damaged",)
    ),
]
ROWS_AS_ROOT = [
    BadDirectory("16-owner", given_away, ("refusing cache directory {dir}: it belongs to uid 65534, not 0",)),
    BadDirectory("17-link", linked_by_another, ("refusing cache directory {dir}: a link in a folder",), "shared/cache"),
]
ALL_ROWS = [*ROWS, *(pytest.param(row, marks=needs_root) for row in ROWS_AS_ROOT)]


def content(root: Path) -> list[str]:
    return sorted(str(path) for path in root.rglob("*"))


def check_words(words: tuple[str, ...], text: str, directory: Path) -> None:
    at = 0
    for word in words:
        expected = word.replace("{dir}", str(directory))
        assert expected in text[at:], f"{expected!r} is not in {text!r}"
        at = text.index(expected, at) + len(expected)


@pytest.mark.parametrize("row", ALL_ROWS, ids=lambda row: row.row)
def test_a_bad_directory_is_refused_and_left_alone(tmp_path: Path, row: BadDirectory) -> None:
    """One line that names the directory and why; nothing in it was made, changed or removed."""
    row.make(tmp_path)
    directory = Path(os.path.normpath(tmp_path / row.at))
    before = content(tmp_path)
    with pytest.raises(CacheDirectoryError) as caught:
        prepare(directory, Geometry(4096, 16384))
    check_words(row.words, str(caught.value), directory)
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == before


def test_a_client_says_that_the_directory_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 15 where the command line looks before any daemon does: one line, and no "this is a bug"."""
    (tmp_path / "cache").write_text("x")
    config = tmp_path / "orchestra.toml"
    write_config(config, mounts=[], cache={"dir": tmp_path / "cache"})
    assert main(["--config", str(config), "ls"]) == 1
    assert capsys.readouterr().err == f"orchestra: cache.dir {tmp_path / 'cache'} is a file, not a directory\n"


@pytest.mark.parametrize("row", ALL_ROWS, ids=lambda row: row.row)
def test_the_daemon_refuses_it_with_status_1(
    tmp_path: Path, row: BadDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """`daemon run` says the same on standard error, and only that, and ends with status 1."""
    row.make(tmp_path)
    directory = Path(os.path.normpath(tmp_path / row.at))
    config = tmp_path / "orchestra.toml"
    write_config(config, mounts=[], cache={"dir": directory})
    assert main(["--config", str(config), "daemon", "run"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    errors = [line for line in told.err.splitlines() if "warning" not in line]
    assert len(errors) == 1
    check_words(row.words, errors[0], directory)


def test_a_relative_directory_is_refused() -> None:
    """Row 15: where it would lie depends on who starts the daemon."""
    with pytest.raises(CacheDirectoryError, match=r"cache.dir some/cache is not absolute"):
        prepare(Path("some/cache"), Geometry(4096, 16384))


def test_a_link_of_ours_is_followed(tmp_path: Path) -> None:
    """Row 17: a link that only we can change is a way to say where the cache lies."""
    folder(tmp_path / "real")
    (tmp_path / "cache").symlink_to(tmp_path / "real")
    prepare(tmp_path / "cache", Geometry(4096, 16384))
    assert (tmp_path / "real" / MARKER).exists()


def test_a_cache_inside_our_own_mount_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 19: a cache that lies in what it caches would wait for itself."""
    device = tmp_path.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt/orchestra ro - fuse.orchestra orchestra ro\n"
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *args: line if "mountinfo" in str(path) else read_text(path, *args)
    )
    with pytest.raises(CacheDirectoryError, match=r"inside orchestra's own mount /mnt/orchestra: use a local disk"):
        prepare(tmp_path / "cache", Geometry(4096, 16384))


# -- rows 25 and 26: who owns it -----------------------------------------------------------------------------------


def test_a_second_daemon_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 25: it is told the owner's pid and since when, and the owner is not disturbed."""
    store = VersionedStore()
    store.put("a", b"x")
    with thread_node(tmp_path, store) as node:
        config = tmp_path / "second.toml"
        write_config(config, mounts=[], cache={"dir": node.config.cache.dir})
        assert main(["--config", str(config), "daemon", "run"]) == 1
        told = capsys.readouterr().err
        assert f"cache directory {node.config.cache.dir} is in use by the daemon with pid {os.getpid()}, star" in told
        assert node.client().read_file("/data/a") == b"x"


@pytest.mark.parametrize("text", ["", "garbage", '{"pid": 1, "started": "2020"}', "[]", '{"pid": 4194304}'])
def test_a_lock_file_that_a_dead_daemon_left_keeps_nobody_out(tmp_path: Path, text: str) -> None:
    """Row 26: the kernel's lock counts and not what the file says, be the pid dead, init's or another program's."""
    path = tmp_path / "daemon.lock"
    path.write_text(text)
    lock = OwnerLock(path, started="now")
    assert json.loads(path.read_text()) == {"pid": os.getpid(), "started": "now"}
    with pytest.raises(CacheDirectoryError, match=f"in use by the daemon with pid {os.getpid()}, started now"):
        OwnerLock(path, started="later")
    path.write_text(text)
    with pytest.raises(CacheDirectoryError, match="in use by"):
        OwnerLock(path, started="later")
    lock.release()
    OwnerLock(path, started="later").release()


# -- row 88: files of the cache ------------------------------------------------------------------------------------

SMALL = data_of("small", 1000)
LARGE = data_of("large", EXTENT + BLOCK)


@pytest.fixture
def store() -> VersionedStore:
    made = VersionedStore()
    made.put("small", SMALL)
    made.put("large", LARGE)
    return made


class Boots:
    """Lets a test reboot the machine: every boot id that the node takes is this one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 1
        for place in ("orchestra.daemon.assembly.boot_id", "orchestra.client.node.boot_id"):
            monkeypatch.setattr(place, lambda: bytes([self._now]) * 16)

    def reboot(self) -> None:
        self._now += 1


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> Boots:
    return Boots(monkeypatch)


def read_all(client: NodeClient) -> None:
    """Both objects are right, whole and in pieces."""
    assert client.read_file("/data/small") == SMALL
    assert client.read_file("/data/large") == LARGE
    assert client.read_file("/data/small", 10, 20) == SMALL[10:20]
    assert client.read_file("/data/large", EXTENT - 5, EXTENT + 5) == LARGE[EXTENT - 5 : EXTENT + 5]


def files_of(node: ThreadNode, store: VersionedStore) -> dict[str, Path]:
    layout = node.node.layout
    digests = {key: ObjectId(store.store_id, key, store.objects[key].info.version).digest() for key in store.objects}
    return {
        "small": Path(layout.small_file(digests["small"])),
        "extent": Path(layout.extent_file(digests["large"], 0)),
        "map": Path(layout.map_file(digests["large"], 0)),
    }


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


def flipped(at: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[at % len(raw)] ^= 0x40
        with path.open("r+b") as file:  # in place: the inode stays
            file.write(raw)

    return spoil


def resized(change: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, max(0, path.stat().st_size + change))


def resealed(value: bytes | None) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with contextlib.suppress(OSError):  # a map has no seal: then its bytes are spoiled
            os.getxattr(path, "user.orchestra.seal")
            os.removexattr(path, "user.orchestra.seal")
            if value is not None:
                os.setxattr(path, "user.orchestra.seal", value)
            return
        flipped(4)(path)

    return spoil


SPOILED: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "truncated": resized(-1),
    "zero-length": resized(-(1 << 40)),
    "longer": resized(1),
    "flipped in its first byte": flipped(0),
    "flipped in its version": flipped(4),
    "flipped in the middle": flipped(40),
    "flipped in its last byte": flipped(-1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "a folder": replaced_by(Path.mkdir),
    "a folder with something in it": replaced_by(lambda path: (folder(path) / "theirs").touch()),
    "a FIFO": replaced_by(os.mkfifo),
    "a link to nothing": replaced_by(lambda path: path.symlink_to("/nonexistent")),
    "a link to a file": replaced_by(lambda path: path.symlink_to("/etc/passwd")),
    "a copy": replaced_by(lambda path: path.write_bytes(os.urandom(1000))),
    "without a seal": resealed(None),
    "with another seal": resealed(b"x" * 56),
}


@pytest.mark.parametrize("what", ["small", "extent", "map"])
@pytest.mark.parametrize("damage", SPOILED)
def test_damage_costs_a_fetch_and_no_more(
    tmp_path: Path, store: VersionedStore, boots: Boots, what: str, damage: str
) -> None:
    """Row 88: whatever happens to a file of the cache while the machine is off, readers see the right bytes; what was
    damaged is fetched again, once, and then everything is served from disk."""
    with thread_node(tmp_path, store, freshness_s=float("inf")) as node:
        read_all(node.client())
        path = files_of(node, store)[what]
    SPOILED[damage](path)
    boots.reboot()
    for _ in range(2):
        with thread_node(tmp_path, store, freshness_s=float("inf")) as node:
            read_all(node.client())
            read_all(node.client())
    store.reads.clear()
    with thread_node(tmp_path, store, freshness_s=float("inf")) as node:
        read_all(node.client())
    assert store.reads == []


@pytest.mark.parametrize("what", ["small", "extent", "map"])
@pytest.mark.parametrize(
    "damage", ["gone", "truncated", "longer", "flipped in the middle", "garbage", "without a seal"]
)
def test_damage_under_a_running_node_with_verify_always(
    tmp_path: Path, store: VersionedStore, what: str, damage: str
) -> None:
    """Row 88 and F-16: with verify = "always" every flip is noticed on the read itself, also in this boot."""
    with thread_node(tmp_path, store, freshness_s=float("inf"), cache={"verify": "always"}) as node:
        read_all(node.client())
        SPOILED[damage](files_of(node, store)[what])
        read_all(node.client())
        read_all(node.client())
        store.reads.clear()
        read_all(node.client())
        assert store.reads == []


def test_files_under_other_names_are_not_believed(tmp_path: Path, store: VersionedStore, boots: Boots) -> None:
    """F-17: two small objects swapped, an old version under the new name, extents of one object under one another's
    numbers: each is noticed by what its seal or map says it is."""
    with thread_node(tmp_path, store, freshness_s=float("inf")) as node:
        store.put("small2", data_of("other", 1000))
        big = data_of("big", 2 * EXTENT)
        store.put("big", big)
        client = node.client()
        read_all(client)
        for name in ("small2", "big"):
            client.read_file(f"/data/{name}")
        layout = node.node.layout
        digest = {key: ObjectId(store.store_id, key, store.objects[key].info.version).digest() for key in store.objects}
    pairs = [(layout.small_file(digest["small"]), layout.small_file(digest["small2"]))]
    for file_of in (layout.extent_file, layout.map_file):
        pairs.append((file_of(digest["big"], 0), file_of(digest["big"], 1)))
    for one, other in pairs:
        os.rename(one, f"{tmp_path}/swap")
        os.rename(other, one)
        os.rename(f"{tmp_path}/swap", other)
    for _ in range(2):
        with thread_node(tmp_path, store, freshness_s=float("inf")) as node:
            client = node.client()
            read_all(client)
            assert client.read_file("/data/small2") == data_of("other", 1000)
            assert client.read_file("/data/big") == big
        boots.reboot()


def test_strangers_in_the_cache_are_left_alone(tmp_path: Path, store: VersionedStore) -> None:
    """Files that no cache wrote are neither counted nor evicted, however full the cache is."""
    cache = {"size_bytes": 2 * EXTENT}
    with thread_node(tmp_path, store, cache=cache) as node:
        read_all(node.client())
        extents = node.node.layout.root / "extents"
    theirs = [extents / "00" / "notes.txt", extents / "01" / ("0" * 32 + ".ext.bak"), extents / "02" / "x.ext"]
    for path in theirs:
        path.write_text("mine")
    for index_file in tmp_path.glob("cache/index*"):
        index_file.unlink()  # counted anew
    with thread_node(tmp_path, store, cache=cache) as node:
        for _ in range(3):
            read_all(node.client())
        assert node.node.blocks.statistics().used_bytes <= 2 * EXTENT
    assert [path.read_text() for path in theirs] == ["mine"] * 3


# -- row 89: the index ---------------------------------------------------------------------------------------------


def newer_schema(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


INDEXES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(20_000)),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "with a torn log": lambda path: Path(f"{path}-wal").write_bytes(os.urandom(5000)),
    "of a newer schema": newer_schema,
    "a FIFO": replaced_by(os.mkfifo),
    "a folder": replaced_by(Path.mkdir),
    "a link to nothing": replaced_by(lambda path: path.symlink_to("/nonexistent/index")),
}


@pytest.mark.parametrize("damage", INDEXES)
def test_a_bad_index_is_rebuilt_from_the_files(tmp_path: Path, store: VersionedStore, damage: str) -> None:
    """Row 89: the daemon starts, counts its files, and serves everything that it held without asking the store."""
    with thread_node(tmp_path, store, freshness_s=float("inf")) as node:
        read_all(node.client())
        used = node.node.blocks.statistics().used_bytes
        path = node.node.layout.index
    INDEXES[damage](path)
    requests = store.requests
    with thread_node(tmp_path, store, freshness_s=float("inf")) as node:
        read_all(node.client())
        assert node.node.blocks.statistics().used_bytes == used
    assert store.requests == requests


# -- row 90: pickles -----------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


_unpickled: list[str] = []


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        _unpickled.append(str(arguments))


def test_no_pickle_in_the_cache_is_ever_loaded(tmp_path: Path, store: VersionedStore) -> None:
    """Row 90: with a pickle in the place of every file that node and client read, nothing is unpickled: the files are
    rebuilt, or refused with an error that is ours."""
    sys.addaudithook(_watch)
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    with thread_node(tmp_path, store, freshness_s=float("inf")) as node:
        client = node.client()
        client.list("/data")
        read_all(client)
        root = node.node.layout.root
    planted = [path for path in root.rglob("*") if path.is_file() and path.name != "daemon.lock"]
    assert len(planted) > 6
    _unpickled.clear()
    for path in planted:
        intact = path.read_bytes()
        path.write_bytes(bomb)
        with contextlib.suppress(CacheDirectoryError), thread_node(tmp_path, store) as node:
            client = node.client()
            client.list("/data")
            read_all(client)
        if path.name in (MARKER, "mounts.json"):
            path.write_bytes(intact)
    assert _unpickled == []
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert _unpickled, "the watch would have seen it"
