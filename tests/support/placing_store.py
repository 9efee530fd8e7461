"""A store whose reads can be carried, for tests of who carries them."""

from __future__ import annotations

from collections.abc import Callable

from orchestra.stores.carrying import Errand, Outcome
from orchestra.values import ByteRange, ObjectInfo
from tests.support.versioned_store import VersionedStore


class PlacingVersionedStore(VersionedStore):
    """Is asked for nothing of it: a test says what it is to be asked for."""

    can_place = True

    def take_turn(self, who: object, urgency: int, granted: Callable[[], bool]) -> None:
        """See PlacingStore."""
        raise AssertionError("nobody takes turns of it")

    def give_turn_back(self) -> None:
        """See PlacingStore."""
        raise AssertionError("nobody takes turns of it")

    def turns_wanted(self, who: object, urgency: int, turns: int) -> int:
        """See PlacingStore."""
        raise AssertionError("nobody takes turns of it")

    def errand(self, info: ObjectInfo, byte_range: ByteRange) -> Errand | None:
        """See PlacingStore."""
        raise AssertionError("errands are made elsewhere")

    def conclude(self, errand: Errand, info: ObjectInfo, outcome: Outcome) -> None:
        """See PlacingStore."""
        raise AssertionError("errands are made elsewhere")
