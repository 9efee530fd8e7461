"""Plans carried out by a whole node: in order, each file once, within limits, and behind every demand."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestra.client.plans import PlanPublisher
from orchestra.config import FetchConfig
from orchestra.daemon.jobs.job import Job, LoadSpec
from orchestra.errors import StoreUnavailableError
from orchestra.testing.fault_store import Fail, FaultStore, Stall
from orchestra.values import ByteRange
from tests.support.cache import BLOCK, data_of
from tests.support.node import PATIENCE_S, ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

COUNT = 40


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def store() -> VersionedStore:
    filled = VersionedStore()
    for number in range(COUNT):
        filled.put(f"f{number}", data_of(f"f{number}", BLOCK))
    return filled


PATHS = [f"/data/f{number}" for number in range(COUNT)]


def order(*indexes: int) -> array[int]:
    return array("I", indexes)


def shuffled(seed: int) -> array[int]:
    return array("I", random.Random(seed).sample(range(COUNT), COUNT))


def read_keys(store: VersionedStore) -> list[str]:
    return [key for key, _, _ in store.reads]


def wait(node: ThreadNode, condition: Callable[[], bool]) -> None:
    """Return when `condition` holds in the node's loop."""
    deadline_ns = node.node.clock.now_ns() + int(PATIENCE_S * 1e9)

    async def holds() -> bool:
        return condition()

    while not node.run(holds()):
        assert node.node.clock.now_ns() < deadline_ns, node.node.plans.status()


def settled(node: ThreadNode) -> None:
    """Return when the plans have nothing left to do for now."""
    wait(node, lambda: not node.node.plans.is_busy)


def one_at_a_time() -> FetchConfig:
    """Bytes for one block at a time, so that the order of fetching is the order of asking."""
    return FetchConfig(in_flight_bytes_max=BLOCK)


def test_files_are_fetched_in_the_order_of_the_plan(tmp_path: Path, store: VersionedStore) -> None:
    """Nobody reads; the store is asked for each file once, in the published order."""
    wanted = shuffled(1)
    with thread_node(tmp_path, store, fetch=one_at_a_time()) as node:
        node.client().list("/data")
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, wanted)
        settled(node)
        assert read_keys(store) == [f"f{index}" for index in wanted]
        (status,) = node.node.plans.status()
        assert (status["fetched"], status["failed"], status["ahead_samples"]) == (COUNT, 0, COUNT)
        publisher.close()


def test_what_was_planned_is_a_hit(tmp_path: Path, store: VersionedStore) -> None:
    """A reader of planned files sends no message and asks the store for nothing."""
    with thread_node(tmp_path, store) as node:
        client = node.client()
        client.list("/data")
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, shuffled(2))
        settled(node)
        before, messages = len(store.reads), client.messages_sent
        assert all(client.read_file(path) == data_of(path[6:], BLOCK) for path in PATHS)
        assert (len(store.reads), client.messages_sent) == (before, messages)
        publisher.close()


def test_the_plan_goes_on_across_the_epoch_boundary(tmp_path: Path, store: VersionedStore) -> None:
    """The start of the next epoch is fetched before this one has been read to its end, right after it."""
    with thread_node(tmp_path, store, fetch=one_at_a_time()) as node:
        node.client().list("/data")
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, order(3, 1))
        publisher.publish_next(1, order(7, 3, 5, 2), 3)
        settled(node)
        assert read_keys(store) == ["f3", "f1", "f7", "f5"]
        publisher.publish(1, order(7, 3, 5, 2))
        settled(node)
        assert read_keys(store) == ["f3", "f1", "f7", "f5", "f2"]
        publisher.close()


def test_demand_overtakes_what_is_planned(tmp_path: Path, store: VersionedStore) -> None:
    """With a whole plan waiting for its turn, a demanded file is the next that the store is asked for."""
    faults = FaultStore(store)
    with thread_node(tmp_path, faults, fetch=one_at_a_time()) as node:
        client = node.client()
        client.list("/data")
        stall = faults.inject(Stall(), on="read")
        publisher = PlanPublisher(node.config, PATHS[:-1])
        publisher.publish(0, array("I", range(COUNT - 1)))
        node.run(stall.wait_fired())
        entry = client.stat(PATHS[-1])
        wanted = node.node.engine.want(PATHS[-1], entry.version, BLOCK, ByteRange(0, BLOCK))
        demand = node.run(_started(node.node.engine.ensure(wanted)))
        node.loop.call_soon_threadsafe(stall.release)
        assert node.run(_result(demand))
        settled(node)
    assert read_keys(store)[:3] == ["f0", PATHS[-1][6:], "f1"]
    assert len(store.reads) == COUNT


def test_demand_for_a_planned_file_joins_its_fetch(tmp_path: Path, store: VersionedStore) -> None:
    """A reader that comes while its file is being fetched for the plan waits for that fetch: one GET."""
    with thread_node(tmp_path, store, fetch=one_at_a_time()) as node:
        client = node.client()
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, array("I", range(COUNT)))
        for path in reversed(PATHS):
            assert client.read_file(path) == data_of(path[6:], BLOCK)
        settled(node)
        publisher.close()
    assert sorted(read_keys(store)) == sorted(f"f{number}" for number in range(COUNT))


def test_requests_in_flight_are_bounded(tmp_path: Path, store: VersionedStore) -> None:
    """A plan of forty files has as many requests in flight as the store may have, and no more."""
    faults = FaultStore(store)
    stall = faults.inject(Stall(), on="read", times=None)
    with thread_node(tmp_path, faults, fetch=FetchConfig(requests_max=5)) as node:
        node.client().list("/data")
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, array("I", range(COUNT)))
        wait(node, lambda: stall.fired == 5)
        (status,) = node.node.plans.status()
        assert (status["in_flight"], status["ahead_samples"]) == (5, 5)
        node.loop.call_soon_threadsafe(stall.release)
        settled(node)
        assert node.node.plans.status()[0]["fetched"] == COUNT
        publisher.close()


def test_a_plan_begins_with_a_batch_in_flight_and_a_load_beside_it_with_two(
    tmp_path: Path, store: VersionedStore
) -> None:
    """A store that may have 128 requests gets 16 of a plan at first, lest the next file waits behind later ones; and
    two of a load, as somebody waits for the plan's."""
    for number in range(COUNT):
        store.put(f"other/f{number}", data_of(f"other {number}", BLOCK))
    faults = FaultStore(store)
    stall = faults.inject(Stall(), on="read", times=None)
    with thread_node(tmp_path, faults) as node:
        node.client().list("/data")
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, array("I", range(COUNT)))
        wait(node, lambda: stall.fired == 16)
        job = node.run(_submitted(node, "/data/other"))
        wait(node, lambda: stall.fired == 18)
        assert node.node.plans.status()[0]["in_flight"] == 16
        assert node.node.plans.bytes_in_flight == 16 * BLOCK
        node.loop.call_soon_threadsafe(stall.release)
        settled(node)
        wait(node, lambda: job.state.is_over)
        assert (job.files_done, len(store.reads)) == (COUNT, 2 * COUNT)
        publisher.close()


def _is_here(node: ThreadNode, path: str) -> bool:
    return any(origin is not None and origin.key == path[6:] for _, origin in node.node.blocks.space.origins())


async def _submitted(node: ThreadNode, path: str) -> Job:
    return node.node.jobs.submit(LoadSpec(path))


def test_a_reader_no_quicker_than_the_store_misses_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """Two epochs of a reader that takes each file when it is there: all of them come without being asked for, once."""
    misses: list[str] = []
    with thread_node(tmp_path, store) as node:
        client = node.client()
        client.list("/data")
        node.node.engine.on_access(lambda access: misses.append(access.wanted.info.key))
        publisher = PlanPublisher(node.config, PATHS)
        for epoch in range(2):
            wanted = shuffled(epoch)
            publisher.publish(epoch, wanted)
            for step, index in enumerate(wanted):
                publisher.move(epoch, step)
                wait(node, partial(_is_here, node, PATHS[index]))
                assert client.read_file(PATHS[index]) == data_of(PATHS[index][6:], BLOCK)
        assert (misses, len(store.reads)) == ([], COUNT)
        publisher.close()


def test_a_full_cache_is_not_filled_further_ahead_than_its_share(tmp_path: Path, store: VersionedStore) -> None:
    """Four files before any size is known; from then on a cache of 32 files is ahead by two."""
    cache = {"size_bytes": 32 * BLOCK}
    with thread_node(tmp_path, store, cache=cache, fetch=one_at_a_time()) as node:
        node.client().list("/data")
        for path in PATHS[-32:]:
            node.client().read_file(path)
        before = len(store.reads)
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, array("I", range(COUNT)))
        settled(node)
        assert read_keys(store)[before:] == ["f0", "f1", "f2", "f3"]
        for position in (1, 2, 3):
            assert publisher.move(0, position)
            settled(node)
        assert read_keys(store)[before:] == ["f0", "f1", "f2", "f3", "f4"]
        assert node.node.plans.status()[0]["ahead_bytes"] == 2 * BLOCK
        assert node.node.plans.rest_s(publisher.name) == 0  # the next position is waited for
        publisher.close()


def test_a_warm_epoch_asks_for_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """Once everything is here an epoch's plan is passed over: no look-up, no file opened, no request."""
    with thread_node(tmp_path, store) as node:
        node.client().list("/data")
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, shuffled(3))
        settled(node)
        requests, ensures = store.requests, node.node.engine.statistics.ensures
        for epoch in (1, 2):
            publisher.publish(epoch, shuffled(3 + epoch))
            assert publisher.move(epoch, COUNT)
        settled(node)
        assert (store.requests, node.node.engine.statistics.ensures) == (requests, ensures)
        publisher.close()


def test_what_was_freed_comes_again(tmp_path: Path, store: VersionedStore) -> None:
    """`orchestra free` between two epochs: the plan of the next one fetches everything once more."""
    with thread_node(tmp_path, store) as node:
        node.client().list("/data")
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, shuffled(3))
        settled(node)
        assert publisher.move(0, COUNT)
        node.client().daemon_request("POST", "/v1/free", {"path": "/data"})
        publisher.publish(1, shuffled(4))
        settled(node)
        assert len(read_keys(store)) == 2 * COUNT
        publisher.close()


def test_what_fails_ahead_is_passed_over(tmp_path: Path, store: VersionedStore) -> None:
    """A file that is gone and one that the store fails to send cost the plan themselves and no other file."""
    faults = FaultStore(store)
    faults.inject(Fail(StoreUnavailableError("503")), on="read", at=2)
    store.delete("f0")
    with thread_node(tmp_path, faults, fetch=one_at_a_time()) as node:
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, array("I", range(COUNT)))
        settled(node)
        assert (node.node.plans.status()[0]["fetched"], node.node.plans.status()[0]["failed"]) == (COUNT - 2, 2)
        publisher.close()


def test_a_reader_that_comes_back_goes_on_where_it_was(tmp_path: Path, store: VersionedStore) -> None:
    """A position far inside of a plan that is new to the daemon (it was started since): nothing earlier is fetched."""
    with thread_node(tmp_path, store, cache={"size_bytes": 32 * BLOCK}, fetch=one_at_a_time()) as node:
        node.client().list("/data")
        for path in PATHS[:-8]:
            node.client().read_file(path)
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, array("I", range(COUNT)))
        settled(node)
        node.run(_forget_everything(node))
        assert not publisher.move(0, 30)
        publisher.publish_again()
        settled(node)
        before = len(store.reads)
        assert publisher.move(0, 30)
        settled(node)
        assert read_keys(store)[before:] == ["f32", "f33"]
        publisher.close()


@pytest.mark.parametrize("limit", ["cache", "quota"])
def test_the_next_epoch_decides_what_stays(tmp_path: Path, limit: str) -> None:
    """A cache, or a quota, of half of the data set, read by a plan in five shuffled epochs: from the second on hardly
    more than the other half is fetched, and every read is of what is here already. (LRU would fetch 85 of 100.)"""
    count, held = 400, 200
    store = VersionedStore()
    for number in range(count):
        store.put(f"f{number}", data_of(f"f{number}", 100))
    paths = [f"/data/f{number}" for number in range(count)]
    orders = [array("I", random.Random(epoch).sample(range(count), count)) for epoch in range(6)]
    # A file of a hundred bytes takes a page of the disk.
    cache = {"size_bytes": (held if limit == "cache" else count) * 4096, "eviction": "auto"}
    quota_bytes = held * 4096 if limit == "quota" else None
    with thread_node(tmp_path, store, cache=cache, quota_bytes=quota_bytes) as node:
        client = node.client()
        client.list("/data")
        publisher = PlanPublisher(node.config, paths)
        fetched, missed = [], []
        for epoch in range(5):
            before, misses = len(store.reads), node.node.engine.stalls.misses
            publisher.publish(epoch, orders[epoch])
            publisher.publish_next(epoch + 1, orders[epoch + 1], count)
            for offset, index in enumerate(orders[epoch]):
                if not offset % 4:
                    publisher.move(epoch, offset)
                    settled(node)
                client.read_file(paths[index])
            fetched.append(len(store.reads) - before)
            missed.append(node.node.engine.stalls.misses - misses)
        publisher.close()
    assert max(fetched[1:]) <= 0.55 * count
    assert max(missed) <= 0.02 * count


def test_ranks_share_their_paths_and_take_turns(tmp_path: Path, store: VersionedStore) -> None:
    """Two readers of one data set send its paths once; both are ahead by as much."""
    with thread_node(tmp_path, store, fetch=one_at_a_time()) as node:
        node.client().list("/data")
        ranks = [PlanPublisher(node.config, PATHS) for _ in range(2)]
        ranks[0].publish(0, array("I", range(0, COUNT, 2)))
        sent = ranks[0].messages_sent
        ranks[1].publish(0, array("I", range(1, COUNT, 2)))
        assert (sent, ranks[1].messages_sent) == (5, 2)
        settled(node)
        assert sorted(read_keys(store)) == sorted(f"f{number}" for number in range(COUNT))
        assert [status["fetched"] for status in node.node.plans.status()] == [COUNT // 2] * 2
        for publisher in ranks:
            publisher.end()
            publisher.close()
        assert node.node.plans.status() == []


def test_a_daemon_that_was_started_since_is_told_everything_again(tmp_path: Path, store: VersionedStore) -> None:
    """It knows nothing of the plan, says so, and is sent paths, orders and position once more."""
    with thread_node(tmp_path, store) as node:
        publisher = PlanPublisher(node.config, PATHS)
        publisher.publish(0, shuffled(5))
        publisher.publish_next(1, shuffled(6), 10)
        node.run(_forget_everything(node))
        assert not publisher.move(0, 7)
        publisher.publish_again()
        assert publisher.move(0, 7)
        (status,) = node.node.plans.status()
        assert (status["position"], status["known_samples"]) == (7, COUNT - 7 + 10)
        publisher.close()


def test_samples_outside_of_the_namespace_are_left_out(tmp_path: Path, store: VersionedStore) -> None:
    """Their path is empty; the rest is fetched."""
    paths = ["" if number % 2 else path for number, path in enumerate(PATHS)]
    with thread_node(tmp_path, store) as node:
        publisher = PlanPublisher(node.config, paths)
        publisher.publish(0, array("I", range(COUNT)))
        settled(node)
        assert node.node.plans.status()[0]["failed"] == 0
        publisher.close()
    assert sorted(read_keys(store)) == sorted(f"f{number}" for number in range(0, COUNT, 2))


async def _started(work: Coroutine[Any, Any, bool]) -> asyncio.Task[bool]:
    """Begin it, up to its first wait."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0)
    return task


async def _result(task: asyncio.Task[bool]) -> bool:
    return await task


async def _forget_everything(node: ThreadNode) -> None:
    plans = node.node.plans
    plans._plans.clear()
    plans._tables.clear()
