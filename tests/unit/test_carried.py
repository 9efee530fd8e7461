"""Blocks on their way through the courier: whatever ends them, nothing is kept and nobody waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from orchestra.blocks.store import Placed
from orchestra.config import MountConfig
from orchestra.engine.carried import CarriedParts
from orchestra.engine.courier import Courier, Ended
from orchestra.engine.courier_wire import Place
from orchestra.engine.engine import EngineStatistics, Wanted
from orchestra.engine.mounted import OpenedMount
from orchestra.fetch.budget import ByteBudget, Priority
from orchestra.fetch.fetcher import Fetcher
from orchestra.stores.carrying import Errand, NotCarriedError, Outcome, PlacingStore, Server
from orchestra.values import ByteRange, ObjectInfo
from tests.support.cache import Cache
from tests.support.placing_store import PlacingVersionedStore
from tests.support.ram import ram_folder

SIZE = 100
# What a load may have of it is one object.
BUDGET_BYTES = SIZE * 8 // 7 + 1


class SigningStore(PlacingVersionedStore):
    """A store whose errands are made at once and end as they are said to."""

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None:
        """See PlacingStore."""
        return Errand(Server("http://localhost", 30.0), b"GET", byte_range, info.size_bytes, info.version)

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None:
        """See PlacingStore."""
        if isinstance(outcome, BaseException):
            raise outcome


class HeldCourier(Courier):
    """Takes errands, and does nothing until the test says what came of them."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache.layout, cache.geometry, boot_id=cache.boot_id)
        self.is_up = True
        self.errands: list[Ended] = []
        self.hastened: list[tuple[int, int]] = []
        self.taken_back: list[int] = []

    @property
    def is_ready(self) -> bool:
        """As the test says."""
        return self.is_up

    def send(self, store: PlacingStore, place: Place, errand: Errand, ended: Ended) -> int:
        """Keep it."""
        self.errands.append(ended)
        return len(self.errands) - 1

    def take_back(self, number: int) -> None:
        """Note it."""
        self.taken_back.append(number)

    def hasten(self, number: int, urgency: int) -> None:
        """Note it."""
        self.hastened.append((number, urgency))


class World:
    """Parts of one mount, and what they were brought by otherwise."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.budget = ByteBudget(BUDGET_BYTES)
        self.courier = HeldCourier(cache)
        self.parts = CarriedParts(self.courier, cache.store, Fetcher(self.budget), EngineStatistics())
        self.mount = OpenedMount(MountConfig("/data", ("test://",)), "config", SigningStore())
        self.brought: list[str] = []
        self.urgencies: list[Priority] = []
        self.room_bytes = cache.store.room_bytes()

    def start(self, key: str) -> asyncio.Future[bool]:
        """Have a small object brought."""
        wanted = Wanted(self.mount, ObjectInfo(key, SIZE, 0, "v"), ByteRange(0, SIZE))

        async def otherwise(urgency: Priority) -> bool:
            self.brought.append(key)
            self.urgencies.append(urgency)
            return True

        return self.parts.start(wanted, 0, ByteRange(0, SIZE), [], otherwise)

    def check_nothing_kept(self) -> None:
        """Nothing is under way, granted or reserved."""
        assert not self.parts.under_way
        assert self.budget.used_bytes == 0
        assert self.cache.store.room_bytes() == self.room_bytes


@pytest.fixture
def world() -> Iterator[World]:
    """With an empty cache."""
    with ram_folder() as folder:
        cache = Cache(folder)
        yield World(cache)
        cache.close()


async def test_a_courier_that_dies_leaves_nobody_waiting_however_many_there_are(world: World) -> None:
    """One errand is under way and a thousand wait for the budget: all are brought otherwise, each once."""
    flights = [world.start(f"k{number}") for number in range(1001)]
    assert len(world.courier.errands) == 1
    world.courier.is_up = False
    world.courier.errands[0](NotCarriedError())
    assert await asyncio.gather(*flights) == [True] * 1001
    assert sorted(world.brought) == sorted(f"k{number}" for number in range(1001))
    world.check_nothing_kept()


@pytest.mark.parametrize("outcome", [Placed("/nowhere"), NotCarriedError(), TimeoutError()])
async def test_an_answer_in_the_moment_of_closing_is_no_error(
    world: World, outcome: Placed | NotCarriedError | TimeoutError
) -> None:
    """It comes between the node's decision to give all up and giving this one up."""
    flights = [world.start("k"), world.start("waits")]
    for flight in flights:
        flight.cancel()
    closing = asyncio.create_task(world.parts.close())
    asyncio.get_running_loop().call_soon(world.courier.errands[0], outcome)
    await closing
    world.check_nothing_kept()


async def test_a_published_block_in_the_moment_of_closing_is_no_error(world: World) -> None:
    """As above, of one that has come to its end."""
    path = world.cache.layout.tmp / "placed"
    path.write_bytes(bytes(SIZE))
    flight = world.start("k")
    flight.cancel()
    closing = asyncio.create_task(world.parts.close())
    asyncio.get_running_loop().call_soon(world.courier.errands[0], Placed(str(path)))
    await closing
    assert not world.parts.under_way
    assert world.budget.used_bytes == 0


async def test_closing_takes_errands_back_and_gives_back_what_they_held(world: World) -> None:
    """One that is under way, and one that waits for the budget."""
    flights = [world.start("k"), world.start("waits")]
    for flight in flights:
        flight.cancel()
    await world.parts.close()
    assert world.courier.taken_back == [0]
    world.check_nothing_kept()


async def test_who_waits_for_a_block_that_waits_for_the_budget_waits_for_no_other_errand(world: World) -> None:
    """It is granted before older ones, and goes before what the courier has already; another load changes nothing."""
    first, second, third = world.start("first"), world.start("second"), world.start("third")
    world.parts.hasten(third, Priority.LOAD)
    world.parts.hasten(first, Priority.LOAD)
    assert world.courier.hastened == []
    world.parts.hasten(second, Priority.DEMAND)
    world.courier.errands[0](NotCarriedError())
    assert world.courier.hastened == [(1, Priority.DEMAND)]
    world.courier.errands[1](NotCarriedError())
    world.courier.errands[2](NotCarriedError())
    assert all(await asyncio.gather(first, second, third))
    world.check_nothing_kept()


async def test_a_reader_waits_no_longer_for_what_a_courier_could_not_bring(world: World) -> None:
    """Who waited for the errand, or began to as it failed, is not behind all that the load asks for: it is brought as
    urgently as he wants it."""
    sent, waits, unread = world.start("sent"), world.start("waits"), world.start("unread")
    world.parts.hasten(sent, Priority.DEMAND)
    world.courier.is_up = False
    world.courier.errands[0](NotCarriedError())
    world.parts.hasten(waits, Priority.READAHEAD)
    assert all(await asyncio.gather(sent, waits, unread))
    assert dict(zip(world.brought, world.urgencies, strict=True)) == {
        "sent": Priority.DEMAND,
        "waits": Priority.READAHEAD,
        "unread": Priority.LOAD,
    }
