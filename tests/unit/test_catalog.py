"""The daemon's catalog: how often the store is asked, what is published, and what an answer may not be older than."""

# Over 500 lines: one catalog, one clock and one store, thirty-five claims about how they meet that share every helper.

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import prepare
from orchestra.clock import ManualClock
from orchestra.errors import CacheDirectoryError, StoreUnavailableError
from orchestra.metadata.catalog import Catalog
from orchestra.metadata.differences import differing_names
from orchestra.metadata.reader import MetadataReader
from orchestra.metadata.records import publish_record
from orchestra.namespace.paths import is_shown_name
from orchestra.observe.change_log import Change, Scope
from orchestra.stores.contract import ListPage
from orchestra.testing.fault_store import Fail, FaultStore, Stall, Swap
from orchestra.values import EntryKind, ObjectInfo
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


BOOT = b"b" * 16
FRESH = 60.0
STRICT = 0.0


class Desk:
    """A catalog over a store that the test changes, and a reader such as every client has."""

    def __init__(self, root: Path) -> None:
        self.layout = prepare(root, Geometry(4096, 16384))[0]
        self.clock = ManualClock()
        self.store = VersionedStore()
        self.faults = FaultStore(self.store)
        self.reader = MetadataReader(self.layout.listing_file, self.layout.attr_file, clock=self.clock, boot_id=BOOT)
        self.rooms_made = 0
        self.changes: list[Change] = []
        self.catalog = Catalog(
            self.layout,
            str(self.layout.tmp),
            self.reader,
            clock=self.clock,
            boot_id=BOOT,
            is_shown_name=is_shown_name,
            make_room=self._make_room,
            on_change=self.changes.extend,
        )

    def _make_room(self) -> None:
        self.rooms_made += 1

    async def version(self, key: str, freshness_s: float = FRESH, *, refresh: bool = False) -> str | None:
        """The version of what is at `key`, "dir" for a directory, None for nothing."""
        entry = await self.catalog.stat(self.faults, key, freshness_s, refresh=refresh)
        return None if entry is None else "dir" if entry.kind is EntryKind.DIRECTORY else entry.version

    async def names(self, prefix: str = "", freshness_s: float = FRESH, *, refresh: bool = False) -> list[bytes]:
        record = await self.catalog.list_directory(self.faults, prefix, freshness_s, refresh=refresh)
        return [row.name for row in record]

    def known(self, key: str) -> object:
        """What any process of the node knows without asking."""
        return self.reader.lookup(self.store.store_id, key, FRESH)

    def told(self) -> set[tuple[Scope, str]]:
        """What was told to have changed since the last time."""
        changes, self.changes[:] = self.changes[:], []
        assert {change.store_id for change in changes} <= {self.store.store_id}
        return {(change.scope, change.name) for change in changes}

    def asked(self) -> tuple[int, int]:
        """HEADs and LISTs so far."""
        return len(self.store.heads), len(self.store.lists)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    made = Desk(tmp_path)
    yield made
    await made.catalog.close()


async def test_a_look_up_is_asked_once_and_published(desk: Desk) -> None:
    """The first question costs a HEAD; after that every process of the node knows the answer."""
    version = desk.store.put("a", b"x")
    assert await desk.version("a") == version
    assert await desk.version("a") == version
    assert desk.asked() == (1, 0)
    assert desk.known("a") is not None


async def test_a_hundred_look_ups_at_once_cost_one_head(desk: Desk) -> None:
    """Single flight: whoever asks while the question is under way waits for its answer."""
    version = desk.store.put("a", b"x")
    stall = desk.faults.inject(Stall(), on="head")
    asking = [asyncio.create_task(desk.version("a")) for _ in range(100)]
    await stall.wait_fired()
    stall.release()
    assert await asyncio.gather(*asking) == [version] * 100
    assert desk.asked() == (1, 0)


async def test_a_hundred_listings_at_once_cost_one_list(desk: Desk) -> None:
    """The same for directories."""
    desk.store.put("d/a", b"x")
    stall = desk.faults.inject(Stall(), on="list")
    asking = [asyncio.create_task(desk.names("d/")) for _ in range(100)]
    await stall.wait_fired()
    stall.release()
    assert await asyncio.gather(*asking) == [[b"a"]] * 100
    assert desk.asked() == (0, 1)


async def test_absence_is_known_too(desk: Desk) -> None:
    """That nothing is there is an answer, kept as long as any other."""
    assert await desk.version("a") is None
    desk.store.put("a", b"x")
    assert await desk.version("a") is None
    assert desk.asked() == (1, 1)
    desk.clock.advance(FRESH + 1)
    assert await desk.version("a") is not None


async def test_a_directory_is_what_keys_lie_below(desk: Desk) -> None:
    """What is no object is a directory if a LIST below it finds anything, at the cost of one page."""
    for index in range(3000):
        desk.store.put(f"d/{index}", b"")
    assert await desk.version("d") == "dir"
    assert desk.asked() == (1, 1)


async def test_an_empty_page_is_not_an_empty_directory(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store may answer with nothing and a token for more; only the end of the listing says that nothing is there."""
    desk.store.put("d/a", b"x")
    pages = desk.store.list_directory

    async def begins_empty(prefix: str) -> AsyncIterator[ListPage]:
        yield ListPage((), ())
        async for page in pages(prefix):
            yield page

    monkeypatch.setattr(desk.store, "list_directory", begins_empty)
    assert await desk.version("d") == "dir"


async def test_a_listing_answers_for_all_its_keys(desk: Desk) -> None:
    """After a directory was listed no look-up in it costs a request, present or absent."""
    versions = {key: desk.store.put(key, b"x") for key in ("d/a", "d/b")}
    desk.store.put("d/sub/x", b"x")
    assert await desk.names("d/") == [b"a", b"b", b"sub"]
    assert await desk.version("d/a") == versions["d/a"]
    assert await desk.version("d/sub") == "dir"
    assert await desk.version("d/nothing") is None
    assert desk.asked() == (0, 1)


@pytest.mark.parametrize(("count", "requests"), [(0, 1), (999, 1), (1000, 1), (1001, 2), (2500, 3)])
async def test_a_listing_costs_a_request_for_each_thousand(desk: Desk, count: int, requests: int) -> None:
    """Pages of 1,000 names, and no HEAD for any of them."""
    for index in range(count):
        desk.store.put(f"d/{index:05}", b"")
    assert len(await desk.names("d/")) == count
    assert desk.asked() == (0, requests)


async def test_what_no_folder_can_hold_is_hidden_and_counted(desk: Desk) -> None:
    """Keys without a name, or with one that is none, are left out of the listing; the folder's own marker is not."""
    for key in ("d/", "d/ok", "d/.", "d/..", "d//x", "d/" + "n" * 256, "d/nul\0"):
        desk.store.put(key, b"")
    record = await desk.catalog.list_directory(desk.store, "d/", FRESH)
    assert [row.name for row in record] == [b"ok"]
    assert record.hidden_count == 5


async def test_refresh_asks_now_whatever_is_known(desk: Desk) -> None:
    """`refresh` sees what the store says at this moment, and so does everybody after it."""
    desk.store.put("a", b"x")
    await desk.version("a")
    version = desk.store.put("a", b"y")
    assert await desk.version("a") != version
    assert await desk.version("a", refresh=True) == version
    assert await desk.version("a") == version
    await desk.names()
    desk.store.put("b", b"x")
    assert await desk.names() == [b"a"]
    assert await desk.names(refresh=True) == [b"a", b"b"]


async def test_refresh_does_not_join_a_question_asked_before(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that left the store before the change is not good enough: the question is asked again."""
    old = desk.store.put("a", b"x")
    head = desk.store.head
    on_its_way, may_arrive = asyncio.Event(), asyncio.Event()

    async def slow_answer(key: str) -> ObjectInfo:
        info = await head(key)
        on_its_way.set()
        await may_arrive.wait()
        return info

    monkeypatch.setattr(desk.store, "head", slow_answer)
    before = asyncio.create_task(desk.version("a"))
    await on_its_way.wait()
    new = desk.store.put("a", b"y")
    refreshed = asyncio.create_task(desk.version("a", refresh=True))
    await asyncio.sleep(0)
    may_arrive.set()
    assert (await before, await refreshed) == (old, new)
    assert desk.asked() == (2, 0)


async def test_strict_asks_every_time_and_publishes_nothing(desk: Desk) -> None:
    """With freshness zero every look-up is a HEAD that began after it was asked for; nothing is left on disk that
    nobody may use."""
    for data in (b"x", b"y", b"z"):
        version = desk.store.put("a", data)
        assert await desk.version("a", STRICT) == version
    assert desk.asked() == (3, 0)
    assert not [path for path in (desk.layout.root / "attrs").rglob("*") if path.is_file()]


async def test_strict_never_lists_instead(desk: Desk) -> None:
    """A listing saves HEADs only for those who may use it later; strict look-ups may not."""
    for index in range(40):
        desk.store.put(f"d/{index}", b"")
        await desk.version(f"d/{index}", STRICT)
    assert desk.asked() == (40, 0)


async def test_a_hundred_strict_look_ups_at_once_cost_two_heads(desk: Desk) -> None:
    """Those who came while a question was under way wait for it and then share the next one."""
    version = desk.store.put("a", b"x")
    stall = desk.faults.inject(Stall(), on="head")
    asking = [asyncio.create_task(desk.version("a", STRICT)) for _ in range(100)]
    await stall.wait_fired()
    stall.release()
    assert await asyncio.gather(*asking) == [version] * 100
    assert desk.asked() == (2, 0)


async def test_a_question_that_takes_longer_than_the_freshness_is_answered(desk: Desk) -> None:
    """However slow the store, what it said in the end is the answer, and not "nothing there"."""
    version = desk.store.put("d/a", b"x")

    async def slow() -> None:
        desk.clock.advance(3600)

    desk.faults.inject(Swap(slow), on="head", times=None)
    desk.faults.inject(Swap(slow), on="list", times=None)
    assert await desk.version("d/a") == version
    assert await desk.names("d/") == [b"a"]
    assert await desk.version("d") == "dir"


async def test_a_listing_slower_than_the_freshness_is_used(desk: Desk) -> None:
    """A folder that takes longer to list than its names may be old still costs no HEAD a file: half of the freshness
    is left when its listing comes, and no more."""
    for index in range(50):
        desk.store.put(f"d/{index:02}", b"")

    async def slow() -> None:
        desk.clock.advance(10 * FRESH)

    desk.faults.inject(Swap(slow), on="list")
    assert len(await desk.names("d/")) == 50
    desk.clock.advance(FRESH / 2 - 1)
    for index in range(50):
        await desk.version(f"d/{index:02}")
    assert desk.asked() == (0, 1)
    desk.clock.advance(2)
    await desk.version("d/00")
    assert desk.asked() == (1, 1)


async def test_an_answer_too_old_for_a_late_comer_is_asked_for_again(desk: Desk) -> None:
    """Whoever joins a question under way gets an answer no older than his freshness, or a new one."""
    desk.store.put("a", b"x")
    stall = desk.faults.inject(Stall(), on="head")
    first = asyncio.create_task(desk.version("a"))
    await stall.wait_fired()
    desk.clock.advance(FRESH + 1)
    late = asyncio.create_task(desk.version("a"))
    await asyncio.sleep(0)
    stall.release()
    await asyncio.gather(first, late)
    assert desk.asked() == (2, 0)


async def test_after_eight_heads_the_directory_is_listed(desk: Desk) -> None:
    """A program that opens nine files of a directory by name gets the listing as well, in the background."""
    for index in range(30):
        desk.store.put(f"d/{index:02}", b"")
    for index in range(8):
        await desk.version(f"d/{index:02}")
    assert desk.asked() == (8, 0)
    await desk.version("d/08")
    while len(desk.store.lists) < 1 or desk.known("d/29") is None:
        await asyncio.sleep(0)
    for index in range(30):
        await desk.version(f"d/{index:02}")
    assert desk.asked() == (9, 1)


async def test_an_old_listing_is_renewed_once_heads_cost_as_much(desk: Desk) -> None:
    """Ski rental: with a listing of three pages, three HEADs are spent before it is listed again; the fourth look-up
    waits for the listing and needs no HEAD."""
    for index in range(2500):
        desk.store.put(f"d/{index:04}", b"")
    await desk.names("d/")
    desk.clock.advance(FRESH + 1)
    for index in range(3):
        await desk.version(f"d/{index:04}")
    assert desk.asked() == (3, 3)
    await desk.version("d/0003")
    assert desk.asked() == (3, 6)
    for index in range(100):
        await desk.version(f"d/{index:04}")
    assert desk.asked() == (3, 6)


async def test_a_long_listing_is_not_waited_for(desk: Desk) -> None:
    """Renewing a listing of many pages goes on beside the HEAD that answers."""
    for index in range(5500):
        desk.store.put(f"d/{index:04}", b"")
    await desk.names("d/")
    desk.clock.advance(FRESH + 1)
    for index in range(6):
        await desk.version(f"d/{index:04}")
    stall = desk.faults.inject(Stall(), on="list")
    assert await desk.version("d/0006") is not None
    await stall.wait_fired()
    stall.release()
    assert len(desk.store.heads) == 7


async def test_a_listing_known_to_be_wrong_is_dropped(desk: Desk) -> None:
    """When a look-up finds that an object changed, nobody finds its old row in the listing any more."""
    desk.store.put("d/a", b"x")
    desk.store.put("d/b", b"x")
    await desk.names("d/")
    version = desk.store.put("d/a", b"y")
    await desk.version("d/a", refresh=True)
    assert await desk.version("d/a") == version
    assert desk.reader.any_listing(desk.store.store_id, "d/") is None


async def test_what_a_new_listing_says_otherwise_is_told(desk: Desk) -> None:
    """Each name that came, went or has another version; of what is as it was, and of what nobody knew, nothing."""
    for name in ("a", "b", "c"):
        desk.store.put(f"d/{name}", b"x")
    await desk.names("d/")
    assert desk.told() == set()
    desk.store.put("d/b", b"y")
    desk.store.delete("d/c")
    desk.store.put("d/new", b"x")
    await desk.names("d/", refresh=True)
    assert desk.told() == {(Scope.KEY, "d/b"), (Scope.KEY, "d/c"), (Scope.KEY, "d/new")}
    await desk.names("d/", refresh=True)
    assert desk.told() == set()


async def test_what_a_look_up_finds_changed_is_told_and_the_rest_of_its_listing_doubted(desk: Desk) -> None:
    """The next listing then says exactly what else had changed."""
    for name in ("a", "b", "c"):
        desk.store.put(f"d/{name}", b"x")
    await desk.names("d/")
    for name in ("a", "b", "new"):
        desk.store.put(f"d/{name}", b"y")
    await desk.version("d/a", refresh=True)
    assert desk.told() == {(Scope.KEY, "d/a"), (Scope.CHILDREN, "d/")}
    await desk.names("d/")
    assert desk.told() == {(Scope.KEY, "d/a"), (Scope.KEY, "d/b"), (Scope.KEY, "d/new")}


async def test_a_single_answer_is_compared_with_the_last_one_and_with_the_next_listing(desk: Desk) -> None:
    """Also that nothing was there."""
    desk.store.put("d/a", b"x")
    desk.store.put("d/b", b"x")
    for name in ("a", "b", "none"):
        await desk.version(f"d/{name}")
    assert desk.told() == set()
    desk.store.put("d/a", b"y")
    await desk.version("d/a", refresh=True)
    assert desk.told() == {(Scope.KEY, "d/a")}
    desk.store.delete("d/b")
    desk.store.put("d/none", b"x")
    await desk.names("d/")
    assert desk.told() - {(Scope.KEY, "d/a")} == {(Scope.KEY, "d/b"), (Scope.KEY, "d/none")}


async def test_a_version_that_a_reader_found_gone_is_told(desk: Desk) -> None:
    """`forget` is how the engine says so."""
    desk.store.put("d/a", b"x")
    await desk.names("d/")
    desk.catalog.forget(desk.store.store_id, "d/a")
    assert desk.told() == {(Scope.KEY, "d/a"), (Scope.CHILDREN, "d/")}


async def test_a_listing_that_is_another_altogether_is_told_as_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of names, and not name by name."""
    monkeypatch.setattr(differing_names, "__kwdefaults__", {"names_max": 10})
    for index in range(12):
        desk.store.put(f"d/{index:02}", b"x")
    await desk.names("d/")
    for index in range(12):
        desk.store.put(f"d/{index:02}", b"y")
    await desk.names("d/", refresh=True)
    assert desk.told() == {(Scope.CHILDREN, "d/")}


async def test_times_told_differently_do_not_make_a_listing_wrong(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that tells milliseconds in a listing and seconds in a HEAD has not changed its object."""
    desk.store.put("d/a", b"x")
    await desk.names("d/")
    info = desk.store.objects["d/a"].info
    rounded = ObjectInfo(info.key, info.size_bytes, info.mtime_ns + 1, info.version)

    async def head(key: str) -> ObjectInfo:
        desk.store.heads.append(key)
        return rounded

    monkeypatch.setattr(desk.store, "head", head)
    await desk.version("d/a", refresh=True)
    assert desk.reader.any_listing(desk.store.store_id, "d/") is not None


async def test_an_error_is_everybodys_and_nobody_keeps_it(desk: Desk) -> None:
    """All who wait for a question get its error; the next one asks again."""
    version = desk.store.put("a", b"x")
    fault = desk.faults.inject(Fail(StoreUnavailableError("503")), on="head")
    results = await asyncio.gather(*(desk.version("a") for _ in range(10)), return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailableError] * 10
    assert fault.fired == 1
    assert await desk.version("a") == version


async def test_half_a_listing_is_none(desk: Desk) -> None:
    """When a page fails the listing fails: nothing is published that would hide the rest of the directory."""
    for index in range(2500):
        desk.store.put(f"d/{index:04}", b"")
    fault = desk.faults.inject(Fail(StoreUnavailableError("503")), on="list", at=2)
    with pytest.raises(StoreUnavailableError):
        await desk.names("d/")
    assert fault.fired == 1
    assert desk.reader.any_listing(desk.store.store_id, "d/") is None
    assert len(await desk.names("d/")) == 2500


async def test_who_stops_waiting_stops_nobody_else(desk: Desk) -> None:
    """Cancelling one of two that ask leaves the question under way for the other."""
    version = desk.store.put("a", b"x")
    stall = desk.faults.inject(Stall(), on="head")
    first, second = (asyncio.create_task(desk.version("a")) for _ in range(2))
    await stall.wait_fired()
    first.cancel()
    await asyncio.sleep(0)
    stall.release()
    assert await second == version
    assert first.cancelled()
    assert desk.asked() == (1, 0)


async def test_forgetting_a_key_forgets_every_record_of_it(desk: Desk) -> None:
    """What was found to be out of date is asked for again, whichever record said it."""
    desk.store.put("d/a", b"x")
    await desk.version("d/a")
    await desk.names("d/")
    assert desk.known("d/a") is not None
    desk.catalog.forget(desk.store.store_id, "d/a")
    assert desk.known("d/a") is None
    desk.catalog.forget(desk.store.store_id, "d/a")


def disk_full(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Make the next `times` records find the disk full."""
    left = [times]

    def publish_or_fail(path: str, raw: bytes, *, temporary: str) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish_record(path, raw, temporary=temporary)

    monkeypatch.setattr("orchestra.metadata.catalog.publish_record", publish_or_fail)


async def test_a_full_disk_makes_room_for_records(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that finds the disk full has blocks evicted, and is tried once more."""
    desk.store.put("d/a", b"x")
    disk_full(monkeypatch, times=1)
    assert await desk.names("d/") == [b"a"]
    assert desk.rooms_made == 1
    assert desk.known("d/a") is not None


async def test_what_cannot_be_published_is_answered(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up needs no disk: with none to write to it is answered all the same, each time by the store."""
    version = desk.store.put("d/a", b"x")
    disk_full(monkeypatch, times=100)
    assert await desk.version("d/a") == version
    assert await desk.version("d/a") == version
    assert desk.asked() == (2, 0)


async def test_a_listing_that_cannot_be_published_says_why(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing reaches its readers as a file; without room for it the error names the directory and the disk."""
    desk.store.put("d/a", b"x")
    disk_full(monkeypatch, times=2)
    with pytest.raises(CacheDirectoryError, match=r"listing of d/ of versioned://test/ .* No space left .* free some"):
        await desk.names("d/")
    assert await desk.names("d/") == [b"a"]


async def test_a_hundred_thousand_objects_cost_a_hundred_lists(desk: Desk) -> None:
    """One LIST for each 1,000 keys, no HEAD; all are there, in order, and each is found without a request."""
    for index in range(100_000):
        desk.store.put(f"d/{index:06}", b"")
    record = await desk.catalog.list_directory(desk.store, "d/", FRESH)
    assert len(record) == 100_000
    assert [record.name(index) for index in (0, 1, 50_000, 99_999)] == [b"000000", b"000001", b"050000", b"099999"]
    for index in range(0, 100_000, 999):
        assert await desk.version(f"d/{index:06}") is not None
    assert desk.asked() == (0, 100)
