"""What the node finds changed is changed in the folder at once, whatever the kernel was told before; counted."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orchestra.client.node import NodeClient
from orchestra.fuse.options import MountOptions
from orchestra.fuse.session import Session
from orchestra.fuse.shared import CHANGES_SEEN
from tests.support.fuse_inside import mounted_inside
from tests.support.fuse_mounts import needs_fuse
from tests.support.node import PATIENCE_S, ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

pytestmark = [pytest.mark.system, needs_fuse]

_HOUR_S = 3600.0


class Site:
    """A node in this process, another reader of it, and a folder whose kernel keeps names for an hour."""

    def __init__(self, node: ThreadNode, store: VersionedStore, target: Path, session: Session) -> None:
        self.node = node
        self.store = store
        self.session = session
        self.data = target / "data"
        self.other: NodeClient = node.client()

    def lookups(self) -> int:
        """How many look-ups the kernel has sent."""
        return int(self.session.counters.snapshot().get("LOOKUP", 0))

    def wait_told(self) -> None:
        """Wait until the kernel was told of all that has changed."""
        changes = self.other.changes()
        assert changes is not None
        words = self.session.table.memory.words
        while words[CHANGES_SEEN] <= changes.position:
            pass
        self.session.notices.expire("/data", within_s=PATIENCE_S)  # taken after whatever was said before


@pytest.fixture(params=["auto", "pagecache"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    store = VersionedStore()
    for index in range(10):
        store.put(f"d/{index}", b"old")
    with ExitStack() as stack:
        root = stack.enter_context(ram_folder())
        node = stack.enter_context(thread_node(root, store, freshness_s=_HOUR_S))
        options = MountOptions(mode=request.param, attr_timeout_s=_HOUR_S)
        session = stack.enter_context(mounted_inside(node.client(), tmp_path, options))
        yield Site(node, store, tmp_path, session)


def _content(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def _wait_size(path: Path, size: int) -> None:
    """Wait until the kernel was told; it would not ask by itself within the test's time."""
    while _size_of(path) != size:
        pass


def _size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def _errno_of(path: Path) -> int:
    try:
        os.stat(path)
    except OSError as error:
        return int(error.errno or 0)
    return 0


def test_a_new_version_is_seen_as_soon_as_the_node_knows_it(site: Site) -> None:
    """The name that changed is looked up, none of the others is; who has the old version open keeps it."""
    for index in range(10):
        assert _content(site.data / "d" / str(index)) == b"old"
    opened = os.open(site.data / "d" / "3", os.O_RDONLY)
    site.store.put("d/3", b"newer")
    assert _content(site.data / "d" / "3") == b"old"
    before = site.lookups()
    site.other.list("/data/d", refresh=True)
    _wait_size(site.data / "d" / "3", 5)
    assert _content(site.data / "d" / "3") == b"newer"
    for index in range(10):
        assert _content(site.data / "d" / str(index)) == (b"newer" if index == 3 else b"old")
    assert site.lookups() == before + 2  # the kernel asks whether it is the same inode, and then which one it is
    assert os.pread(opened, 100, 0) == b"old"
    assert os.fstat(opened).st_size == 3
    os.close(opened)


def test_a_single_look_up_of_another_reader_makes_the_whole_folder_doubtful(site: Site) -> None:
    """What one object's new version says of its listing holds for its neighbours: they are looked up again."""
    site.other.list("/data/d")
    for index in range(10):
        os.stat(site.data / "d" / str(index))
    for index in (3, 4):
        site.store.put(f"d/{index}", b"newer")
    site.other.stat("/data/d/3", refresh=True)
    for index in (3, 4):
        _wait_size(site.data / "d" / str(index), 5)


def test_names_come_and_go_with_the_listing_that_says_so(site: Site) -> None:
    """Also a name that the kernel knows to be absent."""
    assert _errno_of(site.data / "d" / "new") == errno.ENOENT
    assert _errno_of(site.data / "d" / "0") == 0
    before = site.lookups()
    assert _errno_of(site.data / "d" / "new") == errno.ENOENT
    assert site.lookups() == before  # the kernel knows
    site.store.put("d/new", b"here")
    site.store.delete("d/0")
    site.other.list("/data/d", refresh=True)
    _wait_size(site.data / "d" / "new", 4)
    while _errno_of(site.data / "d" / "0") != errno.ENOENT:
        pass
    assert sorted(os.listdir(site.data / "d")) == sorted([*map(str, range(1, 10)), "new"])


def test_a_mount_that_comes_or_goes_is_seen_at_once(site: Site, tmp_path: Path) -> None:
    """With everything below it, and the folder that leads to it."""
    wire: dict[str, Any] = {"path": "/more/of/it", "uris": ["memory:///data"], "freshness_s": _HOUR_S}
    top = tmp_path / "more"
    assert _errno_of(top) == errno.ENOENT
    site.other.daemon_request("POST", "/v1/mounts", wire)
    while _errno_of(top / "of" / "it" / "d" / "1"):
        pass
    site.other.daemon_request("DELETE", "/v1/mounts?path=/more/of/it")
    while _errno_of(top / "of" / "it" / "d" / "1") != errno.ENOENT:
        pass
    while _errno_of(top) != errno.ENOENT:
        pass


def test_a_worker_goes_on_where_the_last_one_was(site: Site) -> None:
    """What changed between a worker's death and its successor's start is not missed."""
    place = site.session.notices.changes_of(site.other)
    assert place is not None
    site.store.put("d/3", b"newer")
    site.other.list("/data/d")
    site.store.put("d/3", b"newest")
    site.other.list("/data/d", refresh=True)
    following = site.other.changes(place.position)
    assert following is not None
    assert [path for _, path in following.wait() or ()] == ["/data/d/3"]


def test_a_folder_of_the_node_is_listed_from_the_kernels_copy(site: Site) -> None:
    """From the second time on; a new name makes it be read once more."""

    def messages() -> int:
        assert len(os.listdir(site.data / "d")) == len(site.store.objects)
        counters = site.session.counters.snapshot()
        return counters.get("READDIR", 0) + counters.get("READDIRPLUS", 0)

    first = messages()
    assert [messages() for _ in range(3)] == [first] * 3
    site.store.put("d/new", b"x")
    site.other.list("/data/d", refresh=True)
    site.wait_told()  # else it is read again for our own sake, and once more when the kernel is told
    changed = messages()
    assert changed > first
    assert messages() == changed
