"""What readers have in flight and how long it takes, as whoever fetches ahead of them sees it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from orchestra.errors import StoreUnavailableError
from orchestra.fetch.budget import ByteBudget, Priority
from orchestra.fetch.demand import DemandMeter
from orchestra.fetch.fetcher import Fetcher
from orchestra.stores.contract import Buffer
from orchestra.values import ByteRange, ObjectInfo

INFO = ObjectInfo("key", 10, 0, "1")


def test_what_is_in_flight_is_averaged_over_time() -> None:
    """Of ten units of time, 100 bytes for six and 50 more for two of them are 70 bytes on average."""
    meter = DemandMeter()
    before = meter.mark(1000)
    meter.begin(100, 1002)
    meter.begin(50, 1004)
    meter.end(50, 1006)
    meter.end(100, 1008)
    assert meter.mean_bytes(before, meter.mark(1010)) == 70


def test_each_who_looks_sees_all_answers_since_he_looked() -> None:
    """Two looks at different moments take nothing from each other; the newest answer comes first."""
    meter = DemandMeter()
    early = meter.mark(0)
    meter.answered(60, 1)
    late = meter.mark(0)
    meter.answered(70, 2)
    assert meter.answers(early) == [(70, 2), (60, 1)]
    assert meter.answers(late) == [(70, 2)]


def test_very_many_answers_are_not_all_kept() -> None:
    """Nobody may have looked for days: the last ones are what there is."""
    meter = DemandMeter()
    before = meter.mark(0)
    for took_ns in range(5000):
        meter.answered(took_ns, 1)
    answers = meter.answers(before)
    assert len(answers) < 5000
    assert answers[0] == (4999, 1)


@dataclass(slots=True)
class _Store:
    """Gives bytes, or fails."""

    store_id: str = "store"
    is_failing: bool = False

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        if self.is_failing:
            raise StoreUnavailableError("away")
        return bytes(byte_range.length)


async def _read(fetcher: Fetcher, store: _Store, priority: Priority) -> None:
    async with fetcher.part(store, INFO, ByteRange(0, 10), priority, []):
        pass


async def test_only_what_readers_ask_for_is_counted() -> None:
    """Reads and what is read ahead in their files are demand; plans and loads, which are steered by it, are not."""
    fetcher = Fetcher(ByteBudget(1000))
    before = fetcher.demand.mark(fetcher.stalls.now_ns())
    for priority in Priority:
        await _read(fetcher, _Store(), priority)
    assert [size for _, size in fetcher.demand.answers(before)] == [10, 10]


async def test_a_failed_request_is_no_longer_in_flight_and_no_answer() -> None:
    """How long an error takes says nothing of the link."""
    fetcher = Fetcher(ByteBudget(1000))
    before = fetcher.demand.mark(fetcher.stalls.now_ns())
    with pytest.raises(StoreUnavailableError):
        await _read(fetcher, _Store(is_failing=True), Priority.DEMAND)
    after = fetcher.demand.mark(fetcher.stalls.now_ns())
    assert fetcher.demand.answers(before) == []
    assert fetcher.demand.mean_bytes(after, fetcher.demand.mark(after.at_ns + 100)) == 0
