"""The budget of bytes in flight: bounded, in order of urgency, and back at zero when nothing is in flight."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.fetch.budget import ByteBudget, Priority

BACKGROUND, DEMAND, READAHEAD = Priority.BACKGROUND, Priority.DEMAND, Priority.READAHEAD


async def settled() -> None:
    """Let everything that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


class Grants:
    """Requests of a test, and the order in which they were granted."""

    def __init__(self, budget: ByteBudget) -> None:
        self.budget = budget
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, size: int, priority: Priority) -> asyncio.Task[None]:
        async def acquire() -> None:
            await self.budget.acquire(size, priority)
            self.order.append(name)

        self.tasks[name] = asyncio.create_task(acquire())
        await settled()
        return self.tasks[name]


async def test_what_fits_is_granted_at_once() -> None:
    """Requests within the budget wait for nothing."""
    budget = ByteBudget(100)
    await budget.acquire(60, DEMAND)
    await budget.acquire(40, READAHEAD)
    assert budget.used_bytes == 100
    assert budget.waiting_count == 0


async def test_what_nobody_waits_for_leaves_room_for_a_reader() -> None:
    """However much is loaded ahead, an eighth of the budget is there for a demand, which is granted at once."""
    grants = Grants(ByteBudget(80))
    for number in range(10):
        await grants.ask(f"load {number}", 10, Priority.LOAD)
    assert grants.budget.used_bytes == 70
    await grants.ask("demand", 10, DEMAND)
    assert grants.order == [*(f"load {number}" for number in range(7)), "demand"]
    grants.budget.release(10)
    await settled()
    assert grants.order[-1] == "demand"


async def test_the_budget_bounds_what_is_in_flight() -> None:
    """What does not fit waits until enough was given back."""
    grants = Grants(ByteBudget(100))
    await grants.ask("a", 60, DEMAND)
    await grants.ask("b", 50, DEMAND)
    assert grants.order == ["a"]
    grants.budget.release(60)
    await settled()
    assert grants.order == ["a", "b"]
    assert grants.budget.peak_bytes == 60


async def test_the_more_urgent_goes_first() -> None:
    """Whoever came first, demand is granted before read-ahead, and that before the background; equals by age."""
    grants = Grants(ByteBudget(10))
    await grants.ask("running", 10, DEMAND)
    for name, priority in [
        ("background", BACKGROUND),
        ("ahead 1", READAHEAD),
        ("ahead 2", READAHEAD),
        ("demand", DEMAND),
    ]:
        await grants.ask(name, 10, priority)
    for _ in range(5):
        grants.budget.release(10)
        await settled()
    assert grants.order == ["running", "demand", "ahead 1", "ahead 2", "background"]
    assert grants.budget.used_bytes == 0


async def test_a_large_request_is_not_starved_by_small_ones() -> None:
    """Nobody slips past the one whose turn it is, though he would fit."""
    grants = Grants(ByteBudget(10))
    await grants.ask("running", 5, DEMAND)
    await grants.ask("large", 10, DEMAND)
    await grants.ask("small", 1, DEMAND)
    assert grants.order == ["running"]
    grants.budget.release(5)
    await settled()
    assert grants.order == ["running", "large"]


async def test_a_request_beyond_the_whole_budget_goes_alone() -> None:
    """What could never fit is granted when nothing else is in flight."""
    grants = Grants(ByteBudget(10))
    await grants.ask("running", 1, DEMAND)
    await grants.ask("huge", 1000, DEMAND)
    assert grants.order == ["running"]
    grants.budget.release(1)
    await settled()
    assert grants.order == ["running", "huge"]
    grants.budget.release(1000)
    assert grants.budget.used_bytes == 0


async def test_a_cancelled_request_leaves_the_queue() -> None:
    """Whoever gives up takes nothing, and those behind him move up."""
    grants = Grants(ByteBudget(10))
    await grants.ask("running", 8, DEMAND)
    first = await grants.ask("gives up", 10, DEMAND)
    await grants.ask("behind", 2, DEMAND)
    first.cancel()
    await settled()
    assert grants.order == ["running", "behind"]
    assert grants.budget.used_bytes == 10
    assert grants.budget.waiting_count == 0


async def test_cancelled_in_the_moment_of_the_grant_gives_it_back() -> None:
    """A grant that nobody takes any more is not lost."""
    grants = Grants(ByteBudget(10))
    await grants.ask("running", 10, DEMAND)
    waiting = await grants.ask("cancelled", 10, DEMAND)
    grants.budget.release(10)  # grants, but the task has not run yet
    waiting.cancel()
    await settled()
    assert waiting.cancelled()
    assert grants.budget.used_bytes == 0


async def test_what_was_only_read_ahead_is_hastened_by_demand() -> None:
    """A request that becomes urgent while it waits goes before others that came earlier."""
    grants = Grants(ByteBudget(10))
    await grants.ask("running", 10, DEMAND)
    await grants.ask("ahead 1", 10, READAHEAD)
    second = await grants.ask("ahead 2", 10, READAHEAD)
    grants.budget.hasten(second, DEMAND)
    grants.budget.hasten(second, BACKGROUND)  # never makes less urgent
    for _ in range(3):
        grants.budget.release(10)
        await settled()
    assert grants.order == ["running", "ahead 2", "ahead 1"]


async def test_more_cannot_be_given_back_than_was_taken() -> None:
    """A release without its acquire is a bug, and is caught."""
    with pytest.raises(AssertionError, match="more was released"):
        ByteBudget(10).release(1)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 15), st.sampled_from(Priority)),
        st.tuples(st.just("release"), st.integers(0, 20), st.none()),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.none()),
    ),
    max_size=40,
)


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_the_gauge_comes_back_to_zero(steps: list[tuple[str, int, Priority | None]]) -> None:
    """After any mix of requests, releases and cancellations: never over the limit but for a lone giant, and zero in
    the end with nobody waiting."""

    async def play() -> None:
        budget = ByteBudget(10)
        held: list[int] = []
        tasks: list[asyncio.Task[None]] = []

        async def acquire(size: int, priority: Priority) -> None:
            await budget.acquire(size, priority)
            held.append(size)

        for what, number, priority in steps:
            if what == "ask" and priority is not None:
                tasks.append(asyncio.create_task(acquire(number, priority)))
            elif what == "release" and held:
                budget.release(held.pop(number % len(held)))
            elif what == "cancel" and tasks:
                tasks.pop(number % len(tasks)).cancel()
            if number % 2:
                await settled()
            assert budget.used_bytes <= 10 or len(held) <= 1
        await settled()
        while held:
            budget.release(held.pop())
            await settled()
        assert budget.used_bytes == 0
        assert budget.waiting_count == 0
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(play())


def test_who_takes_without_a_task_waits_as_one_does() -> None:
    """By urgency and age, raised under the name that was given; who says no any more leaves it to the next."""
    budget, order = ByteBudget(80), list[str]()

    def take(name: str, size: int, priority: Priority, *, wants: bool = True) -> None:
        def granted() -> bool:
            order.append(name)
            return wants

        budget.take(name, size, priority, granted)

    take("first", 70, Priority.LOAD)
    take("declined", 10, DEMAND, wants=False)
    for name in ("second", "third", "fourth"):
        take(name, 70, Priority.LOAD, wants=name != "second")
    budget.hasten("fourth", Priority.PLAN)
    assert (order, budget.used_bytes, budget.waiting_count) == (["first", "declined"], 70, 3)
    budget.release(70)
    assert (order[2:], budget.used_bytes) == (["fourth"], 70)
    budget.release(70)
    assert (order[3:], budget.used_bytes) == (["second", "third"], 70)
    budget.release(70)
    assert (budget.used_bytes, budget.waiting_count) == (0, 0)
