"""What an eviction policy promises; `orchestra.testing.eviction.EvictionSuite` proves it for each one.

A policy orders names (of extents and small objects) and says which new ones are worth another's place. It holds no
bytes, does no I/O, and knows nothing of pins, quotas or readers: pinned names are not given to it, and the block store
skips a victim that may not leave and asks on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class EvictionPolicy(Protocol):
    """An order among the extents that are held. All methods are O(1) on average."""

    def add(self, name: str) -> None:
        """An extent came in, came back or grew; it counts as used now."""
        ...

    def touch(self, name: str) -> None:
        """An extent was read, from here or (if it is not held) from elsewhere. Every read is told once, also the one
        that the extent was fetched for. A name that is not held stays so; a policy may learn from it."""
        ...

    def remove(self, name: str) -> None:
        """An extent left for some other reason than this policy's order. Unknown names are ignored."""
        ...

    def evict(self, name: str) -> None:
        """The first of `victims` (but for those that may not leave) leaves for want of room: forget it, and go on as
        the policy does after an eviction. Unknown names are ignored."""
        ...

    def admits(self, name: str) -> bool:
        """Whether `name` is worth the place of the first victim, now that there is no room left. Changes nothing.

        Not asked while there is room. A refused extent's bytes go to the reader without being kept.
        """
        ...

    def victims(self) -> Iterator[str]:
        """Yield every held name once, the one to evict first first.

        The policy is not changed while this is iterated: the caller chooses first and evicts afterwards.
        """
        ...

    def __len__(self) -> int:
        """How many names are held."""
        ...
