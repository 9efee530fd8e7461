"""A node whose blocks are doubted by another one: what it counts, what it says, what it fetches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from orchestra.clock import ManualClock
from orchestra.cluster.peer_wire import Cause, ExtentPart, PeerError
from orchestra.daemon.nodes.doubts import Doubts
from orchestra.errors import UsageError
from orchestra.values import ByteRange, ObjectId

NAME = ObjectId("s3://bucket/", "large", '"v1"')
PART = ExtentPart(NAME, NAME.digest(), 1 << 30, 0, ByteRange(0, 4096))


@dataclass
class Service:
    """What a node finds when it looks, and whether what it dropped can be fetched anew."""

    damaged: int | None
    is_store_there: bool = True
    brought: int = 0

    async def look_at(self, part: ExtentPart) -> int | None:
        return self.damaged

    async def bring(self, part: ExtentPart) -> Service:
        if not self.is_store_there:
            raise PeerError(Cause.STORE_FAILED, "the store is away")
        self.brought += 1
        return self

    def close(self) -> None:
        pass


def doubts_of(service: Any, clock: ManualClock) -> Doubts:
    nobody: Any = None
    return Doubts(nobody, nobody, service, clock)


def body(index: int = 0) -> dict[str, Any]:
    part = replace(PART, extent_index=index)
    return {"part": f"{part.target} {part.range_header}"}


async def test_what_is_not_held_is_no_sign_of_a_bad_network(caplog: pytest.LogCaptureFixture) -> None:
    """It left meanwhile: nothing is said, and nothing fetched."""
    service = Service(None)
    doubts = doubts_of(service, ManualClock())
    assert await doubts.answer(body()) == {"damaged": 0}
    assert (doubts.counts.looked, doubts.counts.damaged, service.brought) == (1, 0, 0)
    assert caplog.text == ""


async def test_a_bad_network_is_said_every_ten_seconds_at_most(caplog: pytest.LogCaptureFixture) -> None:
    """However many extents come differently."""
    clock = ManualClock()
    doubts = doubts_of(Service(0), clock)
    for index in range(5):
        assert await doubts.answer(body(index)) == {"damaged": 0}
    assert caplog.text.count("the network between the nodes changes bytes") == 1
    clock.advance(10)
    await doubts.answer(body(5))
    assert caplog.text.count("the network between the nodes changes bytes") == 2


async def test_damaged_blocks_count_though_they_cannot_be_fetched_anew() -> None:
    """They were dropped; the store that is away is said to who asked."""
    doubts = doubts_of(Service(2, is_store_there=False), ManualClock())
    with pytest.raises(UsageError, match="the store is away"):
        await doubts.answer(body())
    assert doubts.counts.damaged == 2
    service = Service(1)
    assert await doubts_of(service, ManualClock()).answer(body()) == {"damaged": 1}
    assert service.brought == 1
