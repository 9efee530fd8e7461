"""The turns that a store's courier keeps from one errand to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from orchestra.engine.courier_wire import Kind
from orchestra.engine.lanes import Lane
from orchestra.fetch.budget import Priority
from orchestra.stores.limit import RequestWindow
from tests.support.placing_store import PlacingVersionedStore

LIMIT = 8
FOR_LOADS = 7  # one is kept for readers


class WindowedStore(PlacingVersionedStore):
    """A store of which only the turns are asked for."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.window = RequestWindow(limit)

    def take_turn(self, who: object, urgency: int, granted: Callable[[], bool]) -> None:
        """See PlacingStore."""
        self.window.take(who, urgency, granted)

    def give_turn_back(self) -> None:
        """See PlacingStore."""
        self.window.give_back()

    def turns_wanted(self, who: object, urgency: int, turns: int) -> int:
        """See PlacingStore."""
        return self.window.wanted_of(who, urgency, turns)


class World:
    """A lane, and a courier that does what it is told."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.store = WindowedStore(limit)
        self.lane = Lane(self.store, self.hear)
        self.turns = self.shed = self.under_way = self.waiting = 0
        self.has_heard = asyncio.Event()
        self.others: list[str] = []
        self.left = 0
        self.has_hastened = False

    def hear(self, kind: Kind, count: int) -> None:
        """GRANT and SHED."""
        if kind is Kind.GRANT:
            self.turns += count
        else:
            self.shed += count
        self.has_heard.set()

    def go_on(self) -> None:
        """As the courier does after whatever happened."""
        returned = min(self.shed, self.turns - self.under_way)
        if returned > 0:
            self.turns -= returned
            self.shed -= returned
            self.lane.returned(returned)
        started = min(self.waiting, self.turns - self.under_way)
        self.waiting -= started
        self.under_way += started

    def send(self, count: int) -> None:
        """So many errands."""
        for _ in range(count):
            self.waiting += 1
            self.lane.begin()
        self.go_on()

    def end(self, count: int) -> None:
        """So many of those under way have ended."""
        count = min(count, self.under_way)
        self.under_way -= count
        self.go_on()  # the next are sent before the daemon hears of it
        if count:
            self.lane.end(count)
            self.go_on()

    def ask(self, name: str, urgency: int) -> None:
        """Somebody else wants a turn."""

        def granted() -> bool:
            self.others.append(name)
            return True

        self.store.window.take(name, urgency, granted)

    def leave(self) -> None:
        """Somebody else is done."""
        if self.others:
            self.others.pop()
            self.left += 1
            self.store.window.give_back()
            self.go_on()

    def check(self) -> None:
        """What holds at every moment."""
        window = self.store.window
        assert window.in_flight == self.lane.turns + len(self.others) <= LIMIT
        assert self.under_way <= self.turns <= self.lane.turns
        assert self.under_way <= FOR_LOADS or self.has_hastened


async def test_turns_stay_with_the_courier_from_errand_to_errand() -> None:
    """A hundred errands take seven turns once, and each next one is under way before the daemon knows of it."""
    world = World()
    world.send(20)
    assert (world.under_way, world.waiting, world.lane.turns) == (7, 13, 7)
    for _ in range(10):
        world.end(3)
        assert world.under_way == 7
        world.send(3)
        world.check()
    assert world.store.window.in_flight == 7


async def test_a_reader_gets_the_next_turn_that_is_free() -> None:
    """The first takes what is kept for readers; two more get what comes back, before the load goes on with it."""
    world = World()
    world.send(20)
    for name in ("first", "second", "third"):
        world.ask(name, Priority.DEMAND)
    assert world.others == ["first"]
    world.end(1)  # the turn was taken for the next errand already
    world.end(1)
    world.end(1)
    assert sorted(world.others) == ["first", "second", "third"]
    world.check()
    for _ in range(3):
        world.leave()
    world.end(1)
    assert (world.under_way, world.store.window.in_flight) == (7, 7)


async def test_another_load_gets_half_of_the_turns() -> None:
    """Whoever is as urgent waits for no more than that, and takes no more while both want them."""
    world = World()
    world.send(100)
    for number in range(20):
        world.ask(f"other {number}", Priority.LOAD)
    for _ in range(30):
        world.end(2)
        world.check()
    assert (len(world.others), world.lane.turns) == (3, 4)


async def test_a_throttled_window_shrinks_the_courier_as_well() -> None:
    """Half of what is in flight, as the answers come in."""
    world = World()
    world.send(20)
    window = world.store.window
    window.note(window.ticket, was_throttled=True, succeeded=False)
    for _ in range(5):  # the first ends before anybody knows that it is to be the last
        world.end(1)
    assert (window.limit, window.in_flight, world.under_way) == (4, 3, 3)


async def test_a_window_that_grows_again_is_used_again() -> None:
    """After a storm the turns stay with the courier, so that none comes back to tell it of the next one: the answers
    do."""
    world = World()
    world.send(100)
    window = world.store.window
    for _ in range(3):
        window.note(window.ticket, was_throttled=True, succeeded=False)
    for _ in range(10):
        world.end(1)
    assert (window.limit, world.under_way) == (1, 1)
    for _ in range(60):
        window.note(window.ticket, was_throttled=False, succeeded=True)
        world.end(1)
        world.check()
    assert (window.limit, world.under_way) == (LIMIT, FOR_LOADS)


async def test_errands_that_came_while_all_turns_went_back_get_others() -> None:
    """Asked for while the old ones are on their way home, another's request goes first; what is home wakes the lane."""
    world = World()
    world.send(5)
    world.end(5)
    world.has_heard.clear()
    async with asyncio.timeout(10):
        await world.has_heard.wait()  # five are asked back, and not here yet
    for name in ("first", "second", "third"):
        world.ask(name, Priority.DEMAND)
    world.waiting += 1
    world.lane.begin()
    world.ask("other load", Priority.LOAD)
    for _ in range(2):  # readers are done: it would be the lane's turn, which seems to have more than half
        world.others.pop()
        world.store.window.give_back()
    assert world.others == ["first", "other load"]
    world.go_on()
    assert (world.under_way, world.lane.turns) == (1, 1)
    world.check()


async def test_a_reader_of_a_waiting_errand_needs_no_turn_of_the_loads() -> None:
    """Readers have all turns and more of them wait: the errand that one of them wants goes before those that came
    later."""
    world = World()
    for number in range(LIMIT):
        world.ask(f"reader {number}", Priority.DEMAND)
    world.send(3)
    world.lane.hasten(Priority.DEMAND)
    world.ask("later reader", Priority.DEMAND)
    world.leave()
    assert (world.under_way, world.lane.turns) == (1, 1)
    world.leave()
    assert (world.under_way, len(world.others)) == (1, LIMIT - 1)


async def test_of_two_turns_the_one_for_loads_goes_from_one_to_the_other() -> None:
    """A load with a courier leaves it to a listing, or another load, that waits."""
    world = World(2)
    world.send(10)
    world.ask("listing", Priority.LOAD)
    for _ in range(4):  # the lane has asked for it before
        world.end(1)
    assert world.others == ["listing"]
    world.leave()
    assert world.under_way == 1


async def test_idle_turns_go_back() -> None:
    """Without errands the courier keeps them for a moment, and then nobody's requests are fewer for it."""
    world = World()
    world.send(7)
    world.end(7)
    assert world.store.window.in_flight == 7
    world.has_heard.clear()
    async with asyncio.timeout(10):
        await world.has_heard.wait()
    world.go_on()
    assert (world.store.window.in_flight, world.turns) == (0, 0)


async def test_a_courier_that_died_has_no_turns() -> None:
    """All are free at once, and what ends afterwards gives back nothing more."""
    world = World()
    world.send(20)
    world.lane.close()
    world.lane.end(20)
    assert (world.store.window.in_flight, world.lane.turns) == (0, 0)
    world.ask("reader", Priority.DEMAND)
    assert world.others == ["reader"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["send", "end", "demand", "load", "later", "leave", "throttle", "grow", "hasten"]),
            st.integers(1, 9),
        ),
        max_size=60,
    )
)
def test_whatever_happens_turns_are_neither_lost_nor_made(steps: list[tuple[str, int]]) -> None:
    """In any order of errands, others, and throttling: what is in flight is what somebody has, never above the limit;
    in the end everything is sent, and nothing is kept."""

    async def play() -> None:
        world = World()
        window = world.store.window
        for number, (step, count) in enumerate(steps):
            match step:
                case "send":
                    world.send(count)
                case "end":
                    world.end(count)
                case "leave":
                    world.leave()
                case "throttle":
                    window.note(window.ticket, was_throttled=True, succeeded=False)
                case "hasten":
                    if world.under_way + world.waiting:  # else there is nothing to wait for
                        world.has_hastened = True
                        world.lane.hasten(Priority.DEMAND)
                        world.go_on()
                case "grow":
                    for _ in range(count):
                        window.note(window.ticket, was_throttled=False, succeeded=True)
                case _:
                    urgency = {"demand": Priority.DEMAND, "load": Priority.LOAD, "later": Priority.BACKGROUND}[step]
                    world.ask(f"{step} {number}", urgency)
            world.check()
        while world.others or world.under_way or world.waiting:
            before = (world.left, world.under_way + world.waiting)
            world.leave()
            world.end(1)
            world.check()
            assert before != (world.left, world.under_way + world.waiting), "nothing goes on"
        async with asyncio.timeout(10):
            while window.in_flight:
                world.leave()  # of those whose turn came only now
                if world.lane.turns and not world.others:
                    world.has_heard.clear()
                    await world.has_heard.wait()
                    world.go_on()
        assert world.turns == world.lane.turns == 0

    asyncio.run(play())
