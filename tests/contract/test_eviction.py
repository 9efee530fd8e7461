"""Every eviction policy keeps the contract; then what each promises beyond it."""

from __future__ import annotations

from orchestra.blocks.eviction import EvictionPolicy, LruPolicy, make_policy
from orchestra.testing.eviction import EvictionSuite


class TestLru(EvictionSuite):
    """Least recently used first."""

    def make_policy(self) -> EvictionPolicy:
        return LruPolicy()

    def test_the_longest_unused_goes_first(self) -> None:
        """Victims come in order of last use, whether that was an arrival or a read."""
        policy = self.make_filled("a", "b", "c", "d")
        policy.touch("b")
        policy.add("a")
        assert list(policy.victims()) == ["c", "d", "b", "a"]


class TestAuto(EvictionSuite):
    """What the configuration calls `auto`."""

    def make_policy(self) -> EvictionPolicy:
        return make_policy("auto")
