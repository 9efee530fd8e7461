"""The suite that every client passes: each sentence of `orchestra.client.contract` as a test.

Owns: the promises. Leaves to others: where the bytes come from. To prove a client, subclass and give fixtures:

    class TestMyClient(ClientSuite):
        @pytest.fixture
        def put(self): ...            # (path, bytes) -> None: another writer stores an object, "/data/a/b.txt"
        @pytest.fixture
        def client(self, put): ...    # over the same tree, closed afterwards; freshness of a minute or more

"/data" exists, is a directory and is empty at first. Needs pytest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestra.client.contract import Client
from orchestra.errors import (
    IsADirectoryPathError,
    NotADirectoryPathError,
    NotFoundError,
    OrchestraError,
    UsageError,
)
from orchestra.values import EntryKind

Put = Callable[[str, bytes], object]

# No two neighbouring runs of it are alike, so a wrong offset cannot give right bytes.
PATTERN = b"".join(index.to_bytes(3, "big") for index in range(20_000))
SIZES = (0, 1, 1000, 4095, 4096, 4097, 16_384, 60_000)
RANGES = ((0, 1), (0, 60_000), (1, 2), (4095, 4097), (59_999, 60_000), (59_000, 99_000), (60_000, 60_001), (7, 7))


class ClientSuite:
    """What every client promises."""

    @pytest.fixture
    def put(self) -> Put:
        """Store an object."""
        raise NotImplementedError("give a fixture `put`")

    @pytest.fixture
    def client(self, put: Put) -> Client:
        """The client to prove."""
        raise NotImplementedError("give a fixture `client`")

    # -- entries ---------------------------------------------------------------------------------------------------

    def test_stat_tells_what_is_there(self, client: Client, put: Put) -> None:
        """A file has its path, size and a version; a directory has size 0 and version ""."""
        put("/data/d/a.bin", b"four")
        file = client.stat("/data/d/a.bin")
        assert (file.path, file.kind, file.size_bytes, file.name) == ("/data/d/a.bin", EntryKind.FILE, 4, "a.bin")
        assert file.version
        for path in ("/", "/data", "/data/d"):
            entry = client.stat(path)
            assert (entry.path, entry.kind, entry.size_bytes, entry.version) == (path, EntryKind.DIRECTORY, 0, "")

    def test_another_content_is_another_version(self, client: Client, put: Put) -> None:
        """What was written anew has a version of its own, which `refresh` sees at once."""
        put("/data/a", b"one")
        before = client.stat("/data/a")
        put("/data/a", b"three")
        after = client.stat("/data/a", refresh=True)
        assert after.size_bytes == 5
        assert after.version != before.version
        assert client.read_file("/data/a") == b"three"

    @pytest.mark.parametrize("path", ["/data/nothing", "/data/a/below", "/data/d/nothing", "/elsewhere"])
    def test_what_is_not_there_is_not_found(self, client: Client, put: Put, path: str) -> None:
        """NotFoundError, which is also FileNotFoundError, from every call."""
        put("/data/a", b"x")
        put("/data/d/b", b"x")
        for call in (client.stat, client.open, client.read_file, client.list):
            with pytest.raises(FileNotFoundError) as caught:
                call(path)
            assert isinstance(caught.value, OrchestraError)

    def test_a_trailing_slash_says_nothing(self, client: Client, put: Put) -> None:
        """A path means the same with and without it."""
        put("/data/d/a", b"x")
        assert client.stat("/data/d/") == client.stat("/data/d")
        assert list(client.list("/data/d/")) == list(client.list("/data/d"))

    @pytest.mark.parametrize("path", ["", "data", "data/a", "/data/../a", "/data/./a", "/data/a\0"])
    def test_what_can_be_no_path_is_refused(self, client: Client, path: str) -> None:
        """Relative paths, dots and NUL are usage errors from every call."""
        for call in (
            client.stat,
            client.list,
            client.open,
            client.read_file,
            client.stat_cached,
            client.stat_timed,
            client.list_cached,
        ):
            with pytest.raises(UsageError):
                call(path)

    # -- directories -----------------------------------------------------------------------------------------------

    def test_a_listing_is_sorted_and_whole(self, client: Client, put: Put) -> None:
        """Entries come in order of their names, by number, by iteration and by name; numbers count from both ends."""
        names = ["b", "a", "ab", "Z", "é", "sub", "\U00010000", "0"]
        for name in names:
            put(f"/data/l/{name}/x" if name == "sub" else f"/data/l/{name}", name.encode())
        view = client.list("/data/l")
        assert [entry.name for entry in view] == sorted(names)
        assert len(view) == len(names)
        assert [view[index] for index in range(len(view))] == list(view)
        assert view[-1] == view[len(view) - 1]
        for entry in view:
            assert view.find(entry.name) == entry
            assert entry.path == f"/data/l/{entry.name}"
            assert entry.is_directory == (entry.name == "sub")
        assert view.find("nothing") is None
        with pytest.raises(IndexError):
            view[len(view)]

    def test_a_listing_says_what_stat_says(self, client: Client, put: Put) -> None:
        """Entries of a listing are those of their paths."""
        put("/data/l/a", b"1")
        put("/data/l/d/x", b"22")
        for entry in client.list("/data/l"):
            assert client.stat(entry.path) == entry

    def test_a_listing_does_not_change(self, client: Client, put: Put) -> None:
        """What was returned stays as it was; `refresh` brings what is there now."""
        put("/data/l/a", b"1")
        before = client.list("/data/l")
        put("/data/l/b", b"2")
        after = client.list("/data/l", refresh=True)
        assert [entry.name for entry in before] == ["a"]
        assert [entry.name for entry in after] == ["a", "b"]

    def test_an_empty_directory_is_listed(self, client: Client) -> None:
        """Nothing in it is no error."""
        assert list(client.list("/data")) == []
        assert [entry.name for entry in client.list("/")] == ["data"]

    def test_a_file_is_no_directory_and_the_reverse(self, client: Client, put: Put) -> None:
        """Listing a file, and opening a directory, are errors of their own."""
        put("/data/d/a", b"x")
        with pytest.raises(NotADirectoryPathError):
            client.list("/data/d/a")
        for path in ("/", "/data", "/data/d"):
            with pytest.raises(IsADirectoryPathError):
                client.open(path)
            with pytest.raises(IsADirectoryPathError):
                client.read_file(path)

    # -- what is known without asking ------------------------------------------------------------------------------

    def test_cached_calls_send_nothing(self, client: Client, put: Put) -> None:
        """They say what the others said before, or None; never a message goes out."""
        put("/data/d/a", b"x")
        entry, view = client.stat("/data/d/a"), client.list("/data/d")
        with pytest.raises(NotFoundError):
            client.stat("/data/d/nothing")
        sent = client.messages_sent
        assert client.stat_cached("/data/d/a") == entry
        for path, known in (("/data/d/a", entry), ("/data/d", client.stat_cached("/data/d")), ("/", client.stat("/"))):
            timed = client.stat_timed(path)
            assert (timed and timed[0]) == known
            # What is left of the freshness shrinks between the two questions, by steps.
            assert timed is None or 0 <= client.freshness_s(path) <= timed[1]
        cached = client.list_cached("/data/d")
        assert cached is not None
        assert list(cached) == list(view)
        with pytest.raises(NotFoundError):
            client.stat_cached("/data/d/nothing")
        with pytest.raises(NotFoundError):
            client.stat_timed("/data/d/nothing")
        client.stat_cached("/data/unknown")
        client.list_cached("/data/unknown")
        assert client.messages_sent == sent

    def test_freshness_is_a_time(self, client: Client, put: Put) -> None:
        """Seconds, zero or more, for any path."""
        put("/data/a", b"x")
        client.stat("/data/a")
        for path in ("/", "/data", "/data/a", "/data/nothing"):
            assert client.freshness_s(path) >= 0

    # -- handles ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", SIZES)
    def test_a_file_is_read_whole(self, client: Client, put: Put, size: int) -> None:
        """Every size, through every way to read all of it, cold and warm."""
        put("/data/a", PATTERN[:size])
        for _ in range(2):
            assert client.read_file("/data/a") == PATTERN[:size]
            handle = client.open("/data/a")
            buffer = bytearray(size)
            assert handle.readinto(0, buffer) == size
            assert bytes(buffer) == PATTERN[:size]
            assert handle.read(0, size + 100) == PATTERN[:size]
            handle.close()

    @pytest.mark.parametrize(("start", "stop"), RANGES)
    def test_a_range_is_cut_at_the_end(self, client: Client, put: Put, start: int, stop: int) -> None:
        """Fewer bytes than asked for only at the object's end, none beyond it."""
        put("/data/a", PATTERN)
        assert client.read_file("/data/a", start, stop) == PATTERN[start:stop]
        assert client.read_file("/data/a", start) == PATTERN[start:]
        handle = client.open("/data/a")
        assert handle.read(start, stop - start) == PATTERN[start:stop]
        buffer = bytearray(b"?" * (stop - start))
        count = handle.readinto(start, memoryview(buffer))
        assert count == len(PATTERN[start:stop])
        assert bytes(buffer) == PATTERN[start:stop] + b"?" * (stop - start - count)
        handle.close()

    def test_a_handle_knows_what_it_opened(self, client: Client, put: Put) -> None:
        """Its entry is that of the path, or the one that it was given."""
        put("/data/a", b"one")
        entry = client.stat("/data/a")
        for handle in (client.open("/data/a"), client.open("/data/a", entry=entry)):
            assert handle.entry == entry
            handle.close()

    def test_readinto_cached_never_waits(self, client: Client, put: Put) -> None:
        """It is None or the right bytes, without a message; after a whole read it is the bytes."""
        put("/data/a", PATTERN)
        handle = client.open("/data/a")
        sent = client.messages_sent
        buffer = bytearray(1000)
        assert handle.readinto_cached(500, buffer) in (None, 1000)
        assert client.messages_sent == sent
        handle.read(0, len(PATTERN))
        sent = client.messages_sent
        assert handle.readinto_cached(500, buffer) == 1000
        assert bytes(buffer) == PATTERN[500:1500]
        assert handle.readinto_cached(len(PATTERN), buffer) == 0
        assert client.messages_sent == sent
        handle.close()

    def test_a_backing_descriptor_is_the_object(self, client: Client, put: Put) -> None:
        """None, or a file with exactly the object's bytes, which stays open until the handle is closed."""
        put("/data/a", PATTERN[:9000])
        handle = client.open("/data/a")
        handle.read(0, 9000)
        descriptor = handle.backing_fd()
        if descriptor is not None:
            assert os.pread(descriptor, 10_000, 0) == PATTERN[:9000]
            assert os.fstat(descriptor).st_size == 9000
            assert handle.backing_fd() == descriptor
        handle.close()

    def test_handles_close_twice(self, client: Client, put: Put) -> None:
        """And what one handle closes, others keep."""
        put("/data/a", PATTERN[:5000])
        one, other = client.open("/data/a"), client.open("/data/a")
        one.read(0, 10)
        one.close()
        one.close()
        assert other.read(0, 5000) == PATTERN[:5000]
        other.close()

    def test_a_handle_serves_many_threads(self, client: Client, put: Put) -> None:
        """Reads of one handle at one time do not disturb one another."""
        put("/data/a", PATTERN)
        handle = client.open("/data/a")

        def read(number: int) -> bool:
            start = (number * 7919) % (len(PATTERN) - 3000)
            return handle.read(start, 3000) == PATTERN[start : start + 3000]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(100)))
        handle.close()

    def test_many_files_are_read_in_order(self, client: Client, put: Put) -> None:
        """`read_many` gives the contents in the order of the paths, repeats included; one that fails fails all."""
        paths = [f"/data/m/{index}" for index in range(30)]
        for index, path in enumerate(paths):
            put(path, PATTERN[index : index * 100])
        asked = [*paths, *reversed(paths)]
        expected = [PATTERN[int(path.rsplit("/")[-1]) : int(path.rsplit("/")[-1]) * 100] for path in asked]
        assert list(client.read_many(asked)) == expected
        assert list(client.read_many([])) == []
        with pytest.raises(NotFoundError):
            client.read_many([paths[0], "/data/nothing", paths[1]])

    # -- life ------------------------------------------------------------------------------------------------------

    def test_a_closed_client_may_be_used_again(self, client: Client, put: Put) -> None:
        """Closing gives back what it holds; the next call begins anew."""
        put("/data/a", b"x")
        for _ in range(2):
            assert client.read_file("/data/a") == b"x"
            client.close()
            client.close()

    def test_a_client_serves_many_threads(self, client: Client, put: Put) -> None:
        """Any thread may call it."""
        for index in range(10):
            put(f"/data/t/{index}", PATTERN[index : index + 5000])

        def read(number: int) -> bool:
            index = number % 10
            found = client.list("/data/t").find(str(index))
            whole = client.read_file(f"/data/t/{index}")
            return found is not None and whole == PATTERN[index : index + 5000]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(80)))
