"""The block store and its readers beside a dict, step by step: writes, reads, evictions, restarts, crashes, reboots.

The dict says what every object's bytes are. The cache may have less of them, never others; and what its accounts say
is what the files are. Blocks are 4 KiB and extents 16 KiB, the cache holds nine blocks.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestra.blocks.accounts import CacheFullError
from orchestra.blocks.reader import LocalObject
from orchestra.values import ByteRange
from tests.support.cache import BLOCK, EXTENT, Cache, data_of, digest_of

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


class BlockMachine(RuleBasedStateMachine):
    """One cache directory through its life."""

    def __init__(self) -> None:
        super().__init__()
        base = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.root = Path(tempfile.mkdtemp(prefix="orc-model-", dir=base))
        self.boot = 1
        self.opened: list[tuple[str, LocalObject]] = []
        self.cache = self._start()

    def _start(self) -> Cache:
        return Cache(self.root, capacity_bytes=CAPACITY, boot_id=bytes([self.boot]) * 16)

    @initialize(warm=st.booleans())
    def begin(self, warm: bool) -> None:
        if warm:
            self.cache.put("extent", OBJECTS["extent"])

    # -- the daemon ------------------------------------------------------------------------------------------------

    @rule(name=NAMES, number=st.integers(0, 8))
    def write_block(self, name: str, number: int) -> None:
        """A block that was written is there at once, for every reader."""
        data = OBJECTS[name]
        block = number % self.cache.geometry.block_count(len(data))
        self.cache.put_block(name, data, block)
        span = self.cache.geometry.block_range(len(data), block)
        local = self.cache.open(name, len(data))
        buffer = bytearray(span.length)
        assert local.readinto(span.start, memoryview(buffer)) == span.length
        assert bytes(buffer) == data[span.start : span.stop]
        local.close()

    @rule(name=NAMES)
    def write_whole(self, name: str) -> None:
        self.cache.put(name, OBJECTS[name])

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        """What was removed is not found by who opens it now."""
        self.cache.store.remove(digest_of(name), SIZES[name])
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
        assert not self.cache.store.has_room(blocks * BLOCK)
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
    def the_limit_holds(self) -> None:
        assert self.cache.accounts.used_bytes <= CAPACITY

    def teardown(self) -> None:
        self.cache.check()
        for _, local in self.opened:
            local.close()
        self.cache.close()
        shutil.rmtree(self.root)


BlockMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBlocksBesideADict = BlockMachine.TestCase
