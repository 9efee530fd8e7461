"""Reads that another process carries, through the wrappers around a store."""

from __future__ import annotations

import pytest

from orchestra.clock import ManualClock
from orchestra.config import FetchConfig
from orchestra.stores.carrying import Carrier, Errand, NotCarriedError, as_placing
from orchestra.stores.counting import statistics_of
from orchestra.stores.registry import wrapped
from orchestra.values import ByteRange, ObjectInfo
from tests.support.versioned_store import VersionedStore

INFO = ObjectInfo("k", 10, 0, '"v"')
SPAN = ByteRange(0, 5)


class PlacingVersionedStore(VersionedStore):
    """Can have its reads carried; at first nobody carries them."""

    can_place = True

    def __init__(self) -> None:
        super().__init__()
        self.placed: list[tuple[ObjectInfo, ByteRange, Carrier]] = []

    async def place(self, info: ObjectInfo, byte_range: ByteRange, carrier: Carrier) -> None:
        """Write it down."""
        self.placed.append((info, byte_range, carrier))
        if len(self.placed) == 1:
            raise NotCarriedError


class NoCarrier:
    """Is only passed on."""

    async def carry(self, errand: Errand) -> None:
        """Never called."""
        raise AssertionError("the store in the test asks nobody")


async def test_a_carried_read_passes_all_wrappers_and_counts_as_one() -> None:
    """It reaches the store once, with its arguments, and is a read of so many bytes; one that nobody carries is no
    request, is not tried again, and comes out as it is."""
    inner, carrier = PlacingVersionedStore(), NoCarrier()
    store = as_placing(wrapped(inner, FetchConfig(), clock=ManualClock()))
    assert store is not None
    with pytest.raises(NotCarriedError):
        await store.place(INFO, SPAN, carrier)
    counted = statistics_of(store)
    assert (counted.read_requests, counted.read_bytes, counted.errors, counted.requests_in_flight) == (0, 0, 0, 0)
    await store.place(INFO, SPAN, carrier)
    assert inner.placed == [(INFO, SPAN, carrier)] * 2
    counted = statistics_of(store)
    assert (counted.read_requests, counted.read_bytes, counted.requests_in_flight) == (1, 5, 0)


def test_wrappers_carry_nothing_for_a_store_that_cannot() -> None:
    """A store without `place` is none inside its wrappers either."""
    assert as_placing(wrapped(VersionedStore(), FetchConfig(), clock=ManualClock())) is None
