"""This node in its cluster: a driver and the state machine, brought together on one event loop.

Owns: the ticks, the errands that wait for the driver, who hears of which instruction. Leaves to others: everything that
is decided (membership) and every request (drivers).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from orchestra.clock import Clock
from orchestra.cluster.contract import Errand, MembershipDriver
from orchestra.cluster.membership import (
    Announce,
    Connect,
    Disconnect,
    DrainAsked,
    Event,
    LeaseState,
    Membership,
    PublishRing,
    Register,
    Renew,
    StartOwning,
    StopOwning,
    Tick,
)
from orchestra.cluster.records import NodeRecord

# A twentieth of the share of a 10 s lease that is left when owning stops.
TICK_S = 0.15
News = Connect | Disconnect | PublishRing | StartOwning | StopOwning
_log = logging.getLogger(__name__)


class ClusterMember:
    """Runs membership. `tell` hears, in order and on the loop, of everything but the driver's own errands."""

    def __init__(self, own: NodeRecord, driver: MembershipDriver, clock: Clock, tell: Callable[[News], None]) -> None:
        self.membership = Membership(own, has_lease=driver.has_lease)
        self._driver = driver
        self._clock = clock
        self._tell = tell
        # At most one of each kind: the state machine asks again for what it still needs.
        self._errands: dict[type[Errand], Errand] = {}
        self._is_asked = asyncio.Event()

    async def run(self) -> None:
        """Take part until cancelled; then leave."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._driver.run(self._take))
                tasks.create_task(self._tick())
                tasks.create_task(self._perform())
        finally:
            await self._driver.close()

    def drain(self) -> None:
        """Own nothing new from now on; peers may go on reading."""
        self._take(DrainAsked())

    def undrain(self) -> None:
        """Own a share again."""
        self._take(DrainAsked(is_over=True))

    def _take(self, event: Event) -> None:
        for instruction in self.membership.handle(event):
            if isinstance(instruction, (Register, Renew, Announce)):
                self._errands[type(instruction)] = instruction
                self._is_asked.set()
                continue
            if isinstance(instruction, StopOwning):
                _log.warning("this node stops writing as an owner: %s", instruction.reason)
            self._tell(instruction)

    async def _tick(self) -> None:
        while True:
            self._take(Tick(self._clock.now_ns() / 1e9))
            await asyncio.sleep(TICK_S)

    async def _perform(self) -> None:
        while True:
            await self._is_asked.wait()
            self._is_asked.clear()
            errands, self._errands = self._errands, {}
            for errand in errands.values():
                if isinstance(errand, Register) and self.membership.lease is not LeaseState.REGISTERING:
                    continue  # the one before was answered while this one waited
                await self._driver.perform(errand, self._take)
