"""The suite that every eviction policy passes: each sentence of `orchestra.blocks.eviction.contract` as a test.

Owns: the promises. Leaves to others: which name goes first (the policy's own tests). To prove a policy, subclass:

    class TestMyPolicy(EvictionSuite):
        def make_policy(self) -> EvictionPolicy:
            return MyPolicy()

Needs pytest.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod

from orchestra.blocks.eviction.contract import EvictionPolicy


class EvictionSuite(ABC):
    """What every policy promises, whatever its order."""

    @abstractmethod
    def make_policy(self) -> EvictionPolicy:
        """Return a new policy that holds nothing."""

    def make_filled(self, *names: str) -> EvictionPolicy:
        """Return a new policy that holds `names`, added in that order."""
        policy = self.make_policy()
        for name in names:
            policy.add(name)
        return policy

    def test_a_new_policy_holds_nothing(self) -> None:
        """It has no length and no victims."""
        policy = self.make_policy()
        assert len(policy) == 0
        assert list(policy.victims()) == []

    def test_every_held_name_is_a_victim_once(self) -> None:
        """Asked on and on, a policy gives up everything it holds, and nothing twice."""
        policy = self.make_filled("a", "b", "c")
        assert sorted(policy.victims()) == ["a", "b", "c"]
        assert len(policy) == 3

    def test_asking_for_victims_changes_nothing(self) -> None:
        """The caller chooses first and removes afterwards; a second look sees the same."""
        policy = self.make_filled("a", "b", "c")
        first = list(policy.victims())
        next(policy.victims())
        assert list(policy.victims()) == first
        assert len(policy) == 3

    def test_what_was_removed_is_no_victim(self) -> None:
        """A name that left is forgotten."""
        policy = self.make_filled("a", "b", "c")
        policy.remove("b")
        assert sorted(policy.victims()) == ["a", "c"]
        assert len(policy) == 2

    def test_adding_what_is_held_keeps_one(self) -> None:
        """An extent that grows is added again, and is still one."""
        policy = self.make_filled("a", "b", "a", "a")
        assert sorted(policy.victims()) == ["a", "b"]
        assert len(policy) == 2

    def test_a_name_may_come_back(self) -> None:
        """What was evicted and fetched again is held like anything else."""
        policy = self.make_filled("a", "b")
        policy.remove("a")
        policy.add("a")
        assert sorted(policy.victims()) == ["a", "b"]

    def test_unknown_names_are_ignored(self) -> None:
        """Touching, removing or evicting what is not held does not make it held, nor costs what is."""
        policy = self.make_filled("a")
        policy.touch("x")
        policy.remove("x")
        policy.evict("x")
        assert list(policy.victims()) == ["a"]

    def test_a_touch_loses_nothing(self) -> None:
        """However names are touched, the same ones are held."""
        policy = self.make_filled("a", "b", "c")
        for name in "cabbac":
            policy.touch(name)
        assert sorted(policy.victims()) == ["a", "b", "c"]

    def test_what_was_only_just_added_is_not_the_first_to_go(self) -> None:
        """A name counts as used when it comes in: it does not push itself out while others are idle."""
        policy = self.make_filled("a", "b", "c")
        assert next(policy.victims()) != "c"

    def test_what_was_evicted_is_forgotten_and_may_come_back(self) -> None:
        """An evicted name is no victim any more; fetched again, it is held like anything else."""
        policy = self.make_filled("a", "b", "c")
        victim = next(policy.victims())
        policy.evict(victim)
        assert len(policy) == 2
        assert victim not in list(policy.victims())
        policy.add(victim)
        assert sorted(policy.victims()) == ["a", "b", "c"]

    def test_the_second_victim_is_the_first_once_the_first_has_left(self) -> None:
        """Several victims chosen at one time are those that would be chosen one after the other."""
        policy = self.make_filled(*"abcdefghijklmnop")
        for name in "bdbdaafhnoonb":
            policy.touch(name)
        order = list(policy.victims())
        for name in order:
            assert next(policy.victims()) == name
            policy.evict(name)
        assert len(policy) == 0

    def test_a_victim_that_may_not_leave_is_passed_over(self) -> None:
        """The second may be evicted in place of the first, which stays."""
        policy = self.make_filled("a", "b", "c", "d")
        kept, chosen, *_ = policy.victims()
        policy.evict(chosen)
        assert kept in list(policy.victims())
        assert len(policy) == 3

    def test_asking_for_admission_changes_nothing(self) -> None:
        """However often it is asked, and whatever it says, the same names are held in the same order."""
        policy = self.make_filled("a", "b", "c")
        first = list(policy.victims())
        assert policy.admits("x") == policy.admits("x")
        policy.admits("a")
        assert list(policy.victims()) == first

    def test_it_agrees_with_a_set_step_by_step(self) -> None:
        """After any thousand steps a policy holds what a plain set would."""
        chance = random.Random(7)
        policy = self.make_policy()
        held: set[str] = set()
        for _ in range(1000):
            name = f"n{chance.randrange(20)}"
            match chance.choice(("add", "touch", "remove", "evict")):
                case "add":
                    policy.add(name)
                    held.add(name)
                case "touch":
                    policy.touch(name)
                case "remove":
                    policy.remove(name)
                    held.discard(name)
                case "evict" if held:
                    victim = next(policy.victims())
                    policy.evict(victim)
                    held.remove(victim)
            assert len(policy) == len(held)
        assert set(policy.victims()) == held
