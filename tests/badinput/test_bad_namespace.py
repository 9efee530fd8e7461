"""The rows of reliability.md's list of bad inputs that are about paths, keys and names: 33, 35 to 43, 46, 47, 49.

Every bad path is put to the client, to fsspec and to the command line, which all say the same in one line. Odd names
are no bad input: they are listed and read wherever they can be a path.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestra.cli.main import main
from orchestra.client.node import NodeClient
from orchestra.config import load_config
from orchestra.errors import NotFoundError, OrchestraError, ReadOnlyError
from orchestra.filesystem import OrchestraFileSystem
from tests.support.node import DaemonNode, daemon_node, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore


@dataclass(frozen=True)
class Place:
    """A node with a folder at /data and an empty one at /teams/vision, and a file that no mount covers."""

    node: DaemonNode
    folder: Path
    secret: Path

    @property
    def config(self) -> str:
        return str(self.node.config_path)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with ram_folder() as root:
        folder, other = root / "store", root / "other"
        folder.mkdir()
        other.mkdir()
        secret = root / "secret.txt"
        secret.write_text("the crown jewels")
        (folder / "a").write_bytes(b"bytes of a")
        (folder / "d").mkdir()
        (folder / "d" / "x").write_bytes(b"x")
        for name in ("odd", "printed"):
            (folder / name).mkdir()
        (folder / "out").symlink_to(secret)
        (folder / "out-folder").symlink_to(root)
        (folder / "gone").symlink_to("nowhere")
        (folder / "loop").symlink_to("loop")
        mounts = [{"path": "/data", "uri": f"file://{folder}"}, {"path": "/teams/vision", "uri": f"file://{other}"}]
        with daemon_node(root, mounts=mounts) as node:
            yield Place(node, folder, secret)


@dataclass(frozen=True)
class BadPath:
    """One bad path: what it is refused with, and the words of the error."""

    row: str
    path: str
    kind: type[Exception]
    words: str


USAGE, MISSING, LONG = ValueError, FileNotFoundError, OSError
ROWS = [
    BadPath("33-up", "/data/../secret.txt", USAGE, "'..' is not allowed"),
    BadPath("33-up-deep", "/data/d/../../../etc/passwd", USAGE, "'..' is not allowed"),
    BadPath("33-up-last", "/data/..", USAGE, "'..' is not allowed"),
    BadPath("33-dot", "/data/./a", USAGE, "'.' is not allowed"),
    BadPath("33-double-slash", "/data//etc/passwd", MISSING, "/etc/passwd"),
    BadPath("33-encoded", "/data/%2e%2e/secret.txt", MISSING, "%2e%2e/secret.txt"),
    BadPath("33-backslash", "/data/..\\secret.txt", MISSING, "secret.txt"),
    BadPath("37-nul", "/data/a\0.txt", USAGE, "NUL byte"),
    BadPath("38-name", "/data/" + "n" * 256, LONG, "has 256 bytes, the limit is 255"),
    BadPath("38-name-in-bytes", "/data/" + "ü" * 128, LONG, "has 256 bytes, the limit is 255"),
    BadPath("38-path", "/data" + "/n" * 2048, LONG, "has 4101 bytes, the limit is 4095"),
    BadPath("40-half-a-pair", "/data/\ud800", USAGE, "surrogate"),
    BadPath("42-case", "/data/A", MISSING, "/data/A"),
    BadPath("43-unmounted", "/elsewhere/x", MISSING, "no mount covers /elsewhere/x (mounts: /data, /teams/vision)"),
    BadPath("43-beside", "/teams/audio", MISSING, "no mount covers /teams/audio"),
    BadPath("43-prefix", "/data2/a", MISSING, "no mount covers /data2/a"),
    BadPath("45-below-a-file", "/data/a/x", MISSING, "/data/a/x"),
    # Refused as such when it is looked up, and simply not there for who knows the listing, which leaves it out.
    BadPath("47-link-out", "/data/out", OSError, "out"),
    BadPath("47-folder-link-out", "/data/out-folder/secret.txt", OSError, "out"),
    BadPath("47-link-to-nothing", "/data/gone", MISSING, "/data/gone"),
    BadPath("47-link-to-itself", "/data/loop", MISSING, "/data/loop"),
    BadPath("51-directory", "/data/d", IsADirectoryError, "/data/d"),
    BadPath("51-root", "/", IsADirectoryError, "/"),
]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.row)


@each_row
def test_the_client_refuses_it(place: Place, row: BadPath) -> None:
    """An error of ours, which is also the one of Python's own file functions, in one line with the path."""
    client = NodeClient(load_config(place.config))
    for call in (client.open, client.read_file):
        with pytest.raises(row.kind) as caught:
            call(row.path)
        assert isinstance(caught.value, OrchestraError)
        assert row.words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "jewels" not in str(caught.value)
    client.close()


@each_row
def test_fsspec_refuses_it(place: Place, row: BadPath) -> None:
    """The same through `cat_file` and `open`."""
    fs = OrchestraFileSystem(config=place.config, skip_instance_cache=True)
    for call in (fs.cat_file, fs.open):
        with pytest.raises(row.kind) as caught:
            call(row.path)
        assert row.words in str(caught.value)


@each_row
def test_the_command_line_refuses_it(place: Place, row: BadPath, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Exit status 1, nothing on standard output, one line on standard error without a terminal's control codes."""
    assert main(["--config", place.config, "cat", row.path]) == 1
    told = capsysbinary.readouterr()
    assert told.out == b""
    assert told.err.startswith(b"orchestra: ")
    assert told.err.count(b"\n") == 1
    if row.words.isascii():
        assert row.words.encode() in told.err.replace(b"\\\\", b"\\")


# -- row 39 to 42: odd names are names -----------------------------------------------------------------------------

ODD = [
    "new\nline",
    "tab\tand\x1b[31mred",
    "\u202eright-to-left",
    "🙂",
    "\ufeffmark",
    "trailing ",
    "trailing.",
    " leading",
    "-dash",
    "~",
    "$(touch x)",
    "caf\u00e9",
    "cafe\u0301",
    "UPPER",
    "upper",
    "...",
    "%41",
    "\udcff\udcfe",
    "x" * 255,
]


def test_odd_names_round_trip(place: Place) -> None:
    """Rows 39 to 42: each is one file of its own, found under exactly its name and no other spelling."""
    odd = place.folder / "odd"
    for number, name in enumerate(ODD):
        (odd / name).write_bytes(b"%d" % number)
    client = NodeClient(load_config(place.config))
    assert sorted(entry.name for entry in client.list("/data/odd")) == sorted(ODD)
    fs = OrchestraFileSystem(config=place.config, skip_instance_cache=True)
    for number, name in enumerate(ODD):
        assert client.read_file(f"/data/odd/{name}") == b"%d" % number
        assert client.stat(f"/data/odd/{name}", refresh=True).name == name
        assert fs.cat_file(f"/data/odd/{name}") == b"%d" % number
    client.close()


def test_odd_names_are_printed_escaped(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 39: a listing cannot move the cursor, colour the screen or pretend to be two lines."""
    odd = place.folder / "printed"
    for name in ("new\nline", "red\x1b[31m", "bell\x07"):
        (odd / name).touch()
    assert main(["--config", place.config, "ls", "/data/printed"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert not {"\x1b", "\x07"} & set(out)


# -- rows 35 and 36: keys that only an object store has ------------------------------------------------------------


def test_keys_that_no_folder_can_hold(tmp_path: Path) -> None:
    """Row 35: keys with dots, doubled slashes and empty names are hidden from listings, counted, and cannot lead out;
    those that can be a path are read by it."""
    store = VersionedStore()
    keys = ["ok", "../up", "/abs", "a//b", "./dot", "a/.", "a/..", "folder/", "a/ok"]
    for key in keys:
        store.put(key, key.encode())
    with ram_folder() as root, thread_node(root, store) as node:
        client = node.client()
        assert [entry.name for entry in client.list("/data")] == ["a", "folder", "ok"]
        assert [entry.name for entry in client.list("/data/a")] == ["ok"]
        assert client.stat("/data/folder").is_directory
        assert list(client.list("/data/folder")) == []
        assert client.read_file("/data/a//b") == b"a//b"
        assert client.read_file("/data//abs") == b"/abs"
        for path in ("/data/../up", "/data/./dot", "/data/a/.", "/data/a/.."):
            with pytest.raises(ValueError, match="is not allowed"):
                client.read_file(path)
        record = node.run(node.node.engine.list_directory("/data"))
        assert record is not None
        assert record.hidden_count == 3, "../, ./ and / are no names"


def test_a_key_that_is_file_and_folder(tmp_path: Path) -> None:
    """Row 36: the listing shows the folder; what lies in it is read; the object is read by who names it first."""
    store = VersionedStore()
    store.put("foo", b"object")
    store.put("foo/bar", b"below")
    with ram_folder() as root, thread_node(root, store) as node:
        client = node.client()
        assert client.read_file("/data/foo") == b"object"
        assert [entry.is_directory for entry in client.list("/data", refresh=True)] == [True]
        assert [entry.name for entry in client.list("/data/foo")] == ["bar"]
        assert client.read_file("/data/foo/bar") == b"below"


# -- rows 46 and 49 ------------------------------------------------------------------------------------------------


def test_writing_is_refused(place: Place) -> None:
    """Row 46: every way to write says that the namespace is read-only, and writes nothing."""
    fs = OrchestraFileSystem(config=place.config, skip_instance_cache=True)
    calls: list[tuple[Any, ...]] = [
        (fs.pipe_file, "/data/new", b"x"),
        (fs.touch, "/data/new"),
        (fs.rm, "/data/a"),
        (fs.mkdir, "/data/new"),
        (fs.mv, "/data/a", "/data/b"),
        (fs.open, "/data/new", "wb"),
    ]
    for call, *arguments in calls:
        with pytest.raises(ReadOnlyError, match="cannot write"):
            call(*arguments)
    assert not (place.folder / "new").exists()
    assert (place.folder / "a").read_bytes() == b"bytes of a"


def test_positions_that_cannot_be(place: Place) -> None:
    """Row 49: seeking before the start is an error, reading behind the end gives nothing, and nothing huge is made."""
    client = NodeClient(load_config(place.config))
    handle = client.open("/data/a")
    with pytest.raises(ValueError, match="offset -1"):
        handle.readinto(-1, bytearray(1))
    with pytest.raises(ValueError, match="-5 bytes"):
        handle.read(0, -5)
    assert handle.read(2**63 - 1, 10) == b""
    assert handle.read(0, 2**62) == b"bytes of a"
    assert handle.read(3, 0) == b""
    assert client.read_file("/data/a", 5, 3) == b""
    handle.close()
    client.close()
    file = OrchestraFileSystem(config=place.config, skip_instance_cache=True).open("/data/a")
    with pytest.raises(ValueError, match="negative"):
        file.seek(-1)
    file.seek(10**15)
    assert file.read() == b""
    file.seek(-3, io.SEEK_END)
    assert file.read() == b"f a"[-3:]
    file.close()


def test_nothing_was_ever_opened_outside(place: Place) -> None:
    """Row 33: after all of the above, the file beside the mount is in no cache and was never read through it."""
    for path in (place.node.cache_dir / "extents").rglob("*"):
        if path.is_file():
            assert b"jewels" not in path.read_bytes()
    with pytest.raises(NotFoundError):
        NodeClient(load_config(place.config)).stat(str(place.secret))
