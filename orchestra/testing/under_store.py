"""The suite that every under store passes: each sentence of `orchestra.stores.contract` as a test.

Owns: the promises. Leaves to others: how a store is opened and filled. To prove a store, subclass and give fixtures:

    class TestMyStore(UnderStoreSuite):
        @pytest.fixture
        async def store(self): ...            # opened on an empty root, closed afterwards
        @pytest.fixture
        def put(self): ...                    # async (key, bytes) -> None, below the same root
        @pytest.fixture
        def delete(self): ...                 # async (key) -> None

`store` may be bare or wrapped. Needs pytest and pytest-asyncio in auto mode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestra.errors import NotFoundError, StaleObjectError
from orchestra.stores.contract import ListPage, UnderStore
from orchestra.values import ByteRange, ObjectInfo

Put = Callable[[str, bytes], Awaitable[None]]
Delete = Callable[[str], Awaitable[None]]
PutNumbered = Callable[[str, int], Awaitable[None]]

# No two neighbouring runs of it are alike, so a wrong offset cannot give right bytes.
PATTERN = b"".join(index.to_bytes(3, "big") for index in range(4000))
READ_EDGES = (
    (0, 1),
    (0, 10),
    (1, 2),
    (4095, 4097),
    (0, len(PATTERN) - 1),
    (0, len(PATTERN)),
    (1, len(PATTERN)),
    (len(PATTERN) - 1, len(PATTERN)),
)
ODD_KEYS = (
    "a b.txt",
    " lead and tail ",
    "plus+and&equals=.txt",
    "percent%.txt",
    "percent%20encoded.txt",
    "percent%2Fslash.txt",
    "hash#mark.txt",
    "question?mark.txt",
    "quote'and\"quotes.txt",
    "back\\slash.txt",
    "colon:semi;comma,.txt",
    "[brackets]{braces}(parens)<angles>.txt",
    "star*dollar$bang!at@tilde~caret^pipe|tick`.txt",
    "übergröße-π-日本語-🙂.txt",
    "cafe\u0301.txt",  # NFD: not the same key as its NFC spelling
    "deep/er/than one/level+1/x.txt",
    "...txt",
    ".hidden",
    "-dash",
)


@dataclass
class Listing:
    """What a whole listing said."""

    pages: list[ListPage] = field(default_factory=list)

    @property
    def objects(self) -> list[ObjectInfo]:
        """All objects, in the order they came."""
        return [info for page in self.pages for info in page.objects]

    @property
    def prefixes(self) -> list[str]:
        """All common prefixes, in the order they came."""
        return [prefix for page in self.pages for prefix in page.prefixes]


async def list_all(store: UnderStore, prefix: str) -> Listing:
    """Return every page of a listing."""
    return Listing([page async for page in store.list_directory(prefix)])


async def read_all(store: UnderStore, info: ObjectInfo) -> bytes:
    """Return the object's bytes."""
    return bytes(await store.read(info, ByteRange(0, info.size_bytes))) if info.size_bytes else b""


class UnderStoreSuite:
    """Subclass, override the fixtures, and set what the store cannot do."""

    odd_keys: Sequence[str] = ODD_KEYS  # keys that the store can hold and serve
    many_count = 300  # objects for the listing of a large directory
    page_keys_max: int | None = None  # if every page but the last must be full, how many names that is
    has_folder_markers = False  # an object named "dir/" can exist

    @pytest.fixture
    def store(self) -> UnderStore:
        """The opened store."""
        raise NotImplementedError("a subclass of UnderStoreSuite gives the fixture 'store'")

    @pytest.fixture
    def put(self) -> Put:
        """Writes an object below the store's root, behind its back."""
        raise NotImplementedError("a subclass of UnderStoreSuite gives the fixture 'put'")

    @pytest.fixture
    def delete(self) -> Delete:
        """Deletes an object below the store's root, behind its back."""
        raise NotImplementedError("a subclass of UnderStoreSuite gives the fixture 'delete'")

    @pytest.fixture
    def put_numbered(self, put: Put) -> PutNumbered:
        """Puts many objects PREFIX000000, PREFIX000001 ...; override where there is a quicker way."""

        async def put_each(prefix: str, count: int) -> None:
            for index in range(count):
                await put(f"{prefix}{index:06d}", b"x")

        return put_each

    # head

    async def test_head_says_key_size_and_version(self, store: UnderStore, put: Put) -> None:
        """`head` returns the key as it was asked, the exact size, a time and a version."""
        await put("dir/a.bin", PATTERN)
        info = await store.head("dir/a.bin")
        assert (info.key, info.size_bytes) == ("dir/a.bin", len(PATTERN))
        assert info.mtime_ns > 0
        assert info.version

    async def test_version_stays_while_bytes_stay(self, store: UnderStore, put: Put) -> None:
        """Two looks at an untouched object are equal."""
        await put("same", b"bytes")
        assert await store.head("same") == await store.head("same")

    async def test_version_changes_with_the_bytes(self, store: UnderStore, put: Put) -> None:
        """Other bytes of the same length are another version."""
        await put("changing", b"aaaa")
        before = await store.head("changing")
        await put("changing", b"bbbb")
        assert (await store.head("changing")).version != before.version

    async def test_missing_object_is_not_found(self, store: UnderStore) -> None:
        """`head` of nothing raises NotFoundError, which is a FileNotFoundError, with one line that names the key."""
        with pytest.raises(NotFoundError) as raised:
            await store.head("no such.key")
        assert isinstance(raised.value, FileNotFoundError)
        assert "no such.key" in str(raised.value)
        assert "\n" not in str(raised.value)

    async def test_folder_is_no_object(self, store: UnderStore, put: Put) -> None:
        """A prefix of keys is not an object."""
        await put("folder/inside", b"x")
        with pytest.raises(NotFoundError):
            await store.head("folder")

    async def test_key_below_an_object_is_not_found(self, store: UnderStore, put: Put) -> None:
        """A file is no folder: what would be below it does not exist."""
        await put("file", b"x")
        with pytest.raises(NotFoundError):
            await store.head("file/below")

    async def test_name_too_long_for_the_store_is_not_found(self, store: UnderStore) -> None:
        """A key that no object can have is missing, not an error of another kind."""
        with pytest.raises(NotFoundError):
            await store.head("n" * 300)

    async def test_zero_bytes_are_an_object(self, store: UnderStore, put: Put) -> None:
        """An empty object has size 0 in `head` and in the listing."""
        await put("empty/none", b"")
        assert (await store.head("empty/none")).size_bytes == 0
        listing = await list_all(store, "empty/")
        assert [(info.key, info.size_bytes) for info in listing.objects] == [("empty/none", 0)]

    # list

    async def test_listing_shows_direct_children_only(self, store: UnderStore, put: Put) -> None:
        """Objects below are objects, what lies deeper is one prefix with a slash at its end, all below the root."""
        for key in ("top", "d/a", "d/b", "d/sub/c", "d/sub/deeper/e", "d/tail/f", "dd/g"):
            await put(key, b"x")
        listing = await list_all(store, "d/")
        assert sorted(info.key for info in listing.objects) == ["d/a", "d/b"]
        assert sorted(listing.prefixes) == ["d/sub/", "d/tail/"]

    async def test_root_is_listed_by_the_empty_prefix(self, store: UnderStore, put: Put) -> None:
        """The prefix "" is the root."""
        await put("at-root", b"x")
        await put("in/folder", b"x")
        listing = await list_all(store, "")
        assert [info.key for info in listing.objects] == ["at-root"]
        assert listing.prefixes == ["in/"]

    async def test_listing_agrees_with_head(self, store: UnderStore, put: Put) -> None:
        """Size, time and version of a listing are those of `head`: a cache filled by one serves the other."""
        for size in (0, 1, 5000):
            await put(f"agree/{size}", PATTERN[:size])
        listing = await list_all(store, "agree/")
        assert len(listing.objects) == 3
        for info in listing.objects:
            assert info == await store.head(info.key)

    async def test_listing_of_nothing_is_empty(self, store: UnderStore) -> None:
        """A prefix that holds nothing yields no names and no error."""
        # The second is no UTF-8: no key of an object store, and any program may ask for such a file.
        for prefix in ("nothing/here/", "nothing-\udcff/"):
            listing = await list_all(store, prefix)
            assert (listing.objects, listing.prefixes) == ([], [])

    async def test_many_objects_come_once_each(self, store: UnderStore, put_numbered: PutNumbered) -> None:
        """Every key of a large directory comes exactly once, in pages that are full but for the last."""
        await put_numbered("many/f", self.many_count)
        listing = await list_all(store, "many/")
        keys = [info.key for info in listing.objects]
        assert sorted(keys) == [f"many/f{index:06d}" for index in range(self.many_count)]
        if self.page_keys_max is not None:
            assert len(listing.pages) == -(-self.many_count // self.page_keys_max)

    async def test_listing_may_be_left_early(self, store: UnderStore, put_numbered: PutNumbered) -> None:
        """Closing the iterator after one page leaves the store fit for use."""
        await put_numbered("early/f", 30)
        pages = store.list_directory("early/")
        first = await anext(pages)
        assert first.objects
        aclose = getattr(pages, "aclose", None)
        assert aclose is not None, "an async iterator of pages can be closed"
        await aclose()
        assert len((await list_all(store, "early/")).objects) == 30

    async def test_folder_marker_is_no_name_inside(self, store: UnderStore, put: Put) -> None:
        """An object named as the prefix may be listed with exactly that key; nothing else is made of it."""
        if not self.has_folder_markers:
            pytest.skip("this store has no folder markers")
        await put("marked/", b"")
        await put("marked/inside", b"x")
        listing = await list_all(store, "marked/")
        assert [info.key for info in listing.objects if info.key != "marked/"] == ["marked/inside"]
        assert listing.prefixes == []
        assert "marked/" in (await list_all(store, "")).prefixes

    async def test_odd_keys_are_exact(self, store: UnderStore, put: Put) -> None:
        """Every key that the store can hold is listed, found and read as it is spelled."""
        for key in self.odd_keys:
            await put("odd/" + key, key.encode(errors="surrogateescape"))
        found = await self._walk(store, "odd/")
        assert sorted(found) == sorted("odd/" + key for key in self.odd_keys)
        for key in self.odd_keys:
            info = await store.head("odd/" + key)
            assert info == found["odd/" + key]
            assert await read_all(store, info) == key.encode(errors="surrogateescape")

    async def _walk(self, store: UnderStore, prefix: str) -> dict[str, ObjectInfo]:
        listing = await list_all(store, prefix)
        found = {info.key: info for info in listing.objects}
        for below in listing.prefixes:
            assert below.startswith(prefix)
            assert below.endswith("/")
            found.update(await self._walk(store, below))
        return found

    # read

    @pytest.mark.parametrize(("start", "stop"), READ_EDGES)
    async def test_read_returns_exactly_the_range(self, store: UnderStore, put: Put, start: int, stop: int) -> None:
        """A read returns the bytes of its range, no more and no fewer, as a buffer whose len() counts them."""
        await put("pattern", PATTERN)
        info = await store.head("pattern")
        data = await store.read(info, ByteRange(start, stop))
        assert len(data) == stop - start
        assert bytes(data) == PATTERN[start:stop]

    async def test_listed_object_can_be_read(self, store: UnderStore, put: Put) -> None:
        """What the listing said is enough to read: no `head` in between."""
        await put("listed/object", PATTERN)
        listing = await list_all(store, "listed/")
        assert await read_all(store, listing.objects[0]) == PATTERN

    async def test_replaced_object_is_stale(self, store: UnderStore, put: Put) -> None:
        """A read of a version that has been replaced raises StaleObjectError, whatever the size of the new one."""
        for new in (b"B" * 100, b"B" * 50, b"B" * 200, b""):
            await put("replaced", b"A" * 100)
            info = await store.head("replaced")
            await put("replaced", new)
            with pytest.raises(StaleObjectError):
                await store.read(info, ByteRange(10, 40))

    async def test_deleted_object_is_stale(self, store: UnderStore, put: Put, delete: Delete) -> None:
        """A read of an object that has been deleted raises StaleObjectError."""
        await put("deleted", PATTERN)
        info = await store.head("deleted")
        await delete("deleted")
        with pytest.raises(StaleObjectError):
            await store.read(info, ByteRange(0, 10))
        with pytest.raises(NotFoundError):
            await store.head("deleted")

    async def test_new_version_reads_after_a_replacement(self, store: UnderStore, put: Put) -> None:
        """Looking again gives the new version, and it reads."""
        await put("renewed", b"old bytes")
        await store.head("renewed")
        await put("renewed", b"new bytes!")
        assert await read_all(store, await store.head("renewed")) == b"new bytes!"

    # many at a time, cancel, names

    async def test_reads_do_not_disturb_one_another(self, store: UnderStore, put: Put) -> None:
        """Many reads at a time of many objects each return their own bytes."""
        for index in range(5):
            await put(f"par/{index}", bytes([index]) * 1000 + PATTERN)
        infos = [await store.head(f"par/{index}") for index in range(5)]
        wanted = [(index % 5, ByteRange(start := index * 37, start + 900)) for index in range(40)]
        found = await asyncio.gather(*(store.read(infos[index], span) for index, span in wanted))
        for (index, span), data in zip(wanted, found, strict=True):
            assert bytes(data) == (bytes([index]) * 1000 + PATTERN)[span.start : span.stop]

    async def test_cancelled_calls_leave_the_store_whole(self, store: UnderStore, put: Put) -> None:
        """A cancelled read or head ends as cancelled, and the next call works."""
        await put("cancelled", PATTERN)
        info = await store.head("cancelled")
        calls: list[Coroutine[Any, Any, object]] = [store.read(info, ByteRange(0, 100)) for _ in range(4)]
        tasks = [asyncio.ensure_future(call) for call in [*calls, store.head("cancelled")]]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in ended)
        assert await read_all(store, info) == PATTERN

    async def test_probe_accepts_the_root(self, store: UnderStore, put: Put) -> None:
        """`probe` returns for a store that can be reached."""
        await put("something", b"x")
        await store.probe()

    async def test_store_id_names_the_store_and_no_secret(self, store: UnderStore) -> None:
        """The id is one line without NUL, and holds no word of the credentials."""
        assert store.store_id
        assert store.store_id.isprintable()
        assert "secret" not in store.store_id.lower()

    async def test_store_keeps_the_contract_by_type(self, store: UnderStore) -> None:
        """The store has every method of the protocol."""
        assert isinstance(store, UnderStore)
