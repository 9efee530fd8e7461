"""The cache directory: made, accepted or refused, each refusal one sentence; names that stay inside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import (
    MARKER,
    SOCKET_PATH_LIMIT_BYTES,
    CacheLayout,
    empty_tmp,
    is_extent_name,
    prepare,
    read_geometry,
)
from orchestra.errors import CacheDirectoryError
from orchestra.values import ObjectId

GEOMETRY = Geometry(4096, 16384)


def test_a_new_directory_becomes_a_cache(tmp_path: Path) -> None:
    """A missing directory is made for its owner alone, with its parents, a marker, and every folder."""
    root = tmp_path / "a" / "b"
    layout, geometry = prepare(root, GEOMETRY)
    assert geometry == GEOMETRY
    assert root.stat().st_mode & 0o777 == 0o700
    assert json.loads((root / MARKER).read_text()) == {
        "format": 1,
        "block_size_bytes": 4096,
        "extent_size_bytes": 16384,
    }
    for folder in ("extents", "listings", "attrs"):
        assert len(list((root / folder).iterdir())) == 256
    assert layout.tmp.is_dir()


def test_a_cache_keeps_the_geometry_that_it_was_made_with(tmp_path: Path) -> None:
    """Another block size in the configuration does not cut what is cached anew."""
    prepare(tmp_path / "c", GEOMETRY)
    assert prepare(tmp_path / "c", Geometry(8192, 8192))[1] == GEOMETRY
    assert read_geometry(tmp_path / "c") == GEOMETRY
    assert read_geometry(tmp_path / "nothing") is None


def test_a_crash_while_the_marker_was_written_does_not_lock_the_directory(tmp_path: Path) -> None:
    """A marker that never got its name is no foreign content."""
    (tmp_path / "orchestra-cache.tmp").write_text('{"for')
    assert prepare(tmp_path, GEOMETRY)[1] == GEOMETRY


def test_every_key_gets_a_name_inside(tmp_path: Path) -> None:
    """Whatever a store calls an object, its files lie in extents/, under a hash."""
    layout = CacheLayout(tmp_path)
    for key in ("../../etc/passwd", "/abs", "a//b", "..", "x" * 5000, "\n", "\udcff"):
        digest = ObjectId("s3://b/", key, "v").digest()
        for path in (layout.small_file(digest), layout.extent_file(digest, 3), layout.map_file(digest, 3)):
            assert os.path.normpath(path).startswith(f"{tmp_path}/extents/{digest[:2]}/{digest}")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("0" * 32, True),
        ("0123456789abcdef" * 2 + ".0", True),
        ("0123456789abcdef" * 2 + ".17", True),
        ("0" * 31, False),
        ("0" * 33, False),
        ("0" * 32 + ".", False),
        ("0" * 32 + ".01", False),
        ("0" * 32 + ".1\n", False),
        ("0" * 32 + ".\N{ARABIC-INDIC DIGIT ONE}", False),
        ("G" * 32, False),
        ("../" + "0" * 29, False),
        ("", False),
    ],
)
def test_only_names_of_ours_are_names(name: str, is_one: bool) -> None:
    """Digest, or digest and extent number; whatever else lies about is not ours to count or remove."""
    assert is_extent_name(name) is is_one


def test_the_socket_of_a_long_path_lies_elsewhere(tmp_path: Path) -> None:
    """A unix socket's path is limited to 107 bytes; a cache with a longer one has its socket in the temporary folder,
    by a name of its own."""
    assert CacheLayout(tmp_path).socket == tmp_path / "daemon.sock"
    deep, other = (Path("/" + "d" * 120 + name) for name in "ab")
    assert len(os.fsencode(CacheLayout(deep).socket)) <= SOCKET_PATH_LIMIT_BYTES
    assert CacheLayout(deep).socket != CacheLayout(other).socket
    assert CacheLayout(deep).socket == CacheLayout(deep).socket


def test_tmp_is_emptied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What an earlier daemon left unfinished goes, of whatever kind; a folder, which no daemon makes there, stays."""
    layout, _ = prepare(tmp_path / "c", GEOMETRY)
    (layout.tmp / "1-0").write_bytes(b"half")
    (layout.tmp / "link").symlink_to("/etc/passwd")
    os.mkfifo(layout.tmp / "fifo")
    (layout.tmp / "folder").mkdir()
    (layout.tmp / "folder" / "theirs").touch()
    assert empty_tmp(layout) == 3
    assert [path.name for path in layout.tmp.iterdir()] == ["folder"]
    assert (layout.tmp / "folder" / "theirs").exists()
    assert Path("/etc/passwd").exists()
    assert "is not ours and stays" in caplog.text


def test_a_damaged_marker_says_what_to_do(tmp_path: Path) -> None:
    """A marker that cannot be read names itself and the way out."""
    for text in ("", "{", "[]", '{"format": 1}', '{"format": 1, "block_size_bytes": 5, "extent_size_bytes": 5}'):
        (tmp_path / MARKER).write_text(text)
        with pytest.raises(CacheDirectoryError, match=r"orchestra-cache.json is damaged; empty the directory"):
            prepare(tmp_path, GEOMETRY)
