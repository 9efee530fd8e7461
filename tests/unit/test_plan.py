"""What a plan says to do next: never behind the reader, never further than it may, the nearest first."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.errors import UsageError
from orchestra.prefetch.plan import (
    AHEAD_STEPS_MAX,
    IndexSet,
    PlanLimits,
    Standing,
    Timeline,
    ahead_limit_bytes,
    most_urgent,
    next_rate,
    packed_samples,
    steps_to_look_at,
    unpacked_samples,
)
from orchestra.units import GIB, MIB


def samples(*indexes: int) -> array[int]:
    return array("I", indexes)


# -- the line of steps ---------------------------------------------------------------------------------------------


def test_epochs_follow_one_another() -> None:
    """The first step of an epoch comes after the last of the one before; what is not known ends what is known."""
    line = Timeline()
    line.put(0, 0, 3, samples(7, 8, 9))
    line.put(1, 0, 4, samples(5, 6))
    assert [line.index_at(step) for step in range(6)] == [7, 8, 9, 5, 6, None]
    assert line.known_stop == 5
    assert line.step_of(1, 2) == 5
    assert line.step_of(2, 0) is None


def test_an_order_comes_in_parts() -> None:
    """A part goes on where the last one ended; a gap or an overlap is refused."""
    line = Timeline()
    line.put(0, 0, 4, samples(3, 1))
    with pytest.raises(UsageError):
        line.put(0, 3, 4, samples(2))
    with pytest.raises(UsageError):
        line.put(0, 1, 4, samples(2))
    line.put(0, 2, 4, samples(2, 0))
    assert [line.index_at(step) for step in range(4)] == [3, 1, 2, 0]
    with pytest.raises(UsageError):
        line.put(0, 4, 4, samples(1))


def test_an_epoch_told_again_changes_nothing_if_it_is_the_same() -> None:
    """What was known of the next epoch stays when an epoch is published once more, and goes if it is another."""
    line = Timeline()
    line.put(0, 0, 2, samples(1, 0))
    line.put(1, 0, 2, samples(0, 1))
    assert not line.put(0, 0, 2, samples(1, 0))
    assert line.index_at(2) == 0
    assert line.put(0, 0, 2, samples(0, 1))
    assert line.index_at(0) == 0
    assert line.index_at(2) is None


def test_epochs_that_are_over_are_dropped_and_steps_go_on() -> None:
    """Memory holds the epoch that is read and the next; a step means the same before and after."""
    line = Timeline()
    for epoch in range(4):
        line.put(epoch, 0, 2, samples(epoch, epoch))
        line.forget_before(2 * epoch)
    assert line.index_at(5) is None
    assert line.index_at(6) == 3
    assert line.step_of(3, 1) == 7
    assert (line.length_of(3), line.length_of(4)) == (2, 0)


def test_the_next_use_is_in_an_epoch_to_come() -> None:
    """A sample that was read is used again where the next epoch has it first; unknown is unknown."""
    line = Timeline()
    line.put(0, 0, 3, samples(0, 1, 2))
    line.put(1, 0, 3, samples(2, 2))
    assert line.use_after(0, 2) == 3
    assert line.use_after(0, 1) is None
    line.put(1, 2, 3, samples(1))
    assert line.use_after(0, 1) == 5
    assert line.use_after(3, 2) is None
    assert line.use_after(0, 999) is None


# -- how far -------------------------------------------------------------------------------------------------------


def standing(**changes: float) -> Standing:
    values = {"position": 0, "frontier": 0, "known_stop": 10**6, "ahead_bytes": 0, "in_flight": 0, **changes}
    mean = values.pop("size_mean_bytes", 100.0)
    return Standing(**{name: int(value) for name, value in values.items()}, size_mean_bytes=mean)


def test_as_many_as_may_be_in_flight_are_started() -> None:
    """The next steps, in order, up to the limit of requests."""
    assert steps_to_look_at(standing(frontier=5, in_flight=3), PlanLimits(10**9, 8)) == range(5, 10)


def test_bytes_ahead_are_bounded() -> None:
    """By the mean size of what was seen; when that is reached nothing is started until the reader goes on."""
    assert len(steps_to_look_at(standing(ahead_bytes=700), PlanLimits(1000, 64))) == 3
    assert not steps_to_look_at(standing(ahead_bytes=1000), PlanLimits(1000, 64))


def test_a_file_larger_than_all_that_may_be_ahead_is_fetched_alone() -> None:
    """Else a data set of large files would never be ahead at all."""
    assert len(steps_to_look_at(standing(size_mean_bytes=5000.0), PlanLimits(1000, 64))) == 1
    assert not steps_to_look_at(standing(size_mean_bytes=5000.0, ahead_bytes=5000), PlanLimits(1000, 64))


def test_steps_ahead_are_bounded_and_the_end_is_the_end() -> None:
    """However small the files are, memory for steps ahead has a limit; and nothing lies behind what is known."""
    limits = PlanLimits(10**12, 10**6)
    assert steps_to_look_at(standing(position=10, frontier=10), limits).stop == 10 + AHEAD_STEPS_MAX
    assert steps_to_look_at(standing(frontier=3, known_stop=7), limits) == range(3, 7)
    assert not steps_to_look_at(standing(frontier=7, known_stop=7), limits)


@given(
    st.integers(0, 10**6),
    st.integers(-200, 10**5),
    st.integers(0, 10**6),
    st.integers(0, 10**9),
    st.integers(0, 200),
    st.one_of(st.just(0.0), st.floats(1, 10**8)),
    st.integers(-(10**6), 10**9),
    st.integers(0, 128),
)
def test_limits_hold_for_every_standing(
    position: int, lead: int, known: int, ahead: int, flying: int, mean: float, ahead_max: int, flying_max: int
) -> None:
    """Whatever the marks are: in order from the frontier, known, within requests, steps and (but for one) bytes."""
    now = Standing(position, max(0, position + lead), known, ahead, flying, mean)
    steps = steps_to_look_at(now, PlanLimits(ahead_max, flying_max))
    assert steps.start == now.frontier or not steps
    assert len(steps) <= max(0, flying_max - flying)
    if steps:
        assert steps.stop <= min(known, position + AHEAD_STEPS_MAX)
        assert ahead + (len(steps) - 1) * mean <= max(ahead_max, 0) or mean == 0


def test_room_that_is_free_is_used_first() -> None:
    """While the cache has room, a plan is as far ahead as there is room; when it is full, a share of it."""

    def limit(room: int, capacity: int = 64 * GIB, rate: float = 0.0) -> int:
        return ahead_limit_bytes(
            room_bytes=room,
            ahead_bytes=MIB,
            capacity_bytes=capacity,
            rate_bytes_per_s=rate,
        )

    assert limit(40 * GIB) == 40 * GIB + MIB
    assert limit(0) == GIB
    assert limit(-GIB) == GIB
    assert limit(0, rate=1000 * MIB) == 2000 * MIB
    assert limit(0, rate=100 * GIB) == 4 * GIB
    assert limit(0, capacity=64 * MIB) == MIB
    assert limit(0, capacity=64 * MIB, rate=GIB) == 4 * MIB


def test_whose_reader_is_nearest_is_fetched_for_first() -> None:
    """Of several ranks the one that would wait first."""
    assert most_urgent([500, 20, 300]) == 1


def test_rates_follow_slowly_and_never_divide_by_nothing() -> None:
    """The first observation counts whole; no time passed says nothing."""
    rate = next_rate(0.0, 100, 1.0)
    assert rate == 100
    assert 100 < next_rate(rate, 200, 1.0) < 200
    assert next_rate(rate, 5, 0.0) == rate


@given(st.sets(st.integers(0, 20_000)))
def test_a_set_of_indexes_is_a_set(indexes: set[int]) -> None:
    """What was added is in it and nothing else, until it is cleared."""
    held = IndexSet()
    for index in indexes:
        held.add(index)
    assert {index for index in range(20_001) if index in held} == indexes
    held.clear()
    assert not any(index in held for index in indexes)


def test_an_order_travels_as_32_bits_each() -> None:
    """Golden: little-endian, and a body that was cut is refused."""
    assert packed_samples(samples(1, 258)) == b"\x01\0\0\0\x02\x01\0\0"
    assert unpacked_samples(b"\x01\0\0\0\x02\x01\0\0") == samples(1, 258)
    with pytest.raises(UsageError):
        unpacked_samples(b"\x01\0\0")
