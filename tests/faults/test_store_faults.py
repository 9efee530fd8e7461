"""What the wire can do to a read of S3, F-1 to F-10 of the fault catalogue: a real server behind a faulty proxy, read
through the store with all its wrappers. Each test proves that its fault fired."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator

import pytest

from orchestra.clock import ManualClock
from orchestra.config import FetchConfig
from orchestra.errors import (
    AccessDeniedError,
    NotFoundError,
    StaleObjectError,
    StoreError,
    StoreUnavailableError,
)
from orchestra.stores.contract import StoreSettings
from orchestra.stores.registry import open_store
from orchestra.stores.retry import RetryStore
from orchestra.testing.fault_proxy import (
    ArmedFault,
    Call,
    Cut,
    Delay,
    FaultProxy,
    Flip,
    Header,
    Stall,
    Status,
    WholeBody,
)
from orchestra.testing.s3_server import S3Server
from orchestra.testing.under_store import PATTERN, list_all
from orchestra.values import ByteRange, ObjectInfo

SPAN = ByteRange(1000, 9000)
PATIENT = FetchConfig(requests_max=16, attempt_timeout_s=20.0, deadline_s=600.0)
# For faults that only a timeout ends. A loaded machine may need longer than this for a right answer: tests that use it
# count at least one retry, not exactly one.
HASTY = FetchConfig(requests_max=16, attempt_timeout_s=0.3, deadline_s=30.0)


class Waits:
    """Sleeps for a store without waiting: moves a clock that stands still otherwise."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.slept_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.clock.advance(seconds)


@pytest.fixture
def key(server: S3Server) -> str:
    """An object of its own for each test, so that faults are aimed at it alone."""
    name = f"{uuid.uuid4().hex}.bin"
    server.put("bucket", name, PATTERN)
    return name


@pytest.fixture
async def hasty(server: S3Server, proxy: FaultProxy) -> AsyncIterator[RetryStore]:
    store = open_store(StoreSettings("s3://bucket", server.options_at(proxy.endpoint)), HASTY, chance=lambda: 0.01)
    yield store
    await store.close()


@pytest.fixture
async def store(patient: tuple[RetryStore, Waits]) -> RetryStore:
    return patient[0]


@pytest.fixture
async def patient(server: S3Server, proxy: FaultProxy) -> AsyncIterator[tuple[RetryStore, Waits]]:
    """The store with ten minutes to retry in, and a clock under the test's control."""
    waits = Waits()
    store = open_store(
        StoreSettings("s3://bucket", server.options_at(proxy.endpoint)),
        PATIENT,
        clock=waits.clock,
        chance=lambda: 0.5,
        sleep=waits.sleep,
    )
    yield store, waits
    await store.close()


def on_get(proxy: FaultProxy, key: str, action: object, **when: int | None) -> ArmedFault:
    return proxy.add(action, method="GET", path=key, **when)  # type: ignore[arg-type]  # any action


async def read_span(store: RetryStore, info: ObjectInfo) -> bytes:
    return bytes(await store.read(info, SPAN))


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
@pytest.mark.parametrize("times", [1, 10])
async def test_passing_failures_are_retried(
    patient: tuple[RetryStore, Waits], proxy: FaultProxy, key: str, status: int, times: int
) -> None:
    """F-1: a store that fails once, or ten times, costs retries and no error, and the bytes are right."""
    store, waits = patient
    info = await store.head(key)
    fault = on_get(proxy, key, Status(status), times=times)
    assert await read_span(store, info) == PATTERN[1000:9000]
    assert fault.fired == times
    assert store.statistics().retries == times
    assert len(waits.slept_s) == times


async def test_a_storm_past_the_deadline_is_told(
    patient: tuple[RetryStore, Waits], proxy: FaultProxy, key: str
) -> None:
    """F-1: failures for longer than the deadline end in StoreUnavailableError that says status, store and tries."""
    store, waits = patient
    info = await store.head(key)
    fault = on_get(proxy, key, Status(503, code="SlowDown"), times=None)
    with pytest.raises(StoreUnavailableError) as raised:
        await read_span(store, info)
    assert fault.fired > 10
    text = str(raised.value)
    assert f"{fault.fired} tries" in text
    assert "503 SlowDown" in text
    assert "s3://bucket" in text
    assert key in text
    assert sum(waits.slept_s) < 600
    assert "\n" not in text


async def test_a_throttled_store_is_asked_less(patient: tuple[RetryStore, Waits], proxy: FaultProxy, key: str) -> None:
    """F-2: throttling halves the number of requests in flight, and quiet times give it back."""
    store, _ = patient
    info = await store.head(key)
    fault = on_get(proxy, key, Status(503), times=3)
    await read_span(store, info)
    assert fault.fired == 3
    throttled = store.statistics()
    assert throttled.throttled == 3
    assert throttled.requests_limit < 16 // 4
    for _ in range(30):
        await read_span(store, info)
    assert store.statistics().requests_limit > throttled.requests_limit


async def test_retry_after_of_a_listing_is_honoured(
    patient: tuple[RetryStore, Waits], proxy: FaultProxy, key: str
) -> None:
    """F-2: a store that says when to come back is not asked earlier."""
    store, waits = patient
    fault = proxy.add(Status(429, retry_after="7"), method="GET", path="list-type=2")
    assert key in [info.key for info in (await list_all(store, "")).objects]
    assert fault.fired == 1
    assert waits.slept_s == [7.0]


async def test_retry_after_of_a_read_is_honoured(
    patient: tuple[RetryStore, Waits], proxy: FaultProxy, key: str
) -> None:
    """F-2: obstore hides the header of the first 503; from the second on it is read and honoured."""
    store, waits = patient
    info = await store.head(key)
    fault = on_get(proxy, key, Status(503, retry_after="9"), times=3)
    assert await read_span(store, info) == PATTERN[1000:9000]
    assert fault.fired == 3
    assert waits.slept_s[1:] == [9.0, 9.0]


async def test_a_retry_after_past_the_deadline_is_not_waited_for(
    patient: tuple[RetryStore, Waits], proxy: FaultProxy
) -> None:
    """F-2: a store that asks for an hour gets an error at once instead."""
    store, waits = patient
    fault = proxy.add(Status(503, retry_after="3600"), method="GET", path="list-type=2", times=None)
    with pytest.raises(StoreUnavailableError, match="1 try"):
        await list_all(store, "")
    assert fault.fired == 1
    assert waits.slept_s == []


async def test_a_refused_connection_fails_in_time(server: S3Server) -> None:
    """F-3: nobody listens: `probe` says so at once, a read when its deadline has passed."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        waits = Waits()
        store = open_store(
            StoreSettings("s3://bucket", server.options_at(endpoint)),
            PATIENT,
            clock=waits.clock,
            chance=lambda: 0.5,
            sleep=waits.sleep,
        )
        with pytest.raises(StoreUnavailableError, match="no connection") as raised:
            await store.probe()
        assert endpoint in str(raised.value)
        assert waits.slept_s == []
        with pytest.raises(StoreUnavailableError, match=r"no connection: Connection refused.* tries"):
            await store.read(ObjectInfo("k", 10, 1, '"v"'), ByteRange(0, 10))
        assert 0 < sum(waits.slept_s) < PATIENT.deadline_s
        await store.close()


async def test_an_unknown_host_is_named(server: S3Server) -> None:
    """F-3: a host that does not exist is said to be that."""
    store = open_store(StoreSettings("s3://bucket", server.options_at("http://no-such-host.invalid")), PATIENT)
    with pytest.raises(StoreUnavailableError, match="host name cannot be resolved"):
        await store.probe()
    await store.close()


async def test_tls_to_a_plain_port_is_not_retried(server: S3Server) -> None:
    """F-3: a TLS failure is final: no retry can mend it."""
    endpoint = server.endpoint.replace("http://", "https://")
    store = open_store(StoreSettings("s3://bucket", server.options_at(endpoint)), PATIENT)
    with pytest.raises(StoreError, match="TLS") as raised:
        await list_all(store, "")
    assert not isinstance(raised.value, StoreUnavailableError)
    assert store.statistics().retries == 0
    await store.close()


async def test_refused_credentials_are_not_retried(store: RetryStore, proxy: FaultProxy, key: str) -> None:
    """F-4: 403 is AccessDeniedError at once, a PermissionError, without the secret in its text."""
    info = await store.head(key)
    fault = on_get(proxy, key, Status(403, code="ExpiredToken"))
    with pytest.raises(AccessDeniedError, match="403 ExpiredToken") as raised:
        await read_span(store, info)
    assert isinstance(raised.value, PermissionError)
    assert "orchestra-test-secret" not in str(raised.value)
    assert fault.fired == 1
    assert store.statistics().retries == 0


@pytest.mark.parametrize("at_byte", [None, 0, 1, 4096, 7999])
async def test_a_body_cut_short_is_retried(store: RetryStore, proxy: FaultProxy, key: str, at_byte: int | None) -> None:
    """F-5: a body that ends early, at any byte, is an error of that attempt: the next one brings the right bytes."""
    info = await store.head(key)
    fault = on_get(proxy, key, Cut(), at_byte=at_byte)
    assert await read_span(store, info) == PATTERN[1000:9000]
    assert fault.fired == 1
    assert store.statistics().retries == 1


@pytest.mark.parametrize("at_byte", [None, 0, 4096, 7999])
async def test_a_stalled_body_is_retried(hasty: RetryStore, proxy: FaultProxy, key: str, at_byte: int | None) -> None:
    """F-6: an answer without progress for the attempt's time is given up, and the next attempt succeeds."""
    info = await hasty.head(key)
    fault = on_get(proxy, key, Stall(), at_byte=at_byte)
    assert await read_span(hasty, info) == PATTERN[1000:9000]
    assert fault.fired == 1
    assert hasty.statistics().retries >= 1


async def test_a_slow_body_is_not_a_stalled_one(store: RetryStore, proxy: FaultProxy, key: str) -> None:
    """F-6: a pause shorter than the attempt's time (20 s here) costs no retry."""
    info = await store.head(key)
    fault = on_get(proxy, key, Delay(0.05), at_byte=4096)
    assert await read_span(store, info) == PATTERN[1000:9000]
    assert fault.fired == 1
    assert store.statistics().retries == 0


async def test_a_stall_ends_when_the_reader_is_cancelled(store: RetryStore, proxy: FaultProxy, key: str) -> None:
    """A cancelled read ends at once though the store stalls, gives its turn back, and the store goes on."""
    info = await store.head(key)
    fault = on_get(proxy, key, Stall(), at_byte=100)
    reading = asyncio.create_task(read_span(store, info))
    await fault.wait_fired_async()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert store.statistics().requests_in_flight == 0
    assert store.statistics().abandoned == 1
    assert await read_span(store, info) == PATTERN[1000:9000]


async def test_every_read_carries_its_version(store: RetryStore, proxy: FaultProxy, key: str) -> None:
    """R1: each range is asked for under the version that was opened, with one request."""
    info = await store.head(key)
    proxy.forget_requests()
    await asyncio.gather(*(store.read(info, ByteRange(start, start + 1000)) for start in range(0, 12000, 1000)))
    asked = proxy.requests
    assert sorted(request.range for request in asked) == sorted(
        f"bytes={start}-{start + 999}" for start in range(0, 12000, 1000)
    )
    assert {request.if_match for request in asked} == {info.version}


async def test_another_etag_in_the_answer_is_stale(store: RetryStore, proxy: FaultProxy, key: str) -> None:
    """F-8: bytes of another version are refused, also when the store ignores the condition."""
    info = await store.head(key)
    fault = on_get(proxy, key, Header("ETag", '"another"'))
    with pytest.raises(StaleObjectError, match="another"):
        await read_span(store, info)
    assert fault.fired == 1


async def test_an_object_replaced_between_ranges_is_stale(
    store: RetryStore, server: S3Server, proxy: FaultProxy, key: str
) -> None:
    """F-8: the first range is of the old version; after the replacement the second raises, never mixes."""
    info = await store.head(key)
    assert bytes(await store.read(info, ByteRange(0, 6000))) == PATTERN[:6000]
    fault = on_get(proxy, key, Call(lambda: server.put("bucket", key, bytes(len(PATTERN)))))
    with pytest.raises(StaleObjectError):
        await store.read(info, ByteRange(6000, 12000))
    assert fault.fired == 1
    renewed = await store.head(key)
    assert renewed.version != info.version
    assert await read_span(store, renewed) == bytes(8000)


async def test_an_object_deleted_between_ranges_is_stale(
    store: RetryStore, server: S3Server, proxy: FaultProxy, key: str
) -> None:
    """F-8: the same for one that is deleted."""
    info = await store.head(key)
    fault = on_get(proxy, key, Call(lambda: server.delete("bucket", key)))
    with pytest.raises(StaleObjectError):
        await read_span(store, info)
    assert fault.fired == 1
    with pytest.raises(NotFoundError):
        await store.head(key)


@pytest.mark.parametrize(
    "action",
    [
        WholeBody(),
        Header("Content-Range", "bytes 1001-9000/12000"),
        Header("Content-Range", "bytes 1000-8998/12000"),
        Header("Content-Range", "bytes 0-7999/12000"),
        Header("Content-Range", "rubbish"),
        Header("Content-Range", None),
    ],
    ids=["200 for a range", "shifted", "short", "from zero", "unreadable", "missing"],
)
async def test_a_wrong_range_is_never_data(store: RetryStore, proxy: FaultProxy, key: str, action: object) -> None:
    """F-9: an answer of another range is an error of that attempt; nothing is shifted in silence."""
    info = await store.head(key)
    fault = on_get(proxy, key, action)
    assert await read_span(store, info) == PATTERN[1000:9000]
    assert fault.fired == 1
    assert store.statistics().retries == 1


async def test_a_server_without_ranges_is_cut_to_size(store: RetryStore, proxy: FaultProxy, key: str) -> None:
    """F-9: a server that always sends the whole (small) object is served by cutting the range out of it."""
    info = await store.head(key)
    fault = on_get(proxy, key, WholeBody(), times=None)
    assert await read_span(store, info) == PATTERN[1000:9000]
    assert fault.fired == 2


async def test_a_compressed_answer_is_refused(store: RetryStore, proxy: FaultProxy, key: str) -> None:
    """F-9: Content-Encoding gzip would shift every offset: a clear, final error."""
    info = await store.head(key)
    fault = on_get(proxy, key, Header("Content-Encoding", "gzip"), times=None)
    with pytest.raises(StoreError, match="Content-Encoding 'gzip'") as raised:
        await read_span(store, info)
    assert not isinstance(raised.value, StoreUnavailableError)
    assert fault.fired == 1


async def test_a_flipped_bit_of_a_read_is_documented_as_not_seen(
    store: RetryStore, proxy: FaultProxy, key: str
) -> None:
    """F-7: a bit that is wrong in the body comes through: a range has no checksum (docs/stores.md says so)."""
    info = await store.head(key)
    fault = on_get(proxy, key, Flip(), at_byte=5)
    data = await read_span(store, info)
    assert fault.fired == 1
    assert data[5] == PATTERN[1005] ^ 0xFF


async def test_a_page_that_fails_is_asked_for_again(server: S3Server, store: RetryStore, proxy: FaultProxy) -> None:
    """F-10: the second page of a listing fails twice; every key still comes exactly once, and the first page is not
    asked for again."""
    server.put_numbered("bucket", "paged/f", 2500)
    fault = proxy.add(Status(503), method="GET", path="continuation-token=.*prefix=paged", times=2)
    listing = await list_all(store, "paged/")
    assert fault.fired == 2
    keys = [info.key for info in listing.objects]
    assert keys == [f"paged/f{index:06d}" for index in range(2500)]
    assert len([request for request in proxy.requests if "prefix=paged" in request.path]) == 5


@pytest.mark.parametrize("at_byte", [0, 500, 20_000])
async def test_half_a_page_is_no_page(server: S3Server, store: RetryStore, proxy: FaultProxy, at_byte: int) -> None:
    """F-10: a listing cut anywhere is asked for again, never taken for the whole."""
    server.put_numbered("bucket", "halved/f", 300)
    fault = proxy.add(Cut(), method="GET", path="prefix=halved", at_byte=at_byte)
    assert len((await list_all(store, "halved/")).objects) == 300
    assert fault.fired == 1


async def test_a_head_that_stalls_is_retried(hasty: RetryStore, proxy: FaultProxy, key: str) -> None:
    """A look-up survives a stall and a cut connection like a read."""
    stall = proxy.add(Stall(), method="HEAD", path=key)
    cut = proxy.add(Cut(), method="HEAD", path=key)
    assert (await hasty.head(key)).size_bytes == len(PATTERN)
    assert (stall.fired, cut.fired) == (1, 1)
