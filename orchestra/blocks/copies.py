"""Which of the extents held are copies of what other nodes own: they take space that is free, and leave first.

Owns: the names of copies, held or expected. Leaves to others: who owns what (the cluster), room (accounts). Not
thread-safe: the accounts' owner calls it under its lock.

Without this rule the copies of what is read first would fill a node, and what it owns for all would not be let in: each
node would then read it from the store in every epoch. Nothing of it is on disk: a daemon that starts is told (`mark`)
when it knows who owns what.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container

# As many as accounts expect.
_EXPECTED_MAX = 65_536


class Copies:
    """The names of extents (and small objects) that other nodes own."""

    def __init__(self) -> None:
        self._expected: OrderedDict[str, None] = OrderedDict()
        self._held: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, name: object) -> bool:
        return name in self._expected or name in self._held

    def expect(self, name: str, *, is_copy: bool) -> None:
        """`name` is about to be written, or read: it is a copy, or this node's own from now on."""
        if not is_copy:
            self._expected.pop(name, None)
            self._held.pop(name, None)
        elif name not in self._held:
            self._expected[name] = None
            if len(self._expected) > _EXPECTED_MAX:
                self._expected.popitem(last=False)

    def mark(self, name: str) -> None:
        """`name`, which is held, is a copy."""
        self._expected.pop(name, None)
        self._held.setdefault(name, None)

    def enter(self, name: str) -> None:
        """`name` is held now."""
        if name in self._expected:
            del self._expected[name]
            self._held[name] = None

    def leave(self, name: str) -> None:
        """`name` is not held any more."""
        self._held.pop(name, None)

    def first(self, size_bytes: int, busy: Container[str], movable_bytes: Callable[[str], int]) -> list[str]:
        """Return the copies written first that hold `size_bytes` together (or all); none of `busy`, and none of which
        nothing may leave."""
        names: list[str] = []
        if size_bytes > 0:
            for name in self._held:
                movable = 0 if name in busy else movable_bytes(name)
                if movable:
                    names.append(name)
                    size_bytes -= movable
                    if size_bytes <= 0:
                        break
        return names
