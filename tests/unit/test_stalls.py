"""Waiting is counted where it happens, divided by cause so that the parts are the whole, and told in one sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.clock import ManualClock
from orchestra.engine.engine import Wanted
from orchestra.fetch.budget import Priority
from orchestra.observe.stalls import (
    CAUSES,
    EpochStalls,
    Marks,
    NodeFigures,
    StallTable,
    Waits,
    advice,
    node_advice,
    split_wait,
)
from orchestra.testing.fault_store import FaultStore, Stall
from orchestra.units import GIB, MIB
from orchestra.values import ByteRange
from tests.support.cache import BLOCK, data_of
from tests.support.node import ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

_SECONDS = st.integers(0, 10**15).map(lambda ns: ns / 1e9)
_WAITS = st.builds(Waits, *[_SECONDS] * 5)


# -- dividing ------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e6), _WAITS, st.floats(0, 1e6))
def test_the_parts_of_a_wait_are_the_whole(waited_s: float, missed: Waits, readers: float) -> None:
    """Whatever was missed meanwhile, a step's wait is divided without rest, and no part is negative."""
    parts = split_wait(waited_s, missed, readers)
    assert parts.total_s == pytest.approx(waited_s)
    assert all(getattr(parts, f"{cause}_s") >= 0 for cause in CAUSES)


def test_what_was_no_miss_was_the_workers_own_work() -> None:
    """Four workers of which one waited for the store the whole time: a quarter store, the rest decoding."""
    assert split_wait(2.0, Waits(store_s=2.0), 8.0) == Waits(store_s=0.5, decode_s=1.5)
    assert split_wait(2.0, Waits(), 8.0) == Waits(decode_s=2.0)
    assert split_wait(2.0, Waits(store_s=6.0, queue_s=2.0), 8.0) == Waits(store_s=1.5, queue_s=0.5)
    assert split_wait(1.0, Waits(store_s=500.0), 1.0) == Waits(store_s=1.0)
    assert split_wait(1.0, Waits(store_s=0.5), 0.0) == Waits(store_s=0.5, decode_s=0.5)


def test_phases_that_nobody_waited_for_do_not_count() -> None:
    """A fetch that a plan began is waited for only from the moment a reader came."""
    table = StallTable(ManualClock())
    marks = Marks([0, 1_000_000_000, 4_000_000_000, 4_500_000_000])
    table.add_flight(0, marks)
    assert table.waits() == Waits(queue_s=1.0, store_s=3.0, disk_s=0.5)
    table.add_flight(3_000_000_000, marks)
    assert table.waits() == Waits(queue_s=1.0, store_s=4.0, disk_s=1.0)
    marks.is_from_peer = True
    table.add_flight(3_000_000_000, marks)
    assert table.waits() == Waits(queue_s=1.0, store_s=4.0, peer_s=1.0, disk_s=1.5)
    assert table.misses == 3


def test_waiting_is_kept_by_the_minute() -> None:
    """The latest minutes first, those without waiting left out, and no more than four hours of them."""
    clock = ManualClock(start_s=60_000)
    table = StallTable(clock)
    for _ in range(300):
        began_ns = clock.now_ns()
        clock.advance(1.0)
        table.add_metadata(began_ns)
        clock.advance(119.0)
    minutes = table.minutes()
    assert len(minutes) == 240
    assert minutes[0] == (2, Waits(metadata_s=1.0))
    assert minutes[1][0] == 4


def test_figures_survive_the_wire_and_a_new_daemon() -> None:
    """What JSON brings back is what was sent; a daemon that was started meanwhile counts from its start."""
    before = NodeFigures(Waits(store_s=1.0), 5, 100, 1.0, 1000, 100, GIB)
    after = NodeFigures(Waits(store_s=4.0, disk_s=1.0), 9, 300, 2.0, 3000, 300, GIB)
    assert NodeFigures.from_json(after.to_json()) == after
    assert after.since(before) == NodeFigures(Waits(store_s=3.0, disk_s=1.0), 4, 200, 1.0, 2000, 200, GIB)
    assert before.since(after) == before


# -- advice --------------------------------------------------------------------------------------------------------


def epoch(waits: Waits, **node: float) -> EpochStalls:
    return EpochStalls(1, 100, 100.0, waits, NodeFigures(**node))  # type: ignore[arg-type]


def test_advice_about_a_store_that_is_slower_than_the_reader() -> None:
    """Rates, what bound the epoch, and how much cache would help."""
    said = advice(
        epoch(
            Waits(store_s=75.0, decode_s=5.0),
            fetched_bytes=40_000 * MIB,
            store_busy_s=100.0,
            read_bytes=126 * GIB,
            capacity_bytes=64 * GIB,
        )
    )
    assert said == (
        "the store gave 400.0 MiB/s, you read 6.3 GiB/s: epoch 1 is bound by the store; "
        "62.0 GiB more cache would make epoch 2 free of waiting"
    )


def test_advice_about_latency_and_a_cache_that_holds_it_all() -> None:
    """A store that is fast enough, and was asked too late."""
    said = advice(
        epoch(
            Waits(store_s=50.0), fetched_bytes=10 * GIB, store_busy_s=20.0, read_bytes=10 * GIB, capacity_bytes=64 * GIB
        )
    )
    assert "PlannedSampler hides" in said
    assert said.endswith("what it read fits in the cache, so epoch 2 need not wait")


@pytest.mark.parametrize("cause", [cause for cause in CAUSES if cause != "store"])
def test_every_other_cause_has_its_remedy(cause: str) -> None:
    """One sentence that names the time and what to look at, from the training's side and the node's."""
    waits = Waits(**{f"{cause}_s": 30.0})
    for said in (advice(epoch(waits)), node_advice(NodeFigures(waits))):
        assert "30.0s" in said
        assert "\n" not in said
        assert said.count(", most of it for ") == 1


def test_nothing_to_say_is_said() -> None:
    """An epoch that waited less than one part in a hundred, and a node whose readers waited for nothing."""
    assert "nothing to gain" in advice(epoch(Waits(store_s=0.5)))
    assert "has waited" in node_advice(NodeFigures())
    assert node_advice(NodeFigures(Waits(metadata_s=0.013))) == "readers waited 13ms in all: there is nothing to gain"
    assert "by at most 2.0 MiB" in node_advice(NodeFigures(Waits(store_s=5), 1, 3 * MIB, 1.0, 0, 0, MIB))
    assert "for the store" in advice(epoch(Waits(store_s=50.0)))


@given(_WAITS, st.integers(0, 10**13), _SECONDS, st.integers(0, 10**13), st.integers(0, 10**13))
def test_advice_is_one_sentence_whatever_was_measured(
    waits: Waits, fetched: int, busy_s: float, read: int, capacity: int
) -> None:
    """No figure makes it fail or say nothing."""
    node = NodeFigures(waits, 3, fetched, busy_s, read, 0, capacity)
    for said in (advice(EpochStalls(1, 1, waits.total_s * 1.5, waits, node)), node_advice(node)):
        assert 10 < len(said) < 300
        assert "\n" not in said


# -- a node --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


def waits_of(node: ThreadNode) -> tuple[Waits, int]:
    async def look() -> tuple[Waits, int]:
        return node.node.engine.stalls.waits(), node.node.engine.stalls.misses

    return node.run(look())


def test_a_miss_waits_for_the_store_and_a_hit_for_nothing(tmp_path: Path) -> None:
    """One cold read is one flight, with its look-up beside it; reading again adds nothing at all."""
    store = VersionedStore()
    store.put("a", data_of("a", 3 * BLOCK))
    with thread_node(tmp_path, store) as node:
        client = node.client()
        client.read_file("/data/a")
        waits, misses = waits_of(node)
        assert misses == 1
        assert min(waits.store_s, waits.disk_s, waits.metadata_s) > 0
        client.read_file("/data/a")
        assert waits_of(node) == (waits, misses)
        body = client.daemon_request("GET", "/v1/stalls")
        assert NodeFigures.from_json(body["figures"]).misses == 1
        assert list(client.daemon_request("GET", "/v1/stalls?brief=1")) == ["figures"]


def test_what_is_fetched_ahead_is_no_waiting_until_somebody_waits(tmp_path: Path) -> None:
    """A background fetch counts nothing; a reader that joins it counts from then on."""
    store = VersionedStore()
    for name in ("a", "b"):
        store.put(name, data_of(name, BLOCK))
    faults = FaultStore(store)
    with thread_node(tmp_path, faults) as node:
        engine, client = node.node.engine, node.client()
        wanted = {}
        for name in ("a", "b"):
            entry = client.stat(f"/data/{name}")
            wanted[name] = engine.want(f"/data/{name}", entry.version, BLOCK, ByteRange(0, BLOCK))
        assert node.run(engine.ensure(wanted["a"], Priority.PLAN))
        before, misses = waits_of(node)
        assert misses == 0
        stall = faults.inject(Stall(), on="read")
        node.run(_plan_then_demand(node, wanted["b"], stall))
        after, misses = waits_of(node)
        assert misses == 1
        assert after.queue_s == before.queue_s == 0
        assert after.store_s > 0


async def _plan_then_demand(node: ThreadNode, wanted: Wanted, stall: object) -> None:
    engine = node.node.engine
    ahead = asyncio.create_task(engine.ensure(wanted, Priority.PLAN))
    await stall.wait_fired()  # type: ignore[attr-defined]
    demand = asyncio.create_task(engine.ensure(wanted))
    await asyncio.sleep(0)
    stall.release()  # type: ignore[attr-defined]
    assert await ahead
    assert await demand
