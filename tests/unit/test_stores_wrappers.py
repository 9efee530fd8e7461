"""The wrappers around a store: counts, timeout, limit, retry; each adds one quality and forwards everything else."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.clock import ManualClock
from orchestra.config import FetchConfig
from orchestra.errors import NotFoundError, StaleObjectError, StoreError, StoreUnavailableError, from_wire, to_wire
from orchestra.stores.contract import Buffer, ListPage, UnderStore
from orchestra.stores.counting import CountingStore, StoreStatistics, statistics_of
from orchestra.stores.limit import PATIENT_URGENCY, LimitedStore, RequestWindow
from orchestra.stores.pages import PagedListing, listing_that_arrives_whole
from orchestra.stores.registry import wrapped
from orchestra.stores.retry import RetryPolicy, RetryStore, backoff_s
from orchestra.stores.timeout import TimeoutStore
from orchestra.stores.translate import ThrottledError
from orchestra.testing.fault_store import Cut, Delay, Fail, FaultStore, Flip, Stall, Swap
from orchestra.values import ByteRange, ObjectInfo

INFO = ObjectInfo("k", 5, 1, "v")
SPAN = ByteRange(0, 5)


class ScriptedStore:
    """Answers at once, and writes down what it was asked."""

    store_id = "test://store"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.statistics_calls = 0

    async def head(self, key: str) -> ObjectInfo:
        self.calls.append(("head", key))
        return INFO

    def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        self.calls.append(("list_directory", prefix))

        async def fetch() -> list[ListPage]:
            return [ListPage((INFO,), ()), ListPage((), ("d/",))]

        return listing_that_arrives_whole(fetch)

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        self.calls.append(("read", info, byte_range))
        return b"hello"

    async def probe(self) -> None:
        self.calls.append(("probe",))

    async def close(self) -> None:
        self.calls.append(("close",))


class Waits:
    """Sleeps without waiting: moves the clock."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.slept_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.clock.advance(seconds)


def retrying(inner: UnderStore, waits: Waits, *, deadline_s: float = 60.0) -> RetryStore:
    return RetryStore(
        inner, RetryPolicy(deadline_s=deadline_s), clock=waits.clock, chance=lambda: 0.5, sleep=waits.sleep
    )


WRAPPERS: dict[str, Callable[[UnderStore], UnderStore]] = {
    "counting": CountingStore,
    "timeout": lambda inner: TimeoutStore(inner, attempt_timeout_s=5.0),
    "limit": lambda inner: LimitedStore(inner, requests_max=2),
    "retry": lambda inner: retrying(inner, Waits()),
    "fault": FaultStore,
    "all": lambda inner: wrapped(inner, FetchConfig(), clock=ManualClock()),
}


@pytest.mark.parametrize("name", WRAPPERS)
async def test_every_wrapper_forwards_every_method(name: str) -> None:
    """Each method of the protocol reaches the wrapped store once, with its arguments, and its answer comes back."""
    inner = ScriptedStore()
    store = WRAPPERS[name](inner)
    answers: dict[str, Any] = {
        "store_id": store.store_id,
        "head": await store.head("k"),
        "list_directory": [page async for page in store.list_directory("p/")],
        "read": bytes(await store.read(INFO, SPAN)),
        "probe": None,
        "close": None,
    }
    await store.probe()
    await store.close()
    members = {name for name in vars(UnderStore) if not name.startswith("_")}
    assert set(answers) == members, "a method was added to the protocol: forward it, and say so here"
    assert inner.calls == [("head", "k"), ("list_directory", "p/"), ("read", INFO, SPAN), ("probe",), ("close",)]
    assert answers["store_id"] == "test://store"
    assert answers["head"] == INFO
    assert answers["list_directory"] == [ListPage((INFO,), ()), ListPage((), ("d/",))]
    assert answers["read"] == b"hello"


@pytest.mark.parametrize("name", WRAPPERS)
async def test_every_wrapper_passes_final_errors_on(name: str) -> None:
    """An error that no retry mends comes through each wrapper as it is, after one request."""
    faulty = FaultStore(ScriptedStore())
    store = WRAPPERS[name](faulty)
    for error in (NotFoundError("a"), StaleObjectError("b"), StoreError("c")):
        fault = faulty.inject(Fail(error), on="read")
        with pytest.raises(type(error), match=str(error)):
            await store.read(INFO, SPAN)
        assert fault.fired == 1


# counting


async def test_counts_say_what_was_asked() -> None:
    """Requests by kind, bytes, errors and abandoned calls are counted; a missing object is an answer, not an error."""
    faulty = FaultStore(ScriptedStore())
    store = CountingStore(faulty)
    await store.head("k")
    await store.read(INFO, SPAN)
    assert len([page async for page in store.list_directory("")]) == 2
    await store.probe()
    faulty.inject(Fail(NotFoundError("gone")), on="head")
    faulty.inject(Fail(StoreUnavailableError("503")), on="read")
    stall = faulty.inject(Stall(), on="read", at=2)
    with pytest.raises(NotFoundError):
        await store.head("k")
    with pytest.raises(StoreUnavailableError):
        await store.read(INFO, SPAN)
    reading = asyncio.create_task(store.read(INFO, SPAN))
    await stall.wait_fired()
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading
    assert store.statistics() == StoreStatistics(
        head_requests=2, list_requests=2, read_requests=3, probe_requests=1, read_bytes=5, errors=1, abandoned=1
    )
    assert store.statistics().requests == 8


async def test_composed_statistics_hold_every_layer() -> None:
    """The outermost store reports attempts, retries, throttling and the limit in one record."""
    waits = Waits()
    faulty = FaultStore(ScriptedStore())
    fetch = FetchConfig(requests_max=8)
    store = wrapped(faulty, fetch, clock=waits.clock, chance=lambda: 0.5, sleep=waits.sleep)
    faulty.inject(Fail(ThrottledError("slow down")), on="read", times=2)
    await store.read(INFO, SPAN)
    found = store.statistics()
    assert (found.read_requests, found.retries, found.throttled, found.errors) == (3, 2, 2, 2)
    assert found.requests_in_flight == 0
    assert 1 <= found.requests_limit < 8


async def test_a_store_that_does_not_count_has_zeros() -> None:
    """Statistics of a bare store are zeros."""
    assert statistics_of(ScriptedStore()) == StoreStatistics()


# timeout


async def test_an_attempt_without_answer_is_unavailable() -> None:
    """A request that does not end in its time becomes StoreUnavailableError, which names the store and the time."""
    faulty = FaultStore(ScriptedStore())
    stall = faulty.inject(Stall(), on="head")
    with pytest.raises(StoreUnavailableError, match=r"test://store: no answer within 0\.01s"):
        await TimeoutStore(faulty, attempt_timeout_s=0.01).head("k")
    assert stall.fired == 1


async def test_a_long_read_is_given_more_time() -> None:
    """The bound of a read grows with its length: slow is not dead."""
    faulty = FaultStore(ScriptedStore())
    delay = faulty.inject(Delay(0.05), on="read")
    store = TimeoutStore(faulty, attempt_timeout_s=0.01)
    assert await store.read(ObjectInfo("k", 1 << 20, 1, "v"), ByteRange(0, 1 << 20)) == b"hello"
    assert delay.fired == 1


async def test_a_listing_that_arrives_whole_is_given_its_time() -> None:
    """A page that hides many LIST requests may take longer than one request, and longer than one call's deadline."""
    waits, faulty = Waits(), FaultStore(ScriptedStore())
    delay = faulty.inject(Delay(0.05), on="list")
    store = retrying(TimeoutStore(faulty, attempt_timeout_s=0.01), waits, deadline_s=0.02)
    assert len([page async for page in store.list_directory("")]) == 2
    assert delay.fired == 1
    assert waits.slept_s == []


# limit


async def test_no_more_requests_than_allowed_are_in_flight() -> None:
    """The third request of three waits until one of the first two has ended."""
    faulty = FaultStore(ScriptedStore())
    stall = faulty.inject(Stall(), on="read", times=None)
    store = LimitedStore(faulty, requests_max=2)
    reads = [asyncio.create_task(store.read(INFO, SPAN)) for _ in range(3)]
    await stall.wait_fired()
    await asyncio.sleep(0)
    assert faulty.requests["read"] == 2
    assert store.statistics().requests_in_flight == 2
    stall.release()
    await asyncio.gather(*reads)
    assert faulty.requests["read"] == 3
    assert store.statistics().requests_in_flight == 0


async def test_a_page_takes_a_turn_and_gives_it_back() -> None:
    """A listing holds a turn while a page is asked for, not between pages."""
    store = LimitedStore(ScriptedStore(), requests_max=1)
    pages = store.list_directory("")
    await anext(pages)
    assert store.statistics().requests_in_flight == 0
    await store.head("k")


async def test_throttling_halves_once_a_window() -> None:
    """Four requests sent under one limit and all throttled halve it once; it never falls below one."""
    window = RequestWindow(16)
    tickets = [await window.acquire() for _ in range(4)]
    for ticket in tickets:
        window.release(ticket, was_throttled=True, succeeded=False)
    assert (window.limit, window.throttled) == (8, 4)
    for _ in range(10):
        window.release(await window.acquire(), was_throttled=True, succeeded=False)
    assert window.limit == 1


async def test_a_limit_recovers_slowly_and_stops_at_its_maximum() -> None:
    """A window of successes adds one; a failure that is no throttling changes nothing."""
    window = RequestWindow(8)
    window.release(await window.acquire(), was_throttled=True, succeeded=False)
    assert window.limit == 4
    for _ in range(4):
        window.release(await window.acquire(), was_throttled=False, succeeded=False)
    assert window.limit == 4
    for _ in range(5):
        window.release(await window.acquire(), was_throttled=False, succeeded=True)
    assert window.limit == 5
    for _ in range(100):
        window.release(await window.acquire(), was_throttled=False, succeeded=True)
    assert window.limit == 8


async def test_turns_come_in_order_and_survive_cancelling() -> None:
    """Waiters are served first come first served; one that is cancelled, even as its turn comes, loses none."""
    window = RequestWindow(1)
    ticket = await window.acquire()
    waiting = [asyncio.create_task(window.acquire()) for _ in range(4)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    window.release(ticket, was_throttled=False, succeeded=True)  # the first waiter's turn comes ...
    waiting[0].cancel()  # ... and it is cancelled before it runs
    await asyncio.wait(waiting[:3])
    assert waiting[0].cancelled()
    assert waiting[1].cancelled()
    assert waiting[2].done() and not waiting[2].cancelled()
    assert not waiting[3].done()
    assert window.in_flight == 1
    window.release(waiting[2].result(), was_throttled=False, succeeded=True)
    window.release(await waiting[3], was_throttled=False, succeeded=True)
    assert window.in_flight == 0


async def test_a_demand_has_a_turn_while_loads_hold_the_window() -> None:
    """Loads never take the last turn, so a demand starts at once; what waits is served by urgency, then by age."""
    window = RequestWindow(8)
    loads = [asyncio.create_task(window.acquire(PATIENT_URGENCY)) for _ in range(10)]
    await asyncio.sleep(0)
    assert window.in_flight == 7
    await asyncio.wait_for(window.acquire(0), 1)
    assert window.in_flight == 8
    demand = asyncio.create_task(window.acquire(0))
    await asyncio.sleep(0)
    window.release(loads[0].result(), was_throttled=False, succeeded=True)
    await asyncio.sleep(0)
    assert demand.done() and not any(load.done() for load in loads[7:])
    for load in loads:
        load.cancel()


# retry


@given(tries=st.integers(1, 1000), chance=st.floats(0, 1, exclude_max=True))
def test_a_wait_is_bounded(tries: int, chance: float) -> None:
    """Full jitter: any wait lies between zero and the exponential bound, and under the cap."""
    policy = RetryPolicy(deadline_s=60, first_backoff_s=0.1, backoff_max_s=10)
    wait_s = backoff_s(policy, tries, chance)
    assert 0 <= wait_s <= min(10, 0.1 * 2.0 ** min(tries - 1, 60))


async def test_a_passing_error_is_tried_again() -> None:
    """Failures within the deadline cost waits that grow, and then the answer comes."""
    waits, faulty = Waits(), FaultStore(ScriptedStore())
    store = retrying(faulty, waits)
    fault = faulty.inject(Fail(StoreUnavailableError("cannot read 'k': HTTP 503")), on="read", times=4)
    assert await store.read(INFO, SPAN) == b"hello"
    assert fault.fired == 4
    assert waits.slept_s == pytest.approx([0.05, 0.1, 0.2, 0.4])
    assert store.statistics().retries == 4


async def test_the_deadline_ends_it() -> None:
    """When the next wait would pass the deadline the last error comes, with the number of tries and its cause."""
    waits, faulty = Waits(), FaultStore(ScriptedStore())
    fault = faulty.inject(Fail(StoreUnavailableError("cannot read 'k': HTTP 503")), on="read", times=None)
    with pytest.raises(
        StoreUnavailableError, match=r"HTTP 503 \(gave up after \d+ tries in .*deadline is 3\.0s\)"
    ) as raised:
        await retrying(faulty, waits, deadline_s=3.0).read(INFO, SPAN)
    assert f"after {fault.fired} tries" in str(raised.value)
    assert sum(waits.slept_s) < 3.0
    assert isinstance(raised.value.__cause__, StoreUnavailableError)


async def test_the_deadline_ends_an_attempt_that_hangs() -> None:
    """An attempt that never answers ends when the deadline has passed."""
    waits, faulty = Waits(), FaultStore(ScriptedStore())
    stall = faulty.inject(Stall(), on="read")
    with pytest.raises(StoreUnavailableError, match=r"no answer \(gave up after 1 try"):
        await retrying(faulty, waits, deadline_s=0.02).read(INFO, SPAN)
    assert stall.fired == 1


async def test_what_the_store_asks_for_is_waited() -> None:
    """Retry-After is a lower bound of the wait; one past the deadline ends the call at once."""
    waits, faulty = Waits(), FaultStore(ScriptedStore())
    store = retrying(faulty, waits)
    faulty.inject(Fail(ThrottledError("slow down", 7.0)), on="read")
    await store.read(INFO, SPAN)
    assert waits.slept_s == [7.0]
    faulty.inject(Fail(ThrottledError("slow down", 61.0)), on="read")
    with pytest.raises(StoreUnavailableError, match="1 try"):
        await store.read(INFO, SPAN)
    assert waits.slept_s == [7.0]


async def test_cancelling_ends_the_wait() -> None:
    """A call that waits for its next try ends as cancelled, at once."""
    faulty = FaultStore(ScriptedStore())
    faulty.inject(Fail(StoreUnavailableError("503")), on="read", times=None)
    waiting = asyncio.Event()

    async def sleep(_: float) -> None:
        waiting.set()
        await asyncio.Event().wait()

    store = RetryStore(faulty, RetryPolicy(deadline_s=60), clock=ManualClock(), chance=lambda: 0.5, sleep=sleep)
    reading = asyncio.create_task(store.read(INFO, SPAN))
    await waiting.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert faulty.requests["read"] == 1


async def test_probe_is_not_tried_again() -> None:
    """An operator gets the first reason."""
    waits, faulty = Waits(), FaultStore(ScriptedStore())
    fault = faulty.inject(Fail(StoreUnavailableError("refused")), on="probe")
    with pytest.raises(StoreUnavailableError, match=r"\Arefused\Z"):
        await retrying(faulty, waits).probe()
    assert (fault.fired, waits.slept_s) == (1, [])


async def test_a_failed_page_is_asked_for_again() -> None:
    """A page that fails is fetched again where the listing stood; no page comes twice."""
    waits = Waits()
    asked: list[int | None] = []

    class Paged(ScriptedStore):
        def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
            async def fetch(token: int | None) -> tuple[ListPage, int | None]:
                asked.append(token)
                if asked.count(1) == 1 and token == 1:
                    raise StoreUnavailableError("503")
                at = token or 0
                return ListPage((), (f"{at}/",)), at + 1 if at < 2 else None

            return PagedListing(fetch)

    pages = [page.prefixes async for page in retrying(Paged(), waits).list_directory("")]
    assert pages == [("0/",), ("1/",), ("2/",)]
    assert asked == [None, 1, 1, 2]


class GeneratorStore(ScriptedStore):
    """Lists by an async generator, which is finished once it raised."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.listings = 0

    async def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        self.listings += 1
        for index in range(3):
            if self.listings == 1 and index == self.fail_at:
                raise StoreUnavailableError("503")
            yield ListPage((), (f"{index}/",))


async def test_a_generator_is_begun_anew_before_its_first_page() -> None:
    """A listing of a foreign store that fails at once is asked for again, whole."""
    store = GeneratorStore(fail_at=0)
    pages = [page.prefixes async for page in retrying(store, Waits()).list_directory("")]
    assert pages == [("0/",), ("1/",), ("2/",)]
    assert store.listings == 2


async def test_a_generator_that_fails_midway_is_an_error() -> None:
    """Half a listing is never taken for the whole: what cannot resume raises."""
    pages = retrying(GeneratorStore(fail_at=1), Waits()).list_directory("")
    assert (await anext(pages)).prefixes == ("0/",)
    with pytest.raises(StoreError, match="list again"):
        await anext(pages)


def test_a_throttled_error_crosses_processes() -> None:
    """The error that limit.py reads survives pickling, and is a StoreUnavailableError on the wire."""
    error = pickle.loads(pickle.dumps(ThrottledError("slow down", 3.0)))
    assert (type(error), error.retry_after_s) == (ThrottledError, 3.0)
    assert type(from_wire(to_wire(error))) is StoreUnavailableError


# the fault store itself


async def test_a_fault_store_does_what_the_script_says() -> None:
    """Cut, flip and swap happen to the request that was named, and each says how often it fired."""
    swapped: list[str] = []

    async def swap() -> None:
        swapped.append("now")

    store = FaultStore(ScriptedStore())
    cut = store.inject(Cut(2), on="read", at=2)
    flip = store.inject(Flip(1), on="read", at=3)
    swap_fault = store.inject(Swap(swap), on="head")
    assert [bytes(await store.read(INFO, SPAN)) for _ in range(4)] == [b"hello", b"he", b"h\x9allo", b"hello"]
    await store.head("k")
    assert (cut.fired, flip.fired, swap_fault.fired, swapped) == (1, 1, 1, ["now"])
    assert store.requests == {"head": 1, "list": 0, "read": 4, "probe": 0}


async def test_a_stalled_request_goes_on_when_released() -> None:
    """A stall holds the request until the test lets it go."""
    store = FaultStore(ScriptedStore())
    stall = store.inject(Stall(), on="read")
    reading = asyncio.create_task(store.read(INFO, SPAN))
    await stall.wait_fired()
    assert not reading.done()
    stall.release()
    assert await reading == b"hello"
