"""The block store: what is written is read, by anybody, until it is evicted; and never anything else."""

# Over 500 lines: one store, one fixture, thirty-six claims that are read together; its parts would share every helper.
from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.blocks.accounts import CacheFullError
from orchestra.blocks.disk import LocalDisk
from orchestra.blocks.formats import SEAL_ATTRIBUTE
from orchestra.blocks.reader import CorruptBlockError
from orchestra.blocks.rules import Origin
from orchestra.values import ByteRange
from tests.support.cache import BLOCK, EXTENT, LATER_BOOT, Cache, data_of, digest_of, full_disk
from tests.support.disks import HookedDisk, failing, without_attributes
from tests.support.ram import ram_folder


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


SIZES = [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, EXTENT - 1, EXTENT, EXTENT + 1, 3 * EXTENT + BLOCK + 7]


@pytest.mark.parametrize("size", SIZES)
def test_what_was_written_is_read(tmp_path: Path, size: int) -> None:
    """Objects of every size beside a border come back byte for byte, and the accounts say what the files are."""
    cache = Cache(tmp_path)
    data = data_of("a", size)
    cache.put("a", data)
    assert cache.get("a", size) == data
    assert cache.missing("a", size) == []
    cache.check()


def test_an_empty_object_is_always_here(tmp_path: Path) -> None:
    """There is nothing to write and nothing to miss."""
    cache = Cache(tmp_path)
    assert cache.get("empty", 0) == b""
    assert cache.missing("empty", 0) == []
    assert cache.open("empty", 0).complete_fd() is None


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (BLOCK - 1, BLOCK + 1), (EXTENT - 1, EXTENT + 1), (5, 2 * EXTENT)])
def test_any_range_is_read(tmp_path: Path, start: int, stop: int) -> None:
    """Ranges inside a block and across blocks and extents are the object's bytes there, and short only at its end."""
    cache = Cache(tmp_path)
    data = data_of("a", 2 * EXTENT + 5)
    cache.put("a", data)
    local = cache.open("a", len(data))
    buffer = bytearray(stop - start)
    assert local.readinto(start, memoryview(buffer)) == stop - start
    assert bytes(buffer) == data[start:stop]
    tail = bytearray(100)
    assert local.readinto(len(data) - 3, memoryview(tail)) == 3
    assert bytes(tail[:3]) == data[-3:]
    assert local.readinto(len(data), memoryview(tail)) == 0
    local.close()


def test_a_small_object_is_a_plain_file(tmp_path: Path) -> None:
    """Its file holds exactly its bytes and appears whole, by a rename."""
    cache = Cache(tmp_path)
    data = data_of("a", 100)
    cache.put("a", data)
    path = Path(cache.layout.small_file(digest_of("a")))
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o600


def test_blocks_come_in_any_order(tmp_path: Path) -> None:
    """A reader sees each block from the moment it is written, also through an extent that it opened before."""
    cache = Cache(tmp_path)
    data = data_of("a", EXTENT)
    cache.put_block("a", data, 2)
    local = cache.open("a", EXTENT)
    assert local.missing_blocks(ByteRange(0, EXTENT)) == [0, 1, 3]
    assert local.cached_bytes() == BLOCK
    assert local.complete_fd() is None
    buffer = memoryview(bytearray(BLOCK))
    assert local.readinto(0, buffer) is None
    for block in (0, 3, 1):
        cache.put_block("a", data, block)
        assert local.readinto(block * BLOCK, buffer) == BLOCK
        assert bytes(buffer) == data[block * BLOCK : (block + 1) * BLOCK]
    assert local.missing_blocks(ByteRange(0, EXTENT)) == []
    descriptor = local.complete_fd()
    assert descriptor is not None
    assert os.pread(descriptor, EXTENT, 0) == data
    local.close()


def test_an_object_of_several_extents_has_no_single_file(tmp_path: Path) -> None:
    """Only what lies in one file can be handed to the kernel."""
    cache = Cache(tmp_path)
    data = data_of("a", EXTENT + 1)
    cache.put("a", data)
    local = cache.open("a", len(data))
    assert local.complete_fd() is None
    assert local.cached_bytes() == len(data)
    local.close()


def test_writing_a_block_twice_counts_it_once(tmp_path: Path) -> None:
    """A block that is there already costs no room."""
    cache = Cache(tmp_path)
    small, large = data_of("s", 100), data_of("l", EXTENT)
    for _ in range(3):
        cache.put("s", small)
        cache.put("l", large)
    assert cache.accounts.used_bytes == BLOCK + EXTENT
    cache.check()


def test_objects_of_other_sizes_and_names_are_not_found(tmp_path: Path) -> None:
    """A file answers for the object that it holds: not for another name, nor for another size under the same name."""
    cache = Cache(tmp_path)
    cache.put("a", data_of("a", 100))
    cache.put("b", data_of("b", EXTENT))
    assert cache.get("c", 100) is None
    assert cache.get("a", 99) is None
    assert cache.get("b", EXTENT - 1) is None
    assert cache.get("b", EXTENT + 1) is None


# -- eviction ----------------------------------------------------------------------------------------------------


def test_the_cache_never_holds_more_than_it_may(tmp_path: Path) -> None:
    """However much comes in, the limit holds after every write, and what came last is there."""
    cache = Cache(tmp_path, capacity_bytes=10 * BLOCK)
    for index in range(50):
        size = (index * 1777) % (3 * BLOCK) + 1
        name = f"o{index}"
        cache.put(name, data_of(name, size))
        assert cache.accounts.used_bytes <= 10 * BLOCK
        assert cache.get(name, size) == data_of(name, size)
        cache.check()
    assert cache.store.statistics().evicted_count > 20


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    """A read, told by `touch`, saves an object; whole extents go, not blocks."""
    cache = Cache(tmp_path, capacity_bytes=3 * EXTENT)
    for name in "abc":
        cache.put(name, data_of(name, EXTENT))
    cache.store.touch(digest_of("a"), 0)
    cache.put("d", data_of("d", 1))
    assert [cache.missing(name, EXTENT) for name in "abc"] == [[], [0, 1, 2, 3], []]


def test_the_extents_of_an_object_leave_one_by_one(tmp_path: Path) -> None:
    """An object larger than the cache keeps what fits of it."""
    cache = Cache(tmp_path, capacity_bytes=2 * EXTENT)
    data = data_of("a", 4 * EXTENT)
    cache.put("a", data)
    assert cache.missing("a", len(data)) == list(range(8))
    cache.check()


def test_the_free_space_floor_evicts(tmp_path: Path) -> None:
    """A disk that others fill shrinks the cache, whatever its own limit says."""
    free = [100 * BLOCK]
    cache = Cache(
        tmp_path,
        free_space_ratio=0.1,
        statvfs=lambda: full_disk(free_bytes=free[0], total_bytes=500 * BLOCK)(),
    )
    for name in "abcd":
        cache.put(name, data_of(name, BLOCK))
    free[0] = 49 * BLOCK
    cache.put("e", data_of("e", BLOCK))
    assert [cache.missing(name, BLOCK) for name in "abcde"] == [[0], [0], [], [], []]


def test_on_a_disk_that_others_filled_nothing_is_kept_and_nothing_lost(tmp_path: Path) -> None:
    """When evicting everything would not help, the write is refused and the cache stays as it is."""
    free = [100 * BLOCK]
    cache = Cache(
        tmp_path,
        free_space_ratio=0.1,
        statvfs=lambda: full_disk(free_bytes=free[0], total_bytes=500 * BLOCK)(),
    )
    cache.put("a", data_of("a", BLOCK))
    free[0] = 0
    with pytest.raises(CacheFullError):
        cache.put("b", data_of("b", BLOCK))
    assert cache.get("a", BLOCK) == data_of("a", BLOCK)
    cache.check()


def test_a_block_of_several_writes_is_whole(tmp_path: Path) -> None:
    """What goes to the disk in pieces lies where it belongs, to the last byte."""
    data = data_of("a", 700_001)
    with (tmp_path / "file").open("w+b") as file:
        LocalDisk().write_at(file.fileno(), data, 5)
        assert file.read() == bytes(5) + data


def test_what_is_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    """A block that could never fit evicts nothing."""
    cache = Cache(tmp_path, capacity_bytes=BLOCK)
    cache.put("a", data_of("a", 1))
    cache.accounts.reserve(BLOCK)
    assert not cache.offer("b", data_of("b", BLOCK), 0, Origin("store", "b"))
    assert cache.get("a", 1) == data_of("a", 1)
    cache.accounts.settle(BLOCK)
    assert cache.offer("b", data_of("b", BLOCK), 0, Origin("store", "b"))


def test_an_open_reader_keeps_valid_bytes(tmp_path: Path) -> None:
    """Eviction unlinks: who has the file open reads on, through the reader and through the bare descriptor."""
    cache = Cache(tmp_path, capacity_bytes=EXTENT)
    data = data_of("a", EXTENT)
    cache.put("a", data)
    local = cache.open("a", EXTENT)
    descriptor = local.complete_fd()
    assert descriptor is not None
    cache.put("b", data_of("b", EXTENT))
    assert cache.get("a", EXTENT) is None
    buffer = bytearray(EXTENT)
    assert local.readinto(0, memoryview(buffer)) == EXTENT
    assert bytes(buffer) == data
    assert os.pread(descriptor, EXTENT, 0) == data
    local.close()


def test_an_extent_evicted_and_filled_again_is_another(tmp_path: Path) -> None:
    """Who opened the first incarnation does not take the marks of the second for its own, and finds it by `forget`."""
    cache = Cache(tmp_path)
    data = data_of("a", EXTENT)
    cache.put_block("a", data, 0)
    local = cache.open("a", EXTENT)
    assert local.missing_blocks(ByteRange(0, EXTENT)) == [1, 2, 3]
    assert cache.store.remove(digest_of("a"), EXTENT) == BLOCK
    cache.put_block("a", data, 3)
    assert local.missing_blocks(ByteRange(0, EXTENT)) == [1, 2, 3]
    buffer = memoryview(bytearray(BLOCK))
    assert local.readinto(3 * BLOCK, buffer) is None, "marks of the new map, bytes of the old file"
    local.forget()
    assert local.missing_blocks(ByteRange(0, EXTENT)) == [0, 1, 2]
    assert local.readinto(3 * BLOCK, buffer) == BLOCK
    assert bytes(buffer) == data[3 * BLOCK :]
    local.close()


def test_a_map_beside_another_incarnation_of_its_extent_marks_nothing(tmp_path: Path) -> None:
    """A reader that opens the extent before an eviction and the map after it sees two inodes, and no bytes."""
    cache = Cache(tmp_path)
    data = data_of("a", EXTENT)
    cache.put("a", data)
    path = cache.layout.extent_file(digest_of("a"), 0)
    os.rename(path, f"{tmp_path}/old")
    Path(path).write_bytes(bytes(EXTENT))
    assert cache.get("a", EXTENT) is None


def test_removing_an_object_frees_its_bytes(tmp_path: Path) -> None:
    """All its extents go, and what they held is told."""
    cache = Cache(tmp_path)
    cache.put("a", data_of("a", 2 * EXTENT + 1))
    cache.put("b", data_of("b", 10))
    assert cache.store.remove(digest_of("a"), 2 * EXTENT + 1) == 2 * EXTENT + BLOCK
    assert cache.store.remove(digest_of("b"), 10) == BLOCK
    assert cache.store.remove(digest_of("c"), 10) == 0
    assert cache.accounts.used_bytes == 0
    cache.check()


def test_an_extent_removed_under_its_writer_is_written_again(tmp_path: Path) -> None:
    """A block whose extent was dropped between its bytes and its mark goes into the next one; nothing is counted
    twice."""
    data = data_of("a", EXTENT)
    disk = HookedDisk()
    cache = Cache(tmp_path, disk=disk)
    cache.put_block("a", data, 0)

    def spoil(operation: str, _: int) -> None:
        if operation == "write_at":
            disk.before = lambda operation, number: None
            Path(cache.layout.extent_file(digest_of("a"), 0)).write_bytes(b"not what the map says")
            assert cache.verify("a", EXTENT)

    disk.before = spoil
    cache.put_block("a", data, 1)
    assert cache.missing("a", EXTENT) == [0, 2, 3]
    assert cache.store.statistics().corrupt_count > 0
    cache.put("a", data)
    assert cache.get("a", EXTENT) == data
    cache.check()


def test_many_threads_write_at_once(tmp_path: Path) -> None:
    """Four writers into the same few extents of a small cache: the limit holds, every byte that is found is right."""
    cache = Cache(tmp_path, capacity_bytes=4 * EXTENT)
    objects = {name: data_of(name, 2 * EXTENT + 99) for name in "abcd"}
    objects |= {name: data_of(name, 500) for name in "stuv"}
    wrong: list[str] = []
    barrier = threading.Barrier(4)

    def write(first: int) -> None:
        barrier.wait()
        for turn in range(40):
            name = "abcdstuv"[(first + turn * 3) % 8]
            with contextlib.suppress(CacheFullError):  # all that is held may be in use by the other writers
                cache.put(name, objects[name])
            for one, data in objects.items():
                found = cache.get(one, len(data))
                if found is not None and found != data:
                    wrong.append(one)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.accounts.used_bytes <= 4 * EXTENT
    assert cache.store.close()
    cache.check()


# -- a disk that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["create", "write_at", "set_length", "rename"])
@pytest.mark.parametrize("size", [100, EXTENT])
@pytest.mark.parametrize("at", [1, 2])
def test_a_disk_that_fails_costs_the_block(tmp_path: Path, operation: str, size: int, at: int) -> None:
    """An I/O error at any step is told to the caller; nothing half is left, and the next try may succeed."""
    disk = failing(operation, errno.EIO, at=at, times=1)
    cache = Cache(tmp_path, disk=disk)
    data = data_of("a", size)
    for _ in range(3):
        try:
            cache.put("a", data)
            break
        except OSError as error:
            assert error.errno == errno.EIO
            assert cache.get("a", size) is None
            cache.check()
    assert cache.get("a", size) == data
    cache.check()


@pytest.mark.parametrize("size", [100, EXTENT])
def test_a_full_disk_evicts_and_goes_on(tmp_path: Path, size: int) -> None:
    """When the disk says that it is full although the accounts see room, the oldest leave and the block is written."""
    disk = HookedDisk()
    cache = Cache(tmp_path, disk=disk)
    cache.put("old", data_of("old", EXTENT))
    full = failing("write_at", errno.ENOSPC, times=1)
    disk.before = full.before
    cache.put("new", data_of("new", size))
    assert cache.get("new", size) == data_of("new", size)
    assert cache.get("old", EXTENT) is None
    cache.check()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("operation", ["create", "write_at", "rename"])
@pytest.mark.parametrize("size", [100, EXTENT])
def test_a_disk_that_stays_full_refuses(tmp_path: Path, operation: str, size: int, error: int) -> None:
    """With nothing left to evict the store says that the cache is full; nothing stays behind that nobody counts."""
    cache = Cache(tmp_path, disk=failing(operation, error))
    with pytest.raises(CacheFullError, match="disk is full"):
        cache.put("a", data_of("a", size))
    assert cache.accounts.used_bytes == 0
    assert cache.accounts.reserved_bytes == 0
    cache.check()


def test_a_full_disk_in_the_middle_of_an_extent_keeps_what_was_there(tmp_path: Path) -> None:
    """Blocks written before the disk was full stay readable; the one that failed is missing."""
    disk = HookedDisk()
    cache = Cache(tmp_path, disk=disk)
    data = data_of("a", EXTENT)
    cache.put_block("a", data, 0)
    disk.before = failing("write_at", errno.ENOSPC).before
    with pytest.raises(CacheFullError):
        cache.put_block("a", data, 1)
    assert cache.missing("a", EXTENT) == [1, 2, 3]
    disk.before = lambda operation, number: None
    cache.put_block("a", data, 1)
    assert cache.missing("a", EXTENT) == [2, 3]
    cache.check()


def test_without_extended_attributes_seals_lie_beside(tmp_path: Path) -> None:
    """On a file system without them a small object is as safe: sealed, verified after a reboot, removed with its
    seal."""
    data = data_of("a", 100)
    cache = Cache(tmp_path, disk=without_attributes())
    cache.put("a", data)
    assert cache.get("a", 100) == data
    seal = Path(cache.layout.small_file(digest_of("a")) + ".seal")
    assert seal.exists()
    cache.close()
    cache = Cache(tmp_path, boot_id=LATER_BOOT, disk=without_attributes())
    assert cache.get("a", 100) is None
    assert cache.verify("a", 100) == 0
    assert cache.get("a", 100) == data
    cache.close()
    cache = Cache(tmp_path, boot_id=LATER_BOOT)
    assert cache.store.remove(digest_of("a"), 100) == BLOCK
    assert not seal.exists()
    cache.check()


# -- restarts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_clean", [True, False])
def test_everything_is_there_after_a_restart(tmp_path: Path, is_clean: bool) -> None:
    """Stopped or killed, the next daemon of the same boot holds and serves what its predecessor did."""
    objects = {f"o{size}": data_of(f"o{size}", size) for size in SIZES}
    first = Cache(tmp_path)
    for name, data in objects.items():
        first.put(name, data)
    first.put_block("part", data_of("part", EXTENT), 2)
    used = first.accounts.used_bytes
    first.close() if is_clean else first.crash()
    second = Cache(tmp_path)
    assert second.was_clean is is_clean
    for name, data in objects.items():
        assert second.get(name, len(data)) == data
    assert second.missing("part", EXTENT) == [0, 1, 3]
    assert second.accounts.used_bytes == used
    second.check()


@pytest.mark.parametrize("is_clean", [True, False])
def test_what_was_ready_when_a_daemon_ended_is_kept(tmp_path: Path, is_clean: bool) -> None:
    """A small object that was written and sealed, and not yet in its place, is neither lost nor forgotten by the
    accounts; what is no whole small object goes."""
    first = Cache(tmp_path)
    data = data_of("small", 1000)
    files = first.store._files
    with files.small_ready(digest_of("small"), data), files.small_ready(digest_of("cut"), data) as cut:
        pass
    os.truncate(cut.path, 999)
    with files.small_ready(digest_of("large"), data_of("large", EXTENT)):
        pass
    (first.layout.tmp / "unsealed").write_bytes(data)
    os.mkfifo(first.layout.tmp / "fifo")
    first.close() if is_clean else first.crash()
    second = Cache(tmp_path)
    assert second.get("small", 1000) == data
    assert second.accounts.names() == [digest_of("small")]
    assert os.listdir(second.layout.tmp) == []
    second.check()


def test_a_cache_that_holds_exactly_what_is_written_lets_nothing_leave(tmp_path: Path) -> None:
    """An object that is written while another has just been put in its place finds the room that was left for it."""
    data = {name: data_of(name, 1000) for name in ("first", "second")}
    disk = HookedDisk()
    cache = Cache(tmp_path, capacity_bytes=2 * BLOCK, disk=disk)

    def before(operation: str, number: int) -> None:
        if operation == "close" and os.path.exists(cache.layout.small_file(digest_of("first"))):
            disk.before = lambda operation, number: None
            cache.put("second", data["second"])

    disk.before = before
    cache.put("first", data["first"])
    assert [cache.get(name, 1000) for name in data] == list(data.values())
    assert cache.store.statistics().evicted_count == 0
    cache.check()


@pytest.mark.parametrize("is_damaged", [False, True], ids=["freed", "damaged"])
def test_what_was_removed_when_a_daemon_was_killed_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    """A small object that was freed, or found damaged, is gone also if the daemon dies before the last step of that."""
    first = Cache(tmp_path)
    data = data_of("small", 1000)
    first.put("small", data)
    monkeypatch.setattr(first.store._files, "unlink", lambda paths: None)
    if is_damaged:
        Path(first.layout.small_file(digest_of("small"))).write_bytes(bytes(1000))
        assert first.verify("small", 1000) == 1
    else:
        assert first.store.remove(digest_of("small"), 1000)
    assert os.listdir(first.layout.tmp) != []
    first.crash()
    second = Cache(tmp_path)
    assert second.get("small", 1000) is None
    assert os.listdir(second.layout.tmp) == []
    second.check()


def test_a_folder_in_the_place_of_a_seal_is_no_seal(tmp_path: Path) -> None:
    """Neither a reader nor a daemon that starts stumbles over it: the object is missing, and is written again."""
    first = Cache(tmp_path)
    data = data_of("small", 1000)
    first.put("small", data)
    place = first.layout.small_file(digest_of("small"))
    os.removexattr(place, SEAL_ATTRIBUTE)
    for unsealed in (Path(place), first.layout.tmp / "ready"):
        unsealed.write_bytes(data)
        Path(f"{unsealed}.seal").mkdir()
    first.crash()
    second = Cache(tmp_path)
    assert second.get("small", 1000) is None
    second.put("small", data)
    assert second.get("small", 1000) == data


def test_an_extent_is_filled_on_after_a_restart(tmp_path: Path) -> None:
    """Blocks that a killed daemon wrote are kept; the rest is added to the same file."""
    data = data_of("a", EXTENT)
    first = Cache(tmp_path)
    first.put_block("a", data, 2)
    first.crash()
    inode = os.stat(first.layout.extent_file(digest_of("a"), 0)).st_ino
    second = Cache(tmp_path)
    for block in (0, 1, 3):
        second.put_block("a", data, block)
    assert second.get("a", EXTENT) == data
    assert os.stat(second.layout.extent_file(digest_of("a"), 0)).st_ino == inode
    second.check()


def test_a_lost_index_costs_only_the_order_of_use(tmp_path: Path) -> None:
    """Without the index the files are counted, and all are served."""
    first = Cache(tmp_path)
    first.put("a", data_of("a", EXTENT))
    first.put("b", data_of("b", 10))
    first.close()
    for path in tmp_path.glob("index*"):
        path.unlink()
    second = Cache(tmp_path)
    assert not second.was_clean
    assert second.get("a", EXTENT) == data_of("a", EXTENT)
    assert second.get("b", 10) == data_of("b", 10)
    second.check()


def test_the_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    """What was used last before the restart is evicted last after it."""
    first = Cache(tmp_path)
    for name in "abc":
        first.put(name, data_of(name, EXTENT))
    first.store.touch(digest_of("a"), 0)
    first.close()
    second = Cache(tmp_path, capacity_bytes=3 * EXTENT)
    second.put("d", data_of("d", 2 * EXTENT))
    assert [bool(second.missing(name, EXTENT)) for name in "abc"] == [False, True, True]


def test_an_index_that_lags_is_brought_in_line(tmp_path: Path) -> None:
    """What was written or removed after the last flush before a crash is counted from the files."""
    first = Cache(tmp_path)
    first.put("gone", data_of("gone", 10))
    first.put_block("grown", data_of("grown", EXTENT), 0)
    assert first.store.flush()
    first.store.remove(digest_of("gone"), 10)
    first.put_block("grown", data_of("grown", EXTENT), 1)
    first.put("new", data_of("new", 10))
    first.crash()
    second = Cache(tmp_path)
    assert second.accounts.used_bytes == 3 * BLOCK
    second.check()


# -- another boot, and rot ---------------------------------------------------------------------------------------


def test_a_doubted_extent_that_cannot_be_opened_stays(tmp_path: Path) -> None:
    """It may be only for now, and what another node doubts came from an open one; nobody's doubt drops it, a check of
    all that is here does."""
    cache = Cache(tmp_path)
    cache.put("a", data_of("a", EXTENT))
    Path(cache.layout.map_file(digest_of("a"), 0)).rename(tmp_path / "map")
    assert cache.store.verify(digest_of("a"), EXTENT, 0, is_doubted=True) == 0
    assert cache.store.holds(digest_of("a"), EXTENT, 0)
    (tmp_path / "map").rename(cache.layout.map_file(digest_of("a"), 0))
    assert cache.get("a", EXTENT) == data_of("a", EXTENT)
    Path(cache.layout.map_file(digest_of("a"), 0)).unlink()
    assert cache.verify("a", EXTENT) == 1
    assert not cache.store.holds(digest_of("a"), EXTENT, 0)


@pytest.mark.parametrize("size", [100, EXTENT + 1])
def test_after_a_reboot_bytes_are_verified_before_their_first_use(tmp_path: Path, size: int) -> None:
    """What another boot wrote is missing until it was checked, and then vouched for in this boot."""
    data = data_of("a", size)
    first = Cache(tmp_path)
    first.put("a", data)
    first.crash()
    second = Cache(tmp_path, boot_id=LATER_BOOT)
    assert second.get("a", size) is None
    assert second.verify("a", size) == 0
    assert second.get("a", size) == data
    second.crash()
    assert Cache(tmp_path, boot_id=LATER_BOOT).get("a", size) == data


@pytest.mark.parametrize("size", [100, EXTENT])
def test_what_a_power_loss_zeroed_is_found(tmp_path: Path, size: int) -> None:
    """Pages that never reached the disk read as zeros after the reboot: the file is dropped, not served."""
    first = Cache(tmp_path)
    first.put("a", data_of("a", size))
    first.put("b", data_of("b", size))
    first.crash()
    layout, digest = first.layout, digest_of("a")
    path = Path(layout.small_file(digest) if size <= BLOCK else layout.extent_file(digest, 0))
    with path.open("r+b") as file:
        file.write(bytes(min(size, 4096)))
    second = Cache(tmp_path, boot_id=LATER_BOOT)
    assert second.verify("a", size) == 1
    assert second.verify("b", size) == 0
    assert second.get("a", size) is None
    assert second.get("b", size) == data_of("b", size)
    assert second.store.statistics().corrupt_count == 1
    second.check()


def test_an_extent_of_another_boot_is_not_filled_on_unverified(tmp_path: Path) -> None:
    """Writing into it begins a new one: marks of two boots never stand in one map."""
    data = data_of("a", EXTENT)
    first = Cache(tmp_path)
    first.put_block("a", data, 0)
    first.crash()
    second = Cache(tmp_path, boot_id=LATER_BOOT)
    second.put_block("a", data, 1)
    assert second.missing("a", EXTENT) == [0, 2, 3]
    second.check()


def flip(path: str, at: int) -> None:
    with Path(path).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x01]))


def test_a_whole_small_object_is_checked_on_every_read(tmp_path: Path) -> None:
    """A flipped bit is noticed whenever the object is read whole, which small ones are."""
    cache = Cache(tmp_path)
    cache.put("a", data_of("a", 1000))
    flip(cache.layout.small_file(digest_of("a")), 500)
    local = cache.open("a", 1000)
    with pytest.raises(CorruptBlockError):
        local.read_small()
    with pytest.raises(CorruptBlockError):
        local.readinto(0, memoryview(bytearray(1000)))
    assert cache.verify("a", 1000) == 1
    local.forget()
    assert local.read_small() is None
    local.close()


@pytest.mark.parametrize("size", [1000, 2 * EXTENT])
@pytest.mark.parametrize("at", [0, 500, 999])
def test_verify_always_notices_every_flip(tmp_path: Path, size: int, at: int) -> None:
    """With verify = "always" also a read of a few bytes checks the whole block that holds them, and the kernel gets no
    file to read by itself."""
    cache = Cache(tmp_path)
    cache.put("a", data_of("a", size))
    local = cache.open("a", size, verify_always=True)
    buffer = memoryview(bytearray(10))
    assert local.readinto(700, buffer) == 10
    assert local.complete_fd() is None
    path = cache.layout.small_file(digest_of("a"))
    flip(path if size <= BLOCK else cache.layout.extent_file(digest_of("a"), 0), at)
    with pytest.raises(CorruptBlockError):
        local.readinto(700, buffer)
    local.close()


def test_threads_share_a_reader(tmp_path: Path) -> None:
    """Many threads may read through one object while its extents are evicted and filled again: each read is right or
    a miss."""
    cache = Cache(tmp_path)
    data = data_of("a", 2 * EXTENT)
    cache.put("a", data)
    local = cache.open("a", len(data))
    wrong: list[int] = []
    hits: list[int] = []
    stop = threading.Event()

    def read(seed: int) -> None:
        offset = seed
        while not stop.is_set():
            offset = (offset * 31 + 7) % (len(data) - 5000)
            buffer = bytearray(5000)
            if local.readinto(offset, memoryview(buffer)) is None:
                local.forget()
            elif bytes(buffer) == data[offset : offset + 5000]:
                hits.append(offset)
            else:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        cache.store.remove(digest_of("a"), len(data))
        cache.put("a", data)
    stop.set()
    for thread in threads:
        thread.join()
    local.close()
    assert not wrong
    assert hits
