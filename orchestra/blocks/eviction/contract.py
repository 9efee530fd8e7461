"""What an eviction policy promises; `orchestra.testing.eviction.EvictionSuite` proves it for each one.

A policy orders names (of extents and small objects). It holds no bytes, does no I/O, and knows nothing of pins or
readers: the block store skips a victim that may not leave and asks on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class EvictionPolicy(Protocol):
    """An order among the extents that are held. All methods are O(1) on average; unknown names are ignored."""

    def add(self, name: str) -> None:
        """An extent came in (or came back); it counts as used now."""
        ...

    def touch(self, name: str) -> None:
        """An extent was read."""
        ...

    def remove(self, name: str) -> None:
        """An extent left, for whatever reason."""
        ...

    def victims(self) -> Iterator[str]:
        """Yield every held name once, the one to evict first first.

        The policy is not changed while this is iterated: the caller chooses first and removes afterwards.
        """
        ...

    def __len__(self) -> int:
        """How many names are held."""
        ...
