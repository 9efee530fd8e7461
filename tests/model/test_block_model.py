"""The block store and its readers beside a dict, step by step: writes, reads, evictions, restarts, crashes, reboots;
under every eviction policy, with pins, quotas, ages and others who fill the disk.

The dict says what every object's bytes are. The cache may have less of them, never others; what its accounts say is
what the files are; and every limit holds after every step, whatever the policy. Blocks are 4 KiB and extents 16 KiB,
the cache holds nine blocks of a disk of sixteen, of which two stay free. Half of the objects are of each of two stores.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestra.blocks.accounts import CacheFullError
from orchestra.blocks.eviction import POLICIES
from orchestra.blocks.reader import LocalObject
from orchestra.blocks.rules import Origin, SpaceRules, StoreRule
from orchestra.clock import ManualClock
from orchestra.values import ByteRange
from tests.support.cache import BLOCK, EXTENT, Cache, data_of, digest_of, full_disk

SIZES = {
    "empty": 0,
    "byte": 1,
    "block": BLOCK,
    "two": BLOCK + 1,
    "extent": EXTENT,
    "three": 2 * EXTENT + BLOCK + 7,
}
OBJECTS = {name: data_of(name, size) for name, size in SIZES.items()}
CAPACITY = 9 * BLOCK
NAMES = st.sampled_from([name for name in SIZES if name != "empty"])
DISK = 16 * BLOCK
FLOOR_RATIO = 2 / 16
ORIGINS = {name: Origin(f"store{number % 2}", f"folder/{name}") for number, name in enumerate(SIZES)}
PINS = [("store0", ""), ("store1", "folder"), ("store0", "folder/block"), ("store1", "folder/three"), ("other", "")]


class BlockMachine(RuleBasedStateMachine):
    """One cache directory through its life."""

    def __init__(self) -> None:
        super().__init__()
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.root = Path(tempfile.mkdtemp(prefix="orc-model-", dir=base))
        self.boot = 1
        self.opened: list[tuple[str, LocalObject]] = []
        self.clock = ManualClock()
        self.asked = SpaceRules()
        self.others_bytes = 0  # what others have on the disk
        self.pinned: set[str] = set()  # extents that may not leave
        self.eviction = "lru"
        self.cache = self._start()

    def _start(self) -> Cache:
        """Start as a daemon does: with the rules that were given, and with owners found again."""
        cache = self.cache = Cache(
            self.root,
            capacity_bytes=CAPACITY,
            free_space_ratio=FLOOR_RATIO,
            statvfs=self._statvfs,
            boot_id=bytes([self.boot]) * 16,
            eviction=self.eviction,
            clock=self.clock,
        )
        cache.store.space.learn({digest_of(name): origin for name, origin in ORIGINS.items()})
        cache.store.space.set_rules(self.asked)
        cache.store.keep_limits()
        return cache

    def _statvfs(self) -> os.statvfs_result:
        free = DISK - self.others_bytes - self.cache.accounts.used_bytes
        return full_disk(free_bytes=max(0, free), total_bytes=DISK)()

    @initialize(warm=st.booleans(), eviction=st.sampled_from(sorted(POLICIES)))
    def begin(self, warm: bool, eviction: str) -> None:
        self.eviction = eviction
        self.restart()
        if warm:
            self.write_whole("extent")

    # -- who may have how much -------------------------------------------------------------------------------------

    @rule(
        pins=st.sets(st.sampled_from(PINS), max_size=2),
        quotas=st.lists(st.none() | st.integers(1, 9), min_size=2, max_size=2),
        ttls=st.lists(st.none() | st.integers(1, 50), min_size=2, max_size=2),
    )
    def ask(self, pins: set[tuple[str, str]], quotas: list[int | None], ttls: list[int | None]) -> None:
        """Other rules hold from now on, also for what is there."""
        stores = {
            f"store{number}": StoreRule(None if (blocks := quotas[number]) is None else blocks * BLOCK, ttls[number])
            for number in (0, 1)
        }
        self.asked = SpaceRules(frozenset(pins), stores)
        self.pinned.clear()
        self.cache.store.space.set_rules(self.asked)
        self.cache.store.keep_limits()

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds: int) -> None:
        """What outlived its age leaves, and only that."""
        self.clock.advance(seconds)
        self.cache.store.keep_limits()
        now_s = self.clock.now_ns() // 10**9
        for name in self.cache.accounts.names():
            ttl_s = self.asked.rule_of(self.cache.accounts.origin_of(name)).ttl_s
            assert (
                ttl_s is None or self.cache.accounts.is_pinned(name) or self.cache.accounts.used_s(name) + ttl_s > now_s
            )

    @rule(blocks=st.integers(0, 16))
    def fill_disk(self, blocks: int) -> None:
        """Others take space, no more than there is, or give it back."""
        self.others_bytes = min(blocks * BLOCK, DISK - self.cache.accounts.used_bytes)
        self.cache.store.keep_limits()

    @rule(name=NAMES)
    def free(self, name: str) -> None:
        """What is freed is gone, but for what is pinned."""
        origin = ORIGINS[name]
        freed = self.cache.store.space.free(lambda other: other == origin)
        is_pinned = self.asked.is_pinned(origin)
        assert not (freed.freed_bytes if is_pinned else freed.pinned_bytes)
        if not is_pinned:
            assert len(self.cache.missing(name, SIZES[name])) == self.cache.geometry.block_count(SIZES[name])

    # -- the daemon ------------------------------------------------------------------------------------------------

    @rule(name=NAMES, number=st.integers(0, 8))
    def write_block(self, name: str, number: int) -> None:
        """A block that was written is there at once, for every reader; one that is refused is not."""
        data = OBJECTS[name]
        block = number % self.cache.geometry.block_count(len(data))
        if not self.cache.offer(name, data, block, ORIGINS[name]):
            return
        span = self.cache.geometry.block_range(len(data), block)
        local = self.cache.open(name, len(data))
        buffer = bytearray(span.length)
        assert local.readinto(span.start, memoryview(buffer)) == span.length
        assert bytes(buffer) == data[span.start : span.stop]
        local.close()

    @rule(name=NAMES)
    def write_whole(self, name: str) -> None:
        for block in range(self.cache.geometry.block_count(SIZES[name])):
            self.cache.offer(name, OBJECTS[name], block, ORIGINS[name])

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        """What was removed is not found by who opens it now."""
        self.cache.store.remove(digest_of(name), SIZES[name])
        self.pinned = {pinned for pinned in self.pinned if not pinned.startswith(digest_of(name))}
        assert len(self.cache.missing(name, SIZES[name])) == self.cache.geometry.block_count(SIZES[name])

    @rule(name=NAMES, number=st.integers(0, 8))
    def touch(self, name: str, number: int) -> None:
        self.cache.store.touch(digest_of(name), number)

    @rule(blocks=st.integers(1, 9))
    def evict(self, blocks: int) -> None:
        self.cache.store.evict(blocks * BLOCK)

    @rule(name=NAMES)
    def verify(self, name: str) -> None:
        """Nothing that the cache wrote itself is ever found bad; what was verified is trusted."""
        size = SIZES[name]
        whole = range(self.cache.geometry.block_count(size))
        for _, run in self.cache.geometry.extents_of(whole):
            if self.cache.store.holds(digest_of(name), size, run.start):
                assert self.cache.store.verify(digest_of(name), size, run.start) == 0

    @rule(blocks=st.integers(10, 20))
    def too_much(self, blocks: int) -> None:
        """What the cache cannot hold is refused, and nothing leaves for it."""
        used = self.cache.accounts.used_bytes
        try:
            self.cache.accounts.choose_victims(blocks * BLOCK, ())
            raise AssertionError("there cannot be room")
        except CacheFullError:
            assert self.cache.accounts.used_bytes == used

    # -- readers ---------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(list(SIZES)), start=st.integers(0, 40_000), length=st.integers(0, 40_000))
    def read(self, name: str, start: int, length: int) -> None:
        """A new reader gets the object's bytes, or a miss."""
        local = self.cache.open(name, SIZES[name])
        self._check_read(name, local, start, length)
        local.close()

    @rule(name=st.sampled_from(list(SIZES)))
    def open_reader(self, name: str) -> None:
        """A reader may keep its files open through everything that follows."""
        if len(self.opened) < 5:
            self.opened.append((name, self.cache.open(name, SIZES[name])))

    @precondition(lambda self: self.opened)
    @rule(which=st.integers(0, 4), start=st.integers(0, 40_000), length=st.integers(0, 40_000))
    def read_on(self, which: int, start: int, length: int) -> None:
        """Also after evictions, restarts and reboots of the daemon an old reader never sees other bytes."""
        self._check_read(*self.opened[which % len(self.opened)], start, length)

    @precondition(lambda self: self.opened)
    @rule(which=st.integers(0, 4))
    def forget(self, which: int) -> None:
        """`forget` makes a reader see what a new one sees."""
        name, local = self.opened[which % len(self.opened)]
        local.forget()
        if self.boot == 1:
            whole = ByteRange(0, SIZES[name])
            fresh = self.cache.open(name, SIZES[name])
            assert local.missing_blocks(whole) == fresh.missing_blocks(whole)
            fresh.close()

    @precondition(lambda self: self.opened)
    @rule(which=st.integers(0, 4))
    def close_reader(self, which: int) -> None:
        self.opened.pop(which % len(self.opened))[1].close()

    @staticmethod
    def _check_read(name: str, local: LocalObject, start: int, length: int) -> None:
        data = OBJECTS[name]
        buffer = bytearray(length)
        count = local.readinto(start, memoryview(buffer))
        expected = data[start : start + length]
        if count is None:
            assert expected, "an empty range cannot be missing"
            assert local.missing_blocks(ByteRange(start, start + len(expected)))
        else:
            assert count == len(expected)
            assert bytes(buffer[:count]) == expected

    # -- restarts --------------------------------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        """A clean stop: the next daemon holds the same, and knows it from the index."""
        held = self._held()
        self.cache.close()
        self.cache = self._start()
        assert self.cache.was_clean
        assert self._held() == held

    @rule()
    def crash(self) -> None:
        """A kill: the next daemon holds the same, and knows it from the files."""
        held = self._held()
        self.cache.crash()
        self.cache = self._start()
        assert not self.cache.was_clean
        assert self._held() == held

    @rule()
    def reboot(self) -> None:
        """Nothing of another boot is read before it was verified."""
        self.cache.crash()
        self.boot += 1
        self.cache = self._start()
        assert all(self.cache.get(name, size) is None for name, size in SIZES.items() if size)

    def _held(self) -> dict[str, list[int]]:
        return {name: self.cache.missing(name, size) for name, size in SIZES.items()}

    # -- always ----------------------------------------------------------------------------------------------------

    @invariant()
    def the_limits_hold(self) -> None:
        """Capacity, free-space floor and quotas, as far as what is not pinned can make them hold."""
        accounts = self.cache.accounts
        assert accounts.used_bytes <= CAPACITY
        room_bytes = self.cache.store.room_bytes()
        assert room_bytes >= 0 or -room_bytes > accounts.used_bytes - accounts.pinned_bytes
        used: dict[str, int] = {}
        pinned: dict[str, int] = {}
        for name, origin in accounts.origins():
            assert origin is not None
            size_bytes = accounts.size_of(name)
            used[origin.store_id] = used.get(origin.store_id, 0) + size_bytes
            if self.asked.is_pinned(origin):
                assert accounts.is_pinned(name)
                pinned[origin.store_id] = pinned.get(origin.store_id, 0) + size_bytes
        assert used == {store: size for store, size in self.cache.store.space.used_by_store().items() if size}
        for store_id, one in self.asked.stores.items():
            if one.quota_bytes is not None:
                assert used.get(store_id, 0) <= max(one.quota_bytes, pinned.get(store_id, 0))

    @invariant()
    def the_pinned_stay(self) -> None:
        """What was here and pinned is here still."""
        accounts = self.cache.accounts
        assert self.pinned <= set(accounts.names())
        self.pinned = {name for name in accounts.names() if accounts.is_pinned(name)}

    def teardown(self) -> None:
        self.cache.check()
        for _, local in self.opened:
            local.close()
        self.cache.close()
        shutil.rmtree(self.root)


BlockMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBlocksBesideADict = pytest.mark.timeout(300)(BlockMachine.TestCase)
