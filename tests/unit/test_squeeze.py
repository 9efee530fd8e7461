"""How much loads and plans take while readers wait: what fills the link, and as much of a queue on it as each may.

The link of these tests: a latency, a bandwidth, and pieces of 500 kB that queue when more is in flight than fills it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from orchestra.prefetch.squeeze import LIMIT_AT_FIRST, Answers, Squeeze, Tick
from orchestra.prefetch.yielding import Yielding

PIECE = 500_000
TICK_S = 0.15


@dataclass
class Link:
    """What a load with a limit sees of a link, with `readers` requests beside it."""

    latency_s: float
    bandwidth: float
    readers: int = 0
    sigma: float = 0.0  # of a lognormal latency
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def see(self, limit: int, *, readers_wait: bool = True) -> Tick:
        in_flight = limit + self.readers
        seconds = max(self.latency_s + PIECE / self.bandwidth, in_flight * PIECE / self.bandwidth)
        own, readers = self.answers(limit, seconds), self.answers(self.readers, seconds)
        return Tick(own, readers, limit, self.readers, readers_wait)

    def answers(self, in_flight: int, seconds: float) -> Answers:
        """What comes in a tick if so many are always in flight and take so long."""
        count = round(in_flight * TICK_S / seconds)
        return Answers.of([seconds * self.random.lognormvariate(0, self.sigma) for _ in range(count)])

    def run(self, squeeze: Squeeze | Yielding, ticks: int, *, readers_wait: bool = True) -> list[int]:
        """Let time pass; return the limits."""
        return [squeeze.tick(self.see(squeeze.limit, readers_wait=readers_wait)) for _ in range(ticks)]


def test_nobody_waits_and_all_is_allowed() -> None:
    """Without readers the limit is the most, whatever the link does."""
    assert set(Link(0.05, 1e6).run(Yielding(128), 50, readers_wait=False)) == {128}


def test_a_narrow_link_is_filled_and_hardly_queued_on() -> None:
    """Six pieces fill 50 MB/s at 50 ms: beside four readers a load takes two, and sometimes one more."""
    found = Link(0.05, 50e6, readers=4).run(Yielding(128), 300)
    assert max(found) <= 8
    assert max(found[6:]) <= 4
    assert 1.5 <= sum(found[10:]) / len(found[10:]) <= 3.5


def test_a_wide_link_is_taken_within_a_second() -> None:
    """Where nothing queues the limit doubles up to the most, and stays there."""
    found = Link(0.05, 10e9).run(Yielding(128), 300)
    assert found[:7] == [LIMIT_AT_FIRST, 4, 8, 16, 32, 64, 128]
    assert set(found[6:]) == {128}


def test_uneven_latency_is_not_taken_for_a_queue() -> None:
    """Answers as uneven as S3's on a link that nothing fills: a plan and a load come to have most of the limit."""
    for squeeze in (Yielding(128), Squeeze(128)):
        found = Link(0.05, 10e9, readers=4, sigma=0.6).run(squeeze, 300)
        assert sum(found[100:]) / len(found[100:]) >= 64


def test_a_load_pauses_when_readers_fill_the_link() -> None:
    """Ten readers on a link that six requests fill: mostly a load has nothing in flight, and never for good."""
    squeeze = Yielding(128)
    Link(0.05, 50e6).run(squeeze, 4)  # before them
    found = Link(0.05, 50e6, readers=10).run(squeeze, 100)
    assert 0.5 <= found[10:].count(0) / len(found[10:]) <= 0.9
    assert max(found[30:]) == 1


def test_a_load_that_had_the_link_makes_room_for_readers() -> None:
    """It knows the link only with a queue of its own; when four readers come they have it nearly as if alone."""
    squeeze = Yielding(128)
    Link(0.05, 50e6).run(squeeze, 20, readers_wait=False)
    found = Link(0.05, 50e6, readers=4).run(squeeze, 100)
    assert max(found[1:]) <= 16
    assert max(found[20:]) <= 4


def test_a_load_meets_a_queue_and_looks_how_long_readers_wait_without_it() -> None:
    """Eight readers fill the link before it comes: it sees that with nothing in flight, and hardly takes part."""
    squeeze, link = Yielding(128), Link(0.05, 50e6, readers=8)
    found = link.run(squeeze, 100)
    assert 0 in found[:8]
    assert sum(found[20:]) / len(found[20:]) <= 0.7


def test_a_load_finds_out_that_the_path_has_become_longer() -> None:
    """Twice the latency looks like a queue, until it looks again, within two minutes."""
    squeeze = Yielding(128)
    Link(0.05, 10e9, readers=4).run(squeeze, 20)
    found = Link(0.1, 10e9, readers=4).run(squeeze, 800)
    assert min(found[:20]) < 64
    assert found[-1] == 128


def test_a_load_that_hears_nothing_asks_again() -> None:
    """Readers fill the link with requests of another size, which say nothing: after a pause one piece is asked for."""
    squeeze = Yielding(128)
    link = Link(0.05, 50e6, readers=10)
    Link(0.05, 50e6).run(squeeze, 4)
    while squeeze.limit:
        seen = link.see(squeeze.limit)
        squeeze.tick(Tick(seen.own, Answers(), seen.in_flight, 10, True))
    assert 1 in [squeeze.tick(Tick(Answers(), Answers(), 0, 10, True)) for _ in range(40)]


def test_a_plan_never_pauses() -> None:
    """Its readers' misses are what it would have fetched: something of it goes on always."""
    assert min(Link(0.05, 50e6, readers=10).run(Squeeze(128), 200)) >= 1


def test_a_store_that_takes_one_request_gets_one() -> None:
    """A limit of one is neither passed nor left."""
    assert set(Link(0.05, 50e6).run(Yielding(1), 20)) == {1}


def test_readers_that_stop_waiting_give_it_all_back() -> None:
    """The tick after the last miss the load has everything again."""
    squeeze, link = Yielding(128), Link(0.05, 50e6, readers=4)
    assert link.run(squeeze, 20)[-1] < 128
    assert link.run(squeeze, 1, readers_wait=False) == [128]


def test_a_tick_without_answers_changes_nothing() -> None:
    """A store that does not answer, or that is asked nothing, is not asked for less or more because of it."""
    squeeze = Yielding(128)
    before = Link(0.05, 50e6).run(squeeze, 20)[-1]
    assert {squeeze.tick(Tick(Answers(), Answers(), 0, 0, True)) for _ in range(100)} == {before}


def test_a_plan_begins_with_a_batch_and_keeps_a_little_queue() -> None:
    """Sixteen at first; on a link that six fill it comes down to a few more than that, on a wide one it is doubled."""
    link = Link(0.05, 50e6)
    squeeze = Squeeze(128)
    assert squeeze.limit == 16
    squeeze.tick(Tick(Answers(10, 0.08, 0.02), Answers(), 16, 3, True))
    found = link.run(squeeze, 60)[20:]
    assert min(found) >= 6
    assert max(found) <= 12
    assert Link(0.05, 10e9).run(Squeeze(128), 5) == [16, 32, 64, 128, 128]


def test_a_path_that_has_become_longer_is_believed() -> None:
    """Twice the latency looks like a queue; with half as much in flight it is the same, so it is none."""
    squeeze = Squeeze(128)
    Link(0.05, 10e9).run(squeeze, 20)
    found = Link(0.1, 10e9).run(squeeze, 60)
    assert 32 <= min(found) < 128
    assert set(found[30:]) == {128}
