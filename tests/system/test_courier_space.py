"""Loads through a courier when space or mounts change: a quota, a full disk, a mount that goes, files that are freed.

What the courier writes nobody accounts for but the daemon; so when it ends otherwise, nothing may stay behind of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from common import OriginProcess

from orchestra.blocks.rules import SpaceRules, StoreRule
from orchestra.daemon.jobs.job import JobState
from orchestra.units import MIB
from tests.support.carried_loads import (
    BLOCKS,
    COUNT,
    LARGE_COUNT,
    carried_origin,
    carrying_node,
    check_all,
    counts_of,
    courier_of,
    do_carried_load,
    do_disturbed_load,
    gets,
    have_couriers,
    tmp_of,
)
from tests.support.node import PATIENCE_S, ThreadNode
from tests.support.ram import needs_root, ram_folder, small_disk

pytestmark = pytest.mark.system

# What one small object takes of the disk.
CHARGE = 4096


@pytest.fixture(scope="module")
def origin() -> Iterator[OriginProcess]:
    """See carried_origin."""
    with carried_origin() as running:
        yield running


@pytest.fixture
def node(origin: OriginProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadNode]:
    """A node that has a courier for every load."""
    have_couriers(monkeypatch)
    with ram_folder() as folder, carrying_node(origin, folder) as running:
        yield running


def check_nothing_stays(node: ThreadNode) -> None:
    """Of what was under way: no file, no room reserved, no bytes in flight, no turn of the store."""
    assert tmp_of(node) == []
    assert node.node.budget.used_bytes == 0
    node.run(wait_turns_back(node))
    assert node.node.blocks._accounts.reserved_bytes == 0


async def wait_turns_back(node: ThreadNode) -> None:
    """The courier keeps a turn for some milliseconds after its last errand."""
    async with asyncio.timeout(PATIENCE_S):
        while counts_of(node).requests_in_flight:
            await asyncio.sleep(0)


def test_a_quota_is_filled_and_not_passed(node: ThreadNode, origin: OriginProcess) -> None:
    """Of a mount that may hold 50 files a whole load asks for none, and a partial one for 50."""
    store_id = node.node.engine.mounts.locate("/data/small").mount.store.store_id  # type: ignore[union-attr]
    node.node.blocks.space.set_rules(SpaceRules(stores={store_id: StoreRule(quota_bytes=50 * CHARGE)}))
    whole = node.run(do_carried_load(node, "/data/small"))
    assert (whole.state, whole.reason, gets(origin)) == (JobState.FAILED, "space", 0)
    partial = node.run(do_carried_load(node, "/data/small", partial=True))
    assert (partial.state, partial.reason, partial.files_done) == (JobState.SUCCEEDED, "space", 50)
    assert gets(origin) == courier_of(node).carried == 50
    assert node.node.blocks.statistics().used_bytes == 50 * CHARGE
    check_nothing_stays(node)
    check_all(node)


@needs_root
@pytest.mark.parametrize("is_warm", [False, True], ids=["empty", "warm"])
def test_a_disk_that_fills_up_under_a_courier(
    origin: OriginProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_warm: bool
) -> None:
    """Somebody else's file takes all the space while errands are under way: the job fails and says so, readers get
    right bytes, nothing stays; with that file gone the same load succeeds."""
    have_couriers(monkeypatch)
    with small_disk(tmp_path / "disk", "size=40m") as disk, carrying_node(origin, disk) as node:
        if is_warm:
            assert node.run(do_carried_load(node, "/data/small")).state is JobState.SUCCEEDED
        path = "/data/large" if is_warm else "/data"
        before = courier_of(node).carried

        origin.call("/__reset")

        async def fill_disk() -> None:
            fill(disk / "other")
            assert courier_of(node).carried == before, "what is under way meets a full disk"

        job = node.run(do_disturbed_load(node, origin, path, fill_disk, asked=6, latency_ms=1000))
        assert job.state is JobState.FAILED
        assert courier_of(node).carried < BLOCKS
        assert node.node.engine.statistics.cache_write_errors > 0
        check_nothing_stays(node)
        check_all(node)
        (disk / "other").unlink()
        again = node.run(do_carried_load(node, "/data"))
        assert (again.state, again.files_done) == (JobState.SUCCEEDED, COUNT + LARGE_COUNT)
        asked = gets(origin)
        check_all(node)
        assert gets(origin) == asked


def fill(path: Path) -> None:
    """Make a file of everything that the file system has left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MIB))
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_mount_that_goes_while_its_files_are_carried(node: ThreadNode, origin: OriginProcess) -> None:
    """What the load began goes on, nothing stays of it, and with the mount back readers ask for nothing."""

    async def unmount() -> None:
        node.node.mounts.reload(dataclasses.replace(node.config, mounts=()))
        assert courier_of(node).carried < BLOCKS

    job = node.run(do_disturbed_load(node, origin, "/data", unmount, asked=10, latency_ms=300))
    assert (job.state, job.files_done) == (JobState.SUCCEEDED, COUNT + LARGE_COUNT)

    async def mount_again() -> None:
        node.node.mounts.reload(node.config)

    node.run(mount_again())
    check_nothing_stays(node)
    asked = gets(origin)
    check_all(node)
    assert gets(origin) == asked == BLOCKS


def test_what_is_freed_while_it_is_carried_is_loaded_again(node: ThreadNode, origin: OriginProcess) -> None:
    """A load ends well only with everything there, also if somebody frees half of it meanwhile."""

    async def free() -> None:
        freed = await node.node.space.free("/data")
        assert freed.freed_bytes > 0

    job = node.run(do_disturbed_load(node, origin, "/data", free, asked=60, latency_ms=100))
    assert job.state is JobState.SUCCEEDED
    asked = gets(origin)
    assert asked > BLOCKS
    check_all(node)
    assert gets(origin) == asked
    check_nothing_stays(node)
