"""What a folder of this machine adds to the contract: links, odd files, files that change while they are read."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from orchestra.errors import AccessDeniedError, NotFoundError, StaleObjectError, StoreError, StoreUnavailableError
from orchestra.stores.local import LocalStore
from orchestra.testing.under_store import list_all, read_all
from orchestra.values import ByteRange, ObjectInfo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
async def store(folder: Path) -> AsyncIterator[LocalStore]:
    store = LocalStore(str(folder))
    yield store
    await store.close()


async def test_links_inside_are_followed(store: LocalStore, folder: Path) -> None:
    """A link to a file or folder below the root is that file or folder."""
    (folder / "real").mkdir()
    (folder / "real" / "file").write_bytes(b"bytes")
    (folder / "to-file").symlink_to("real/file")
    (folder / "to-folder").symlink_to(folder / "real")
    listing = await list_all(store, "")
    assert [info.key for info in listing.objects] == ["to-file"]
    assert sorted(listing.prefixes) == ["real/", "to-folder/"]
    assert await read_all(store, listing.objects[0]) == b"bytes"
    assert await read_all(store, await store.head("to-folder/file")) == b"bytes"


@pytest.mark.parametrize("target", ["../outside/file", "/etc/passwd", "inner/../../outside/file"])
async def test_links_out_are_refused(store: LocalStore, folder: Path, target: str) -> None:
    """A link that leaves the root is not listed, and neither looked up nor read."""
    (folder / "inner").mkdir()
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "file").write_bytes(b"secret")
    (folder / "file").write_bytes(b"plain!")
    info = await store.head("file")
    (folder / "file").unlink()
    (folder / "file").symlink_to(target)
    with pytest.raises(AccessDeniedError, match="leads out of the folder"):
        await store.head("file")
    with pytest.raises(AccessDeniedError, match="leads out of the folder"):
        await store.read(info, ByteRange(0, 6))
    assert (await list_all(store, "")).objects == []


async def test_a_linked_folder_out_is_refused(store: LocalStore, folder: Path) -> None:
    """A folder that leads out is neither listed nor entered, nor is anything below it."""
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "file").write_bytes(b"secret")
    (folder / "way-out").symlink_to("../outside")
    assert (await list_all(store, "")).prefixes == []
    with pytest.raises(AccessDeniedError):
        await list_all(store, "way-out/")
    with pytest.raises(AccessDeniedError):
        await store.head("way-out/file")


async def test_a_neighbour_with_the_roots_name_is_outside(store: LocalStore, folder: Path) -> None:
    """ "/root-2" is not below "/root"."""
    (folder.parent / "root-2").mkdir()
    (folder.parent / "root-2" / "file").write_bytes(b"secret")
    (folder / "link").symlink_to("../root-2/file")
    with pytest.raises(AccessDeniedError):
        await store.head("link")


async def test_link_loops_end(store: LocalStore, folder: Path) -> None:
    """A link to a folder that contains it, directly or by another, is left out: a walk over the tree ends."""
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    (folder / "a" / "self").symlink_to(".")
    (folder / "a" / "up").symlink_to("..")
    (folder / "a" / "to-b").symlink_to("../b")
    (folder / "b" / "to-a").symlink_to("../a")
    (folder / "circle").symlink_to("circle")
    seen: list[str] = []

    async def walk(prefix: str) -> None:
        for below in (await list_all(store, prefix)).prefixes:
            seen.append(below)
            assert len(seen) < 50
            await walk(below)

    await walk("")
    assert sorted(seen) == ["a/", "a/to-b/", "b/", "b/to-a/"]
    with pytest.raises(NotFoundError):
        await store.head("circle")


async def test_only_regular_files_are_objects(store: LocalStore, folder: Path) -> None:
    """A FIFO, a dead link and a folder are no objects, and opening a FIFO does not wait for its writer."""
    os.mkfifo(folder / "fifo")
    (folder / "dead").symlink_to("nowhere")
    (folder / "dir").mkdir()
    for key in ("fifo", "dead", "dir"):
        with pytest.raises(NotFoundError):
            await store.head(key)
    listing = await list_all(store, "")
    assert (listing.objects, listing.prefixes) == ([], ["dir/"])
    (folder / "was-file").write_bytes(b"12345")
    info = await store.head("was-file")
    (folder / "was-file").unlink()
    os.mkfifo(folder / "was-file")
    with pytest.raises(StaleObjectError):
        await store.read(info, ByteRange(0, 5))


@pytest.mark.parametrize("key", ["..", "../root/file", "a/../file", "./file", "file/", "a//b", "/file", "", "fi\0le"])
async def test_keys_that_are_no_names_are_missing(store: LocalStore, folder: Path, key: str) -> None:
    """A key that no file below the root can have does not exist."""
    (folder / "file").write_bytes(b"x")
    with pytest.raises(NotFoundError):
        await store.head(key)


async def test_a_file_cut_or_grown_since_is_stale(store: LocalStore, folder: Path) -> None:
    """Truncation and appending are changes, in place or not, and also when the time is set back."""
    path = folder / "file"
    path.write_bytes(b"0123456789")
    info = await store.head("file")
    for change in (b"01234", b"0123456789+"):
        path.write_bytes(change)
        os.utime(path, ns=(info.mtime_ns, info.mtime_ns))
        with pytest.raises(StaleObjectError, match="is now"):
            await store.read(info, ByteRange(2, 8))


async def test_a_file_that_changes_while_it_is_read_is_stale(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is looked at again after its bytes: a write between is seen."""
    path = folder / "file"
    path.write_bytes(b"0123456789")
    info = await store.head("file")
    pread = os.pread
    changed: list[int] = []

    def pread_then_change(descriptor: int, length: int, offset: int) -> bytes:
        data = pread(descriptor, length, offset)
        path.write_bytes(b"abcdefghij")
        os.utime(path, ns=(info.mtime_ns + 1, info.mtime_ns + 1))
        changed.append(1)
        return data

    monkeypatch.setattr(os, "pread", pread_then_change)
    with pytest.raises(StaleObjectError):
        await store.read(info, ByteRange(0, 10))
    assert changed == [1]


async def test_short_preads_are_continued(store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that returns less than was asked is asked for the rest."""
    (folder / "file").write_bytes(b"0123456789")
    info = await store.head("file")
    pread = os.pread
    calls: list[int] = []

    def short(descriptor: int, length: int, offset: int) -> bytes:
        calls.append(length)
        return pread(descriptor, min(length, 3), offset)

    monkeypatch.setattr(os, "pread", short)
    assert await store.read(info, ByteRange(1, 9)) == b"12345678"
    assert calls == [8, 5, 2]


async def test_a_disk_error_may_pass(store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO of a read is worth a retry and names the file."""
    (folder / "file").write_bytes(b"0123456789")
    info = await store.head("file")

    def broken(*_: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(StoreUnavailableError, match=r"cannot read 'file' in file:///.*Input/output error"):
        await store.read(info, ByteRange(0, 10))


async def test_probe_tells_what_is_wrong(tmp_path: Path) -> None:
    """A missing folder and a file in its place are each said."""
    missing = LocalStore(str(tmp_path / "nowhere"))
    with pytest.raises(NotFoundError, match="no such folder"):
        await missing.probe()
    (tmp_path / "file").write_bytes(b"")
    file = LocalStore(str(tmp_path / "file"))
    with pytest.raises(NotFoundError, match=rf"^cannot reach file://{tmp_path}/file/: it is a file: mount the folder"):
        await file.probe()
    await missing.close()
    await file.close()


async def test_a_root_that_is_gone_is_not_an_empty_one(store: LocalStore, folder: Path) -> None:
    """Where a file system was unmounted nothing is said of its files: neither that they are gone nor an empty list."""
    (folder / "file").write_bytes(b"bytes")
    info = await store.head("file")
    folder.rename(folder.with_name("away"))
    asked = [list_all(store, ""), list_all(store, "below/"), store.head("file"), store.read(info, ByteRange(0, 5))]
    for question in asked:
        with pytest.raises(StoreError, match="the folder itself is gone"):
            await question
    folder.with_name("away").rename(folder)
    assert await read_all(store, info) == b"bytes"


async def test_an_empty_folder_is_there(store: LocalStore, folder: Path) -> None:
    """It is listed in its parent, and its own listing says that it is more than nothing; a missing one is nothing."""
    (folder / "empty").mkdir()
    assert (await list_all(store, "")).prefixes == ["empty/"]
    assert [(info.key, info.size_bytes) for info in (await list_all(store, "empty/")).objects] == [("empty/", 0)]
    missing = await list_all(store, "missing/")
    assert (missing.objects, missing.prefixes) == ([], [])


async def test_nothing_outside_is_touched_on_the_way(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link may lead into a mount of this very node, where a look would wait for ourselves: none is made."""
    outside = folder.parent / "mount"
    outside.mkdir()
    (folder / "straight").symlink_to(outside / "file")
    (folder / "roundabout").symlink_to("../mount/../root/file")
    (folder / "file").write_bytes(b"bytes")
    touched: list[str] = []
    for name in ("stat", "lstat", "readlink", "open", "scandir"):
        real = getattr(os, name)

        def noting(path: object, *arguments: object, real: Callable[..., object] = real, **named: object) -> object:
            touched.append(str(path))
            return real(path, *arguments, **named)

        monkeypatch.setattr(os, name, noting)
    for name in ("straight", "roundabout"):
        with pytest.raises(AccessDeniedError, match="leads out of the folder"):
            await store.head(name)
        with pytest.raises(AccessDeniedError, match="leads out of the folder"):
            await store.read(ObjectInfo(name, 5, 0, "v"), ByteRange(0, 5))
    assert [info.key for info in (await list_all(store, "")).objects] == ["file"]
    assert touched
    assert [path for path in touched if path.startswith(str(outside))] == []
