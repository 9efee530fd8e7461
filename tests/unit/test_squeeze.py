"""How little a load takes while readers wait: what fills the link, no queue on it, and more when something is lost.

The link of these tests: a latency, a bandwidth, and pieces of 500 kB that queue when more is in flight than fills it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestra.prefetch.squeeze import (
    FACTOR_MIN_OF_PLANS,
    LIMIT_AT_FIRST,
    LIMIT_AT_FIRST_OF_PLANS,
    LIMIT_MIN,
    Squeeze,
    Tick,
)

PIECE = 500_000


@dataclass
class Link:
    """What a load with a limit sees of a link, with `readers` requests beside it."""

    latency_s: float
    bandwidth: float
    readers: int = 0
    jitter: float = 1.0  # the mean latency over that of the quicker answers
    limits: list[int] = field(default_factory=list)

    def see(self, limit: int, *, readers_wait: bool = True) -> Tick:
        in_flight = (limit + self.readers) * PIECE
        rate = min(self.bandwidth, in_flight / (self.latency_s * self.jitter))
        queued_s = in_flight / rate - self.latency_s * self.jitter
        return Tick(rate, self.latency_s + queued_s, PIECE, self.readers * PIECE, readers_wait)

    def run(self, squeeze: Squeeze, ticks: int, *, readers_wait: bool = True) -> list[int]:
        """Let time pass; return the limits."""
        return [squeeze.tick(self.see(squeeze.limit, readers_wait=readers_wait)) for _ in range(ticks)]


def test_nobody_waits_and_all_is_allowed() -> None:
    """Without readers the limit is the most, whatever the link does."""
    assert set(Link(0.05, 1e6).run(Squeeze(128), 50, readers_wait=False)) == {128}


def test_a_narrow_link_is_filled_and_not_queued_on() -> None:
    """50 MB/s at 50 ms is filled by five pieces: with four readers' there is hardly more than that in flight."""
    link = Link(0.05, 50e6, readers=4)
    found = link.run(Squeeze(128), 300)
    assert max(found) <= 16
    assert all(link.see(limit).rate_bytes_per_s == 50e6 for limit in found), "the link is full all the time"
    assert max(link.see(limit).latency_s for limit in found[8:]) <= 0.15


def test_a_wide_link_is_taken_within_a_second() -> None:
    """Where everything in flight counts, the limit doubles up to the most; looks at the latency are short and rare."""
    assert Squeeze(128).limit == LIMIT_AT_FIRST
    found = Link(0.05, 10e9).run(Squeeze(128), 300)
    assert found[:7] == [2, 4, 8, 16, 32, 64, 128]
    assert found.count(128) >= 0.9 * len(found)


def test_uneven_latency_does_not_starve_a_load() -> None:
    """When the mean answer takes twice as long as the quicker ones, the rate still comes near what it could be."""
    link = Link(0.05, 100e6, readers=4, jitter=2.0)
    found = link.run(Squeeze(128), 200)
    assert sum(link.see(limit).rate_bytes_per_s for limit in found[20:]) / len(found[20:]) >= 0.85 * 100e6


def test_it_never_stops_altogether() -> None:
    """However much readers have in flight, something goes on, and a store that takes one request gets one."""
    squeeze = Squeeze(128)
    assert {squeeze.tick(Tick(50e6, 0.05, PIECE, 10**9, True)) for _ in range(20)} == {LIMIT_AT_FIRST, LIMIT_MIN}
    assert set(Link(0.05, 50e6).run(Squeeze(1), 20)) == {1}


def test_readers_that_stop_waiting_give_it_all_back() -> None:
    """The tick after the last miss the load has everything again."""
    squeeze, link = Squeeze(128), Link(0.05, 50e6, readers=4)
    assert link.run(squeeze, 20)[-1] < 128
    assert link.run(squeeze, 1, readers_wait=False) == [128]


def test_a_tick_without_answers_changes_nothing() -> None:
    """A store that does not answer is not asked for less or more because of it."""
    squeeze = Squeeze(128)
    assert squeeze.tick(Tick(0.0, 0.0, 0.0, 0, True)) == LIMIT_AT_FIRST


def test_a_plan_begins_with_a_batch_and_does_not_double_what_only_queues() -> None:
    """A first window of 16, of which the first answers come after 80 ms and later ones after twice that, is followed
    down to what fills 50 MB/s; on a wide link it is doubled at once."""
    narrow = Squeeze(128, LIMIT_AT_FIRST_OF_PLANS, FACTOR_MIN_OF_PLANS)
    assert narrow.tick(Tick(33e6, 0.08, PIECE, 2 * PIECE, True)) == 16
    assert narrow.tick(Tick(50e6, 0.16, PIECE, 2 * PIECE, True)) == 8
    assert Link(0.05, 10e9).run(Squeeze(128, LIMIT_AT_FIRST_OF_PLANS), 5) == [16, 32, 64, 128, 128]


def test_what_was_learnt_survives_a_pause() -> None:
    """Ticks without anything to fetch leave the limit of a narrow link as it was."""
    squeeze, link = Squeeze(128), Link(0.05, 50e6)
    before = link.run(squeeze, 20)[-1]
    assert {squeeze.tick(Tick(0.0, 0.0, 0.0, 0, True)) for _ in range(100)} == {before}
    assert abs(link.run(squeeze, 1)[0] - before) <= 1
