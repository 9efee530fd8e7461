"""Every eviction policy keeps the contract; then what each promises beyond it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import islice

import pytest

from orchestra.blocks.eviction import (
    POLICIES,
    AutoPolicy,
    EvictionPolicy,
    LruPolicy,
    NeverPolicy,
    NextUses,
    PlanPolicy,
    S3FifoPolicy,
    SievePolicy,
    make_policy,
)
from orchestra.testing.eviction import EvictionSuite


def names(count: int, first: int = 0) -> list[str]:
    """Names like those of small objects."""
    return [f"{index:032x}" for index in range(first, first + count)]


def read(policy: EvictionPolicy, held: set[str], capacity: int, reads: Iterable[str]) -> tuple[int, int]:
    """Read through a cache of `capacity` names ordered by `policy`; return how many were hits and how many writes."""
    hits = writes = 0
    for name in reads:
        if name in held:
            hits += 1
        elif len(held) < capacity or policy.admits(name):
            writes += 1
            if len(held) >= capacity:
                victim = next(policy.victims())
                policy.evict(victim)
                held.remove(victim)
            policy.add(name)
            held.add(name)
        policy.touch(name)
    assert len(policy) == len(held)
    return hits, writes


def epochs(dataset: list[str], count: int, seed: int = 1) -> list[str]:
    """The data set in `count` different orders, one after the other."""
    chance = random.Random(seed)
    return [name for _ in range(count) for name in chance.sample(dataset, len(dataset))]


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


class TestNever(EvictionSuite):
    """Keeps what came first."""

    def make_policy(self) -> EvictionPolicy:
        return NeverPolicy()

    def test_epochs_hit_what_fits_and_write_nothing_more(self) -> None:
        """A data set three times the cache is a hit for one read in three, and is written once."""
        policy, held, dataset = self.make_policy(), set[str](), names(300)
        read(policy, held, 100, epochs(dataset, 1))
        assert read(policy, held, 100, epochs(dataset, 3, seed=2)) == (300, 0)


class TestSieve(EvictionSuite):
    """One queue and a hand."""

    def make_policy(self) -> EvictionPolicy:
        return SievePolicy()

    def test_what_was_read_again_outlives_what_was_not(self) -> None:
        """The hand passes over the one name that was read twice."""
        policy, held = self.make_policy(), set[str]()
        read(policy, held, 4, ["a", "b", "a", "c", "d", "e", "f", "g"])
        assert "a" in held


class TestS3Fifo(EvictionSuite):
    """Three queues."""

    def make_policy(self) -> EvictionPolicy:
        return S3FifoPolicy()

    def test_a_scan_does_not_evict_what_was_read_twice(self) -> None:
        """Names read twice outlive a thousand names read once."""
        policy, held = self.make_policy(), set[str]()
        loved = names(20)
        read(policy, held, 50, loved + loved + names(1000, first=100))
        assert set(loved) <= held

    def test_extents_fetched_ahead_and_read_once_are_not_read_again(self) -> None:
        """The read that an extent was fetched for does not count as a second one: a scan that is prefetched passes."""
        policy = self.make_policy()
        for name in names(10):
            policy.add(name)
        for name in names(5):
            policy.touch(name)
        policy.touch("0" * 32)
        first = list(islice(policy.victims(), 9))
        assert first == names(9, first=1)


class TestPlan(EvictionSuite):
    """Belady's rule; without a plan, LRU."""

    def make_policy(self) -> EvictionPolicy:
        return PlanPolicy(LruPolicy())

    def test_what_is_needed_last_goes_first(self) -> None:
        """Names that no plan names go before those that it does, and these from the furthest use to the nearest."""
        policy = self.planned("a", "b", "x", "c")
        policy.follow("r", NextUses(["c", "a", "c", "b"]))
        assert list(policy.victims()) == ["x", "b", "a", "c"]

    def test_what_was_read_is_due_at_its_next_use(self) -> None:
        """Once the reads below a position are done, a name counts by its use after them, or not at all."""
        policy = self.planned("a", "b", "c")
        policy.follow("r", NextUses(["a", "b", "c", "a"], first=10))
        policy.advance("r", 11)
        assert list(policy.victims()) == ["a", "c", "b"]
        assert (policy.next_use("a"), policy.next_use("b")) == (2, 0)
        policy.advance("r", 12)
        assert list(policy.victims()) == ["b", "a", "c"]
        policy.advance("r", 14)
        assert policy.next_use("a") is None
        assert sorted(policy.victims()) == ["a", "b", "c"]

    def test_only_what_is_needed_sooner_is_admitted(self) -> None:
        """With nothing unplanned to give up, a name must be due before the one that would leave for it."""
        policy = self.planned("a", "b")
        policy.follow("r", NextUses(["a", "soon", "b", "late"]))
        assert policy.admits("soon")
        assert not policy.admits("late")
        assert not policy.admits("unknown")
        policy.add("unplanned")
        assert policy.admits("late")

    def test_the_first_of_several_readers_counts(self) -> None:
        """A name that two readers need is due when the first of them comes to it; a reader that ends is forgotten."""
        policy = self.planned("a", "b")
        policy.follow("r0", NextUses(["b", "x", "a"]))
        policy.follow("r1", NextUses(["a"]))
        assert policy.next_use("a") == 0
        policy.forget("r1")
        assert policy.next_use("a") == 2
        assert list(policy.victims()) == ["a", "b"]
        policy.advance("r1", 5)
        policy.forget("r0")
        assert sorted(policy.victims()) == ["a", "b"]

    def test_a_new_plan_replaces_the_old_one(self) -> None:
        """What only the old plan named is unplanned again."""
        policy = self.planned("a", "b")
        policy.follow("r", NextUses(["a", "b"]))
        policy.follow("r", NextUses(["b"], first=1))
        assert list(policy.victims()) == ["a", "b"]
        assert policy.next_use("a") is None

    def test_reads_may_be_expected_bit_by_bit(self) -> None:
        """Expectations add up, in any order; one about a position that is passed already says nothing."""
        policy = self.planned("a", "b", "c")
        policy.expect("r", 5, ["a"])
        policy.expect("r", 9, ["b", "c"])
        policy.expect("r", 6, ["c"])
        assert list(policy.victims()) == ["b", "c", "a"]
        policy.advance("r", 7)
        policy.expect("r", 6, ["a"])
        assert next(policy.victims()) == "a"
        assert policy.next_use("c") == 2

    def test_a_long_plan_keeps_the_order_exact(self) -> None:
        """Step by step over three epochs the first victim is the name whose next use is furthest, as if looked up."""
        dataset = names(60)
        order = epochs(dataset, 3)
        policy = self.planned(*dataset)
        policy.follow("r", NextUses(order))
        for position in range(120):
            policy.advance("r", position)
            furthest = max(dataset, key=lambda name: order.index(name, position))
            assert next(policy.victims()) == furthest

    def test_a_plan_beats_knowing_nothing(self) -> None:
        """Shuffled epochs with the order known hit more than the cached share."""
        policy, held, dataset = PlanPolicy(LruPolicy()), set[str](), names(300)
        order = epochs(dataset, 4)
        policy.follow("r", NextUses(order))
        hits = 0
        for position, name in enumerate(order):
            policy.advance("r", position)
            hits += read(policy, held, 100, [name])[0]
        assert hits / (3 * 300) >= 100 / 300

    def planned(self, *held: str) -> PlanPolicy:
        policy = PlanPolicy(LruPolicy())
        for name in held:
            policy.add(name)
        return policy


class TestAuto(EvictionSuite):
    """What the configuration calls `auto`."""

    def make_policy(self) -> EvictionPolicy:
        return make_policy("auto")

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
    def test_shuffled_epochs_hit_what_fits_and_write_nothing_more(self, share: float) -> None:
        """Of a data set larger than the cache, from the second epoch on, the cached share is hit within 0.02, and less
        than a hundredth of it is written."""
        policy, held, dataset = self.make_policy(), set[str](), names(3000)
        capacity = int(share * len(dataset))
        read(policy, held, capacity, epochs(dataset, 1))
        hits, writes = read(policy, held, capacity, epochs(dataset, 2, seed=2))
        assert hits / (2 * len(dataset)) == pytest.approx(share, abs=0.02)
        assert writes < 0.01 * len(dataset)

    def test_the_same_order_in_every_epoch_is_a_scan_too(self) -> None:
        """A loop over more than fits, which LRU never hits, hits what fits."""
        policy, held, dataset = self.make_policy(), set[str](), names(1000)
        read(policy, held, 500, dataset)
        assert read(policy, held, 500, dataset * 3)[0] == pytest.approx(1500, abs=30)

    def test_another_data_set_takes_the_place_of_the_last(self) -> None:
        """After epochs over one data set, one that fits is cached in its first epoch."""
        policy, held = self.make_policy(), set[str]()
        read(policy, held, 500, epochs(names(1000), 4))
        other = names(300, first=5000)
        read(policy, held, 500, epochs(other, 1))
        assert read(policy, held, 500, epochs(other, 1, seed=2))[0] > 0.9 * len(other)

    def test_skewed_reads_are_no_scan(self) -> None:
        """Where some names are read far more often than others it hits as S3-FIFO does."""
        chance = random.Random(3)
        dataset = names(2000)
        reads = chance.choices(dataset, [1 / (rank + 1) for rank in range(len(dataset))], k=8000)
        reference = read(S3FifoPolicy(), set(), 200, reads)[0]
        assert read(self.make_policy(), set(), 200, reads)[0] > 0.99 * reference

    def test_extents_read_piece_by_piece_are_one_read(self) -> None:
        """Epochs over large extents, each read in a hundred pieces by one reader of four, are seen as epochs."""
        policy = AutoPolicy()
        dataset = [f"{name}.0" for name in names(64)]
        for name in dataset[:32]:
            policy.add(name)
        for first in range(0, 4 * len(dataset), 4):
            readers = epochs(dataset, 4)[first : first + 4]
            for _ in range(100):
                for name in readers:
                    policy.touch(name)
        assert policy.is_scan

    def test_what_it_remembers_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a data set with more names than may be remembered a sample is, and the scan is seen all the same."""
        monkeypatch.setattr("orchestra.blocks.eviction.auto._REMEMBERED_MAX", 200)
        policy, held, dataset = AutoPolicy(), set[str](), names(3000)
        read(policy, held, 1000, epochs(dataset, 3))
        assert policy.is_scan
        assert policy.remembered_count <= 200


class TestPlannedAuto(EvictionSuite):
    """The default, while a plan is followed."""

    def make_policy(self) -> EvictionPolicy:
        policy = PlanPolicy(AutoPolicy())
        policy.follow("r", NextUses(["z", "y", "c", "b", "a", "n7", "n3"]))
        return policy

    def test_what_was_only_just_added_is_not_the_first_to_go(self) -> None:
        """Not of names whose use is known: there the furthest goes, whenever it came."""
        policy = self.make_filled("a", "b", "c")
        assert next(policy.victims()) == "a"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_have_names(name: str) -> None:
    """The configuration's words make policies that hold nothing yet."""
    assert len(make_policy(name)) == 0
