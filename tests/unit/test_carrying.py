"""Reads that another process carries, through the wrappers around a store."""

from __future__ import annotations

import asyncio

import pytest
from multidict import CIMultiDict

from orchestra.clock import ManualClock
from orchestra.config import FetchConfig
from orchestra.errors import OrchestraError, StaleObjectError, StoreUnavailableError
from orchestra.stores.carrying import Errand, NotCarriedError, Outcome, PlacingStore, Server, as_placing
from orchestra.stores.counting import statistics_of
from orchestra.stores.limit import URGENCY
from orchestra.stores.range_client import RangeAnswer
from orchestra.stores.registry import wrapped
from orchestra.stores.retry import TRIED
from orchestra.stores.translate import Operation, ThrottledError, changed
from orchestra.values import ByteRange, ObjectInfo
from tests.support.placing_store import PlacingVersionedStore
from tests.support.versioned_store import VersionedStore

INFO = ObjectInfo("k", 10, 0, '"v"')
SPAN = ByteRange(0, 5)
SERVER = Server("http://localhost", 30.0)
OTHER_ANSWER = RangeAnswer(503, CIMultiDict(), memoryview(b""))


class SigningStore(PlacingVersionedStore):
    """Its turns are the limit's; says of an answer what the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.can_sign = True
        self.judgement: OrchestraError = StoreUnavailableError("not now")

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None:
        """A request, if it can be signed."""
        return Errand(SERVER, b"GET", byte_range, info.size_bytes, info.version) if self.can_sign else None

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None:
        """Raise what became of it."""
        if isinstance(outcome, RangeAnswer):
            raise self.judgement
        if outcome is not None:
            raise outcome


def placing(inner: VersionedStore, requests_max: int = 8) -> PlacingStore:
    """The store in its wrappers."""
    store = as_placing(wrapped(inner, FetchConfig(requests_max=requests_max), clock=ManualClock()))
    assert store is not None
    return store


def counts(store: PlacingStore) -> tuple[int, int, int, int, int]:
    """Requests, bytes, errors, given up, in flight."""
    now = statistics_of(store)
    return now.read_requests, now.read_bytes, now.errors, now.abandoned, now.requests_in_flight


def sent(store: PlacingStore) -> Errand:
    """An errand on its way."""
    errand = store.errand(INFO, SPAN)
    assert errand is not None
    return errand


def test_an_errand_counts_as_a_read_from_its_making_to_its_end() -> None:
    """With its bytes when they are there; what cannot be signed without waiting is no request."""
    inner = SigningStore()
    store = placing(inner)
    errand = sent(store)
    assert counts(store) == (1, 0, 0, 0, 0)
    store.conclude(errand, INFO, None)
    assert counts(store) == (1, 5, 0, 0, 0)
    inner.can_sign = False
    assert store.errand(INFO, SPAN) is None
    assert counts(store) == (1, 5, 0, 0, 0)


@pytest.mark.parametrize(
    ("outcome", "errors", "abandoned"),
    [(OTHER_ANSWER, 1, 0), (NotCarriedError(), 0, 1), (asyncio.CancelledError(), 0, 1)],
    ids=["refused", "not carried", "taken back"],
)
def test_what_came_to_nothing_is_said_and_counted(outcome: Outcome, errors: int, abandoned: int) -> None:
    """The error comes out once and as it is, and there are no bytes."""
    store = placing(SigningStore())
    with pytest.raises((StoreUnavailableError, NotCarriedError, asyncio.CancelledError)):
        store.conclude(sent(store), INFO, outcome)
    assert counts(store) == (1, 0, errors, abandoned, 0)


def test_a_throttled_errand_halves_the_window() -> None:
    """As a throttled read does; another one of the same window does not halve it again."""
    inner = SigningStore()
    inner.judgement = ThrottledError("slow down")
    store = placing(inner, requests_max=8)
    for errand in [sent(store) for _ in range(2)]:
        with pytest.raises(ThrottledError):
            store.conclude(errand, INFO, OTHER_ANSWER)
    assert (statistics_of(store).requests_limit, statistics_of(store).throttled) == (4, 2)


def test_an_object_replaced_meanwhile_is_stale() -> None:
    """Other errors than a store's being unavailable come out as they are."""
    inner = SigningStore()
    inner.judgement = changed(Operation("read", "k", "s3://b/"), was='"v"', now='"w"')
    store = placing(inner)
    with pytest.raises(StaleObjectError):
        store.conclude(sent(store), INFO, OTHER_ANSWER)


def test_turns_are_taken_by_urgency_and_age_and_passed_on_by_who_does_not_want_one() -> None:
    """Of four turns one is kept for readers; one that comes back goes to the most urgent that wants it."""
    store, order = placing(SigningStore(), requests_max=4), list[str]()

    def take(name: str, urgency: int, *, wants: bool = True) -> None:
        def granted() -> bool:
            order.append(name)
            return wants

        store.take_turn(name, urgency, granted)

    for name in "abc":
        take(name, 3)
    take("d", 3)
    take("e", 3, wants=False)
    take("f", 3)
    assert (order, counts(store)[4]) == (["a", "b", "c"], 3)
    take("reader", 0)
    take("second reader", 0)
    assert (order[3:], counts(store)[4]) == (["reader"], 4)
    for _ in range(4):
        store.give_turn_back()
    assert (order[4:], counts(store)[4]) == (["second reader", "d", "e", "f"], 3)


def test_who_keeps_turns_is_told_how_many_others_should_have() -> None:
    """All that more urgent ones wait for; of those as urgent, what is above half; none for the less urgent."""
    store = placing(SigningStore(), requests_max=8)
    for _ in range(7):
        store.take_turn("keeper", 3, lambda: True)
    assert store.turns_wanted("keeper", 3, 7) == 0
    store.take_turn("keeper", 3, lambda: True)
    store.take_turn("later", 4, lambda: True)
    assert store.turns_wanted("keeper", 3, 7) == 0
    for _ in range(5):
        store.take_turn("equal", 3, lambda: True)
    assert [store.turns_wanted("keeper", 3, turns) for turns in (7, 5, 4, 2)] == [3, 1, 0, 0]
    for _ in range(3):
        store.take_turn("reader", 0, lambda: True)  # the first has the turn that is kept for readers
    assert store.turns_wanted("keeper", 3, 4) == 3


async def test_the_try_after_an_errand_waits_as_a_second_one() -> None:
    """A store that asked for a pause gets it, once."""
    inner, waits = SigningStore(), list[float]()
    inner.put("k", b"0123456789")

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    store = wrapped(inner, FetchConfig(), clock=ManualClock(), sleep=sleep)
    info = await store.head("k")
    TRIED.set(StoreUnavailableError("not now", retry_after_s=7.0))
    assert bytes(await store.read(info, SPAN)) == b"01234"
    assert bytes(await store.read(info, SPAN)) == b"01234"
    assert waits == [7.0]
    assert URGENCY.get() == 0


def test_wrappers_carry_nothing_for_a_store_that_cannot() -> None:
    """A store without it is none inside its wrappers either."""
    assert as_placing(wrapped(VersionedStore(), FetchConfig(), clock=ManualClock())) is None
