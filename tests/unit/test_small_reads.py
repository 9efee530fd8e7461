"""The short way to whole small files: right bytes or None, and never an answer that `open` would not give."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestra.blocks.formats import SEAL_ATTRIBUTE
from orchestra.client.node import NodeClient
from orchestra.clock import ManualClock
from orchestra.errors import NotFoundError, UsageError
from orchestra.values import Entry
from tests.support.cache import BLOCK, data_of
from tests.support.node import ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

# Of one length, so that a wrong digest cannot be told by the size.
FILES = {name: data_of(name, 1000) for name in ("a", "b", "deep/c", "deep/x//y", "inner/hidden", "/lead")}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def node(tmp_path: Path, clock: ManualClock) -> Iterator[ThreadNode]:
    outer, inner = VersionedStore(), VersionedStore("versioned://inner/")
    for name, data in FILES.items():
        outer.put(name, data)
    outer.put("empty", b"")
    outer.put("large", data_of("large", BLOCK + 1))
    inner.put("d", data_of("inner d", 1000))
    with thread_node(tmp_path, {"/data": outer, "/data/inner": inner}, clock=clock) as running:
        yield running


@pytest.fixture
def client(node: ThreadNode) -> NodeClient:
    """Everything listed and cached."""
    client = node.client()
    for folder in ("/data", "/data/deep", "/data/inner"):
        client.list(folder)
    for name in FILES:
        if name != "inner/hidden":
            client.read_file(f"/data/{name}")
    client.read_file("/data/inner/d")
    return client


def quick(client: NodeClient, path: str) -> bytes | None:
    return client._small_reads().read(path)


def put_into(client: NodeClient, entry: Entry, room_bytes: int = 2 * BLOCK) -> bytes | None:
    """What `read_small_into` puts into a buffer of that length."""
    buffer = memoryview(bytearray(room_bytes))
    count = client.read_small_into(entry, buffer)
    return None if count is None else bytes(buffer[:count])


def cache_file(client: NodeClient, path: str) -> Path:
    handle = client.open(path)
    handle.close()
    return Path(client._layout.small_file(handle.digest_hex))


def test_what_is_cached_is_read_the_short_way_without_a_message(client: NodeClient) -> None:
    """The file's own bytes, in every folder and mount, and each read is counted as a hit."""
    sent = client.messages_sent
    assert quick(client, "/data/a") == FILES["a"]
    assert quick(client, "/data/deep/c/") == FILES["deep/c"]
    assert quick(client, "/data/inner/d") == data_of("inner d", 1000)
    assert client.messages_sent == sent


@pytest.mark.parametrize("path", ["/data/a", "/data/deep/c", "/data/deep/x//y", "/data//lead", "/data/inner/d"])
def test_a_known_entry_is_put_into_a_buffer_that_is_longer(client: NodeClient, path: str) -> None:
    """Its bytes, without a message; a buffer that has not a byte more than the file tells nothing."""
    entry = client.stat(path)
    sent = client.messages_sent
    assert put_into(client, entry, 1001) == put_into(client, entry) == client.read_file(path)
    assert put_into(client, entry, 1000) is None
    assert client.messages_sent == sent


def test_what_is_no_small_file_here_is_put_into_no_buffer(client: NodeClient) -> None:
    """Directories, empty and large files, another version, a path that no mount covers."""
    entries = [client.stat(path) for path in ("/", "/data", "/data/deep", "/data/empty", "/data/large")]
    known = client.stat("/data/a")
    entries += [replace(known, version="another"), replace(known, path="/elsewhere/a"), replace(known, size_bytes=999)]
    assert [put_into(client, entry) for entry in entries] == [None] * len(entries)


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/data", "/data/inner", "/data/deep", "/data/empty", "/data/large", "/data/nothing"),
        *("/data/inner/hidden", "/elsewhere/a", "/data/deep/x//y", "/data//lead"),
    ],
)
def test_what_is_unusual_is_left_to_open(client: NodeClient, path: str) -> None:
    """Directories, mount points, what a mount hides, empty, large and missing files, empty components of a key."""
    assert quick(client, path) is None


@pytest.mark.parametrize("name", ["deep/x//y", "/lead", "a", "deep/c"])
def test_read_many_gives_what_read_of_each_gives(client: NodeClient, name: str) -> None:
    """Whichever way a path takes, its bytes are its own."""
    paths = [f"/data/{name}", "/data/large", "/data/empty", "/data/a"]
    assert list(client.read_many(paths)) == [FILES[name], data_of("large", BLOCK + 1), b"", FILES["a"]]
    with pytest.raises(NotFoundError):
        client.read_many([*paths, "/data/nothing"])
    with pytest.raises(UsageError):
        client.read_many(["relative"])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": _flip,
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "one byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "no seal": lambda path: os.removexattr(path, SEAL_ATTRIBUTE),
    "another seal": lambda path: os.setxattr(path, SEAL_ATTRIBUTE, os.getxattr(path, SEAL_ATTRIBUTE)[:-1] + b"\0"),
    "no file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_never_data(client: NodeClient, damage: str) -> None:
    """Bytes, length and seal are checked on each read; what does not match is fetched again."""
    file = cache_file(client, "/data/a")
    try:
        os.getxattr(file, SEAL_ATTRIBUTE)
    except OSError:
        if "seal" in damage:
            pytest.skip("no extended attributes on this file system")
    entry = client.stat("/data/a")
    DAMAGE[damage](file)
    assert (quick(client, "/data/a"), put_into(client, entry)) == (None, None)
    assert client.read_many(["/data/a", "/data/b"]) == [FILES["a"], FILES["b"]]


def test_another_objects_file_under_the_name_is_refused(client: NodeClient) -> None:
    """The seal names its object."""
    cache_file(client, "/data/b").rename(cache_file(client, "/data/a"))
    assert (quick(client, "/data/a"), put_into(client, client.stat("/data/a"))) == (None, None)


def test_another_boots_file_is_refused(client: NodeClient) -> None:
    """The seal names the boot that vouches for the bytes."""
    client._boot_id = bytes(16)
    assert (quick(client, "/data/a"), put_into(client, client.stat("/data/a"))) == (None, None)


def test_an_old_listing_does_not_answer(client: NodeClient, clock: ManualClock) -> None:
    """Past the mount's freshness a name has to be asked for."""
    clock.advance(61)
    assert quick(client, "/data/a") is None
    sent = client.messages_sent
    assert client.read_file("/data/a") == FILES["a"]
    assert client.messages_sent > sent


def test_a_batch_looks_at_each_directory_once(client: NodeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty files of two directories cost two looks at a listing."""
    looked: list[str] = []
    listing = client._metadata.listing

    def counted(store_id: str, prefix: str, freshness_s: float) -> object:
        looked.append(prefix)
        return listing(store_id, prefix, freshness_s)

    monkeypatch.setattr(client._metadata, "listing", counted)
    client.read_many(["/data/a", "/data/deep/c", "/data/b", "/data/deep/c"] * 10)
    assert looked == ["", "deep/"]
