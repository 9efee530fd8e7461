"""kill -9 between any two steps of the block store: what is left is the right bytes or none.

Each scenario dies once before every call to the disk, and (marked slow) before every line of the modules that change
the cache. After each death the next daemon must find accounts that equal the files, nothing unfinished, no half
without its other half; a reader must get the right bytes or a miss, in this boot and, after verification, in the next;
and everything can be written again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestra.blocks.disk import Disk
from orchestra.blocks.layout import CacheLayout
from tests.support.cache import BLOCK, EXTENT, LATER_BOOT, Cache, data_of, digest_of
from tests.support.crash import Fuse, burn_before_each_call, changing_points, crash_points, trace_lines
from tests.support.disks import HookedDisk, without_attributes
from tests.support.ram import ram_folder

SIZES = {"small": 1000, "small2": BLOCK, "large": 2 * EXTENT + 100, "part": EXTENT, "old": EXTENT}
OBJECTS = {name: data_of(name, size) for name, size in SIZES.items()}


@pytest.fixture
def root() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@dataclass(frozen=True)
class Scenario:
    """`prepare` makes what is there before, `act` is what the process dies in."""

    name: str
    act: Callable[[Cache], object]
    prepare: Callable[[Cache], object] = lambda cache: None
    capacity_bytes: int = 1 << 30
    has_attributes: bool = True


def put(*names: str) -> Callable[[Cache], object]:
    def act(cache: Cache) -> None:
        for name in names:
            cache.put(name, OBJECTS[name])

    return act


def put_part(*blocks: int) -> Callable[[Cache], object]:
    def act(cache: Cache) -> None:
        for block in blocks:
            cache.put_block("part", OBJECTS["part"], block)

    return act


def both(*acts: Callable[[Cache], object]) -> Callable[[Cache], object]:
    return lambda cache: [act(cache) for act in acts]


def remove(*names: str) -> Callable[[Cache], object]:
    return lambda cache: [cache.store.remove(digest_of(name), SIZES[name]) for name in names]


SCENARIOS = [
    Scenario("write a small object", put("small")),
    Scenario("write a small object again", put("small"), prepare=put("small")),
    Scenario("write without attributes", put("small", "small2"), has_attributes=False),
    Scenario("write the blocks of three extents", put("large")),
    Scenario("complete an extent", put_part(0, 1), prepare=put_part(2, 3)),
    Scenario("evict", put("large"), prepare=put("small", "old", "part"), capacity_bytes=4 * EXTENT),
    Scenario("evict small ones", put("old"), prepare=put("small", "small2"), capacity_bytes=EXTENT + BLOCK),
    Scenario("remove", remove("large", "small", "part"), prepare=both(put("large", "small"), put_part(1))),
    Scenario("remove without attributes", remove("small"), prepare=put("small"), has_attributes=False),
    Scenario("write the index", both(put("small", "old"), lambda cache: cache.store.flush()), prepare=put("large")),
    Scenario("stop", lambda cache: cache.close(), prepare=put("large", "small", "part")),
]


def run_in(root: Path, scenario: Scenario, *, by_line: bool, times_max: int | None = None) -> Callable[[Fuse], None]:
    """What the child does: a cache with nothing in it, then what the scenario needs, then what it dies in."""

    def run(fuse: Fuse) -> None:
        disk = HookedDisk() if scenario.has_attributes else without_attributes()
        if not by_line:
            burn_before_each_call(disk, fuse)
        cache = Cache(root, capacity_bytes=scenario.capacity_bytes, disk=disk)
        for name, size in SIZES.items():
            cache.store.remove(digest_of(name), size)
        scenario.prepare(cache)
        cache.store.flush()
        fuse.light()
        if by_line:
            trace_lines(fuse, times_max=times_max)
        scenario.act(cache)

    return run


def check_what_is_left(root: Path, scenario: Scenario, step: int, *, also_later: bool) -> None:
    """The next daemon and its readers: right bytes or none; books that are true; nothing that a check would find bad.
    `also_later`: the next boot too, and a cache that goes on working."""
    disk: Disk = HookedDisk() if scenario.has_attributes else without_attributes()
    where = f"death before step {step}"
    cache = Cache(root, capacity_bytes=scenario.capacity_bytes, disk=disk)
    cache.check()
    check_bytes(cache, where)
    assert sum(cache.verify(name, size) for name, size in SIZES.items() if held(cache, name)) == 0, where
    cache.crash()
    if not also_later:
        return
    cache = Cache(root, capacity_bytes=scenario.capacity_bytes, disk=disk, boot_id=LATER_BOOT)
    assert all(cache.get(name, size) is None for name, size in SIZES.items()), where
    assert sum(cache.verify(name, size) for name, size in SIZES.items() if held(cache, name)) == 0, where
    check_bytes(cache, where)
    for name, data in OBJECTS.items():
        cache.put(name, data)
        assert cache.get(name, len(data)) in (data, None)
    cache.check()
    cache.close()


def held(cache: Cache, name: str) -> bool:
    blocks = range(cache.geometry.block_count(SIZES[name]))
    return all(
        cache.store.holds(digest_of(name), SIZES[name], run.start) for _, run in cache.geometry.extents_of(blocks)
    )


def check_bytes(cache: Cache, where: str) -> None:
    for name, data in OBJECTS.items():
        local = cache.open(name, len(data))
        for block in range(cache.geometry.block_count(len(data))):
            span = cache.geometry.block_range(len(data), block)
            buffer = bytearray(span.length)
            if local.readinto(span.start, memoryview(buffer)) is not None:
                assert bytes(buffer) == data[span.start : span.stop], f"{where}: wrong bytes of {name}, block {block}"
        descriptor = local.complete_fd()
        assert descriptor is None or cache.get(name, len(data)) == data, where
        local.close()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_death_before_any_call_to_the_disk(root: Path, scenario: Scenario) -> None:
    """At each of the scenario's disk calls: the process died there, and what it left is right."""
    if scenario.name == "stop":
        pytest.skip("a stop calls sqlite alone: see the lines below")
    deaths = 0
    for step in crash_points(run_in(root, scenario, by_line=False)):
        check_what_is_left(root, scenario, step, also_later=not step % 3)
        deaths += 1
    assert deaths >= 2


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_death_at_some_lines(root: Path, scenario: Scenario) -> None:
    """The same between system calls, where marks and accounts change: at every 67th line."""
    deaths = 0
    for step in crash_points(run_in(root, scenario, by_line=True), stride=67):
        check_what_is_left(root, scenario, step, also_later=not step % 3)
        deaths += 1
    assert deaths


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_death_at_any_line(root: Path, scenario: Scenario) -> None:
    """The same before every single line, the first three times that it is reached, but for those before which the disk
    is as it was before the line before."""
    layout = CacheLayout(root)
    folders = [root, layout.tmp, *{Path(layout.small_file(digest_of(name))).parent for name in SIZES}]
    deaths = 0
    for step in changing_points(run_in(root, scenario, by_line=True, times_max=3), folders):
        check_what_is_left(root, scenario, step, also_later=True)
        deaths += 1
    assert deaths


def test_the_check_would_notice(root: Path) -> None:
    """A store that marked a block before its bytes were written would be caught by the checks above."""
    cache = Cache(root)
    cache.put("part", OBJECTS["part"])
    with Path(cache.layout.extent_file(digest_of("part"), 0)).open("r+b") as file:
        file.seek(BLOCK)
        file.write(bytes(BLOCK))
    with pytest.raises(AssertionError, match="wrong bytes of part, block 1"):
        check_bytes(cache, "here")
    cache.crash()
