"""What membership asks of a driver.

Owns: the contract. Leaves to others: the drivers (probing, etcd), who runs them (member).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from orchestra.cluster.membership import Announce, Event, Register, Renew

Deliver = Callable[[Event], None]
Errand = Register | Renew | Announce


class MembershipDriver(Protocol):
    """Tells who is in the cluster. Its requests go over connections of its own, each with a timeout: a heartbeat never
    waits for data."""

    @property
    def has_lease(self) -> bool:
        """Whether nodes register under leases, and revisions are the source's own."""
        ...

    async def run(self, deliver: Deliver) -> None:
        """Deliver what happens until cancelled. What fails on the way is delivered as SourceLost and tried again."""
        ...

    async def perform(self, errand: Errand, deliver: Deliver) -> None:
        """Make one request and deliver what it led to; one that failed is not repeated (membership asks again)."""
        ...

    async def close(self) -> None:
        """Leave the cluster where the source can be told so, and close connections. Never raises, ends in bounded
        time."""
        ...
