"""The order that a PlannedSampler yields: that of the sampler it follows, shared out exactly, resumed exactly, whatever
the node says. The node here is none, or one in a thread; DataLoaders and ranks are in tests/system."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import io
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler, WeightedRandomSampler

from orchestra.client.plans import PlanPublisher
from orchestra.clock import ManualClock
from orchestra.errors import UsageError
from orchestra.torch import PlannedSampler
from tests.support.cache import BLOCK, data_of
from tests.support.node import PATIENCE_S, ThreadNode, thread_node, write_config
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def alone(tmp_path: Path) -> str:
    """A configuration by which no daemon runs and none may be started."""
    return config_at(tmp_path)


def config_at(root: Path) -> str:
    path = root / "orchestra.toml"
    write_config(path, mounts=[], daemon={"autostart": False})
    return str(path)


def paths_of(count: int) -> list[str]:
    return [f"orchestra:///data/f{number}" for number in range(count)]


def planned(alone: str, count: int, *order: Any, **options: Any) -> PlannedSampler:
    return PlannedSampler(paths_of(count), *order, config=alone, **options)


def distributed(count: int, rank: int, world_size: int, **options: Any) -> DistributedSampler[int]:
    return DistributedSampler(range(count), num_replicas=world_size, rank=rank, **options)  # type: ignore[arg-type]


# -- the order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (10, 3), (7, 4), (2, 5), (8, 4)])
def test_a_seed_shuffles_and_shares_as_torch_does(alone: str, count: int, world_size: int, drop_last: bool) -> None:
    """Every rank's samples of every epoch are those of a DistributedSampler with that seed."""
    for rank in range(world_size):
        torchs = distributed(count, rank, world_size, seed=5, drop_last=drop_last)
        ours = planned(alone, count, 5, rank=rank, world_size=world_size, drop_last=drop_last)
        for epoch in (0, 1, 7):
            torchs.set_epoch(epoch)
            ours.set_epoch(epoch)
            assert (list(ours), len(ours)) == (list(torchs), len(torchs))


@pytest.mark.parametrize("options", [{"seed": 3}, {"shuffle": False}, {"seed": 3, "drop_last": True}])
def test_a_distributed_sampler_is_followed(alone: str, options: dict[str, Any]) -> None:
    """With its own rank, world size, shuffling and epochs, whether set on it or on ours, or on neither."""
    theirs, followed = distributed(11, 1, 3, **options), distributed(11, 1, 3, **options)
    ours = planned(alone, 11, followed)
    assert list(ours) == list(theirs)
    assert list(ours) == list(theirs)
    theirs.set_epoch(4)
    followed.set_epoch(4)
    assert list(ours) == list(theirs)
    theirs.set_epoch(5)
    ours.set_epoch(5)
    assert list(ours) == list(theirs)


def test_passes_are_epochs(alone: str) -> None:
    """Without set_epoch each pass is the next epoch of the seed; None is in order."""
    ours = planned(alone, 20, 9)
    first, second = list(ours), list(ours)
    assert first != second
    again = planned(alone, 20, 9)
    again.set_epoch(1)
    assert list(again) == second
    assert list(planned(alone, 5, None)) == [0, 1, 2, 3, 4]


def test_any_other_sampler_is_followed_as_it_is(alone: str) -> None:
    """What torch's own samplers draw from the global generator or their own is the same, epoch for epoch, and so is
    whatever else is drawn in between: looking ahead draws nothing."""

    def drawn(wraps: bool) -> list[Any]:
        torch.manual_seed(11)
        own = torch.Generator().manual_seed(12)
        made = [
            RandomSampler(range(9)),
            RandomSampler(range(9), generator=own),
            RandomSampler(range(9), replacement=True, num_samples=20),
            WeightedRandomSampler([1.0] * 9, 9, generator=own),
            SequentialSampler(range(9)),
        ]
        used = [planned(alone, 9, one) for one in made] if wraps else made
        return [[list(one), torch.rand(1).item()] for _ in range(3) for one in used]

    assert drawn(True) == drawn(False)


def test_a_sampler_of_all_ranks_is_shared(alone: str) -> None:
    """With a world size given, each rank takes its part of one order; together they take all of it."""
    parts = []
    for rank in range(3):
        sampler = RandomSampler(range(9), generator=torch.Generator().manual_seed(1))
        parts.append(list(planned(alone, 9, sampler, rank=rank, world_size=3)))
    whole = list(RandomSampler(range(9), generator=torch.Generator().manual_seed(1)))
    assert [index for step in zip(*parts, strict=True) for index in step] == whole


@pytest.mark.parametrize(
    ("order", "options", "message"),
    [
        (True, {}, "expected a sampler, a whole number or None, got True"),
        ("42", {}, "expected a sampler, a whole number or None, got '42'"),
        (0, {"rank": 2, "world_size": 2}, "rank: expected 0 to 1, got 2"),
        (0, {"rank": 0, "world_size": 0}, "world_size: expected at least 1, got 0"),
        (0, {"rank": 0}, "rank and world_size go together"),
        (0, {"rank": "0", "world_size": "2"}, "rank: expected a whole number, got '0'"),
        (2**64, {}, "expected a seed of at most 63 bits"),
        (iter([1, 2]), {}, "has no length"),
        (distributed(4, 0, 2), {}, "5 paths for the 4 samples"),
    ],
)
def test_what_cannot_be_planned_is_refused(alone: str, order: Any, options: dict[str, Any], message: str) -> None:
    """A truth value, a text, a rank that there is not, no rank at all, half a share, an environment's text, a seed that
    no generator takes, an order without an end, a sampler of other samples."""
    with pytest.raises(UsageError, match=message):
        planned(alone, 5, order, **options)
    with pytest.raises(UsageError, match="at least one sample"):
        PlannedSampler([], 0)
    with pytest.raises(UsageError, match="expected the path of every sample, by index, got orchestra:///data"):
        PlannedSampler("orchestra:///data", 0)
    with pytest.raises(UsageError, match="expected the path of every sample, by index, got <generator"):
        PlannedSampler((path for path in paths_of(5)), 0)


@pytest.mark.parametrize("yielded", [[0, -1], [[0, 1], [2]], ["a"]])
def test_a_sampler_of_something_else_than_indexes_is_refused(alone: str, yielded: list[Any]) -> None:
    """Negative numbers, batches, names: one sentence that says what was expected."""
    with pytest.raises(UsageError, match="list does not yield indexes of samples, whole numbers from 0"):
        list(planned(alone, 5, yielded))


# -- resuming ------------------------------------------------------------------------------------------------------


def take(sampler: PlannedSampler, count: int) -> list[int]:
    drawn = iter(sampler)
    return [next(drawn) for _ in range(count)]


def saved(sampler: PlannedSampler, **options: Any) -> dict[str, Any]:
    """The state, through the file that a checkpoint is."""
    file = io.BytesIO()
    torch.save(sampler.state_dict(**options), file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), st.data())
def test_every_sample_is_read_once_over_any_number_of_ranks(
    count: int, worlds: tuple[int, int, int], data: st.DataObject
) -> None:
    """Stopped twice and resumed on other numbers of ranks, what was read is the epoch's order, each sample once, but
    for the few that fill up the last round."""
    with ram_folder() as folder:
        alone = config_at(folder)
        read: list[int] = []
        state: dict[str, Any] | None = None
        for turn, world_size in enumerate(worlds):
            ranks = [planned(alone, count, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
            for sampler in ranks:
                if state is not None:
                    sampler.load_state_dict(state)
            rest = len(ranks[0])
            steps = rest if turn == 2 else data.draw(st.integers(0, rest - 1))
            parts = [take(sampler, steps) for sampler in ranks]
            read += [index for step in zip(*parts, strict=True) for index in step]
            states = [saved(sampler) for sampler in ranks]
            state = states[0]
            assert states == [state] * world_size
        assert read[:count] == list(planned(alone, count, 3))
        assert len(read) - count < worlds[2]
        assert state is not None
        assert (state["epoch"], state["consumed"]) == (1, 0)


def test_the_epoch_after_a_resumed_one_is_whole(alone: str) -> None:
    """The rest of the epoch, then all of the next, as if nothing had happened; set_epoch in between changes nothing."""
    for says_epoch in (False, True):
        unbroken = planned(alone, 13, 4)
        epochs = [list(unbroken) for _ in range(3)]
        broken = planned(alone, 13, 4)
        list(broken)
        assert take(broken, 5) == epochs[1][:5]
        resumed = planned(alone, 13, 4)
        resumed.load_state_dict(saved(broken))
        for epoch, wanted in ((1, epochs[1][5:]), (2, epochs[2])):
            if says_epoch:
                resumed.set_epoch(epoch)
            assert len(resumed) == len(wanted)
            assert list(resumed) == wanted


def test_a_state_of_the_end_is_the_beginning_of_the_next_epoch(alone: str) -> None:
    """Saved after the last step of an epoch, it resumes with the first of the next."""
    for order in (1, RandomSampler(range(6), generator=torch.Generator().manual_seed(2))):
        sampler = planned(alone, 6, copy.deepcopy(order))
        list(sampler)
        resumed = planned(alone, 6, copy.deepcopy(order))
        resumed.load_state_dict(saved(sampler))
        assert list(resumed) == list(sampler)


def test_what_the_training_took_counts_not_what_was_drawn(alone: str) -> None:
    """A loader with workers draws ahead; `consumed`, or what `watch` saw delivered, says where the training is."""
    sampler = planned(alone, 20, 1)
    whole = take(sampler, 12)
    resumed = planned(alone, 20, 1)
    resumed.load_state_dict(saved(sampler, consumed=4))
    assert list(resumed)[:8] == whole[4:]
    sampler.note_delivered(5)
    resumed.load_state_dict(saved(sampler))
    assert list(resumed)[:7] == whole[5:]


def test_a_followed_sampler_resumes_by_its_order(alone: str) -> None:
    """Also one that could not draw that order again; its own generator goes on as it would have."""
    own = torch.Generator().manual_seed(6)
    sampler = planned(alone, 15, RandomSampler(range(15), generator=own))
    first = take(sampler, 4)
    state = saved(sampler)
    unbroken = planned(alone, 15, RandomSampler(range(15), generator=torch.Generator().manual_seed(6)))
    whole, following = list(unbroken), list(unbroken)
    assert first == whole[:4]
    resumed = planned(alone, 15, RandomSampler(range(15), generator=torch.Generator().manual_seed(99)))
    resumed.load_state_dict(state)
    assert list(resumed) == whole[4:]
    assert list(resumed) == following


def test_a_state_of_something_else_is_refused(alone: str) -> None:
    """Other samples, another seed, another kind of order, or no state at all."""
    sampler = planned(alone, 5, 1)
    state = sampler.state_dict()
    for other in (planned(alone, 6, 1), planned(alone, 5, 2), planned(alone, 5, SequentialSampler(range(5)))):
        with pytest.raises(UsageError):
            other.load_state_dict(state)
    for nothing in ({}, {"format": 1}, None, {**state, "consumed": -1}):
        with pytest.raises(UsageError, match="not the state of a PlannedSampler"):
            sampler.load_state_dict(nothing)
    for consumed in (-5, 2.5):
        with pytest.raises(UsageError, match="consumed: expected the samples"):
            sampler.state_dict(consumed)


# -- publishing ----------------------------------------------------------------------------------------------------


def test_without_a_daemon_there_is_one_warning_and_the_same_order(alone: str, caplog: pytest.LogCaptureFixture) -> None:
    """Three epochs with nobody to publish to."""
    sampler = planned(alone, 10, distributed(10, 0, 1, seed=1))
    with caplog.at_level(logging.WARNING):
        epochs = [list(sampler) for _ in range(3)]
    assert epochs == [list(distributed(10, 0, 1, seed=1))] * 3
    assert len([record for record in caplog.records if "could not be published" in record.getMessage()]) == 1


def test_paths_that_lie_elsewhere_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder of this machine needs no plan: it says so and yields its order."""
    sampler = PlannedSampler([str(tmp_path / "a"), str(tmp_path / "b")], None, config=config_at(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert list(sampler) == [0, 1]
    assert "nor in a mounted folder" in caplog.text


def test_what_is_no_path_is_a_warning(alone: str, caplog: pytest.LogCaptureFixture) -> None:
    """Only the plan needs paths: the order is yielded all the same."""
    sampler = PlannedSampler([1, None], None, config=alone)
    with caplog.at_level(logging.WARNING):
        assert list(sampler) == [0, 1]
    assert "expected the path of a sample, got 1" in caplog.text


def test_a_copy_publishes_nothing_of_the_original(alone: str) -> None:
    """What is pickled to a worker or copied holds no connection, and yields the same."""
    sampler = planned(alone, 8, 2)
    other = copy.deepcopy(sampler)
    assert list(other) == list(sampler)


class TestWithNode:
    """A node in a thread; forty small files."""

    COUNT = 40

    @pytest.fixture
    def store(self) -> VersionedStore:
        store = VersionedStore()
        for number in range(self.COUNT):
            store.put(f"f{number}", data_of(f"f{number}", BLOCK))
        return store

    def test_the_epoch_and_the_start_of_the_next_are_published(self, tmp_path: Path, store: VersionedStore) -> None:
        """From the first sample on the node knows all that is left of this epoch and the whole (small) next one."""
        config = config_at(tmp_path)
        with thread_node(tmp_path, store) as node:
            sampler = PlannedSampler(paths_of(self.COUNT), 1, config=config)
            drawing = iter(sampler)
            next(drawing)
            (status,) = node.node.plans.status()
            assert (status["samples"], status["known_samples"]) == (self.COUNT, 2 * self.COUNT)
            list(drawing)
            (status,) = node.node.plans.status()
            assert (status["position"], status["known_samples"]) == (self.COUNT, self.COUNT)
            sampler.close()
            assert node.node.plans.status() == []

    def test_a_sampler_that_is_let_go_of_ends_its_plan(self, tmp_path: Path, store: VersionedStore) -> None:
        """A script that ends without a word leaves no plan behind; a copy that goes ends nothing of the original."""
        config = config_at(tmp_path)
        with thread_node(tmp_path, store) as node:
            sampler = PlannedSampler(paths_of(self.COUNT), 1, config=config)
            list(sampler)
            other = copy.copy(sampler)
            del other
            assert len(node.node.plans.status()) == 1
            del sampler
            gc.collect()
            assert node.node.plans.status() == []

    def _begun(self, sampler: PlannedSampler) -> tuple[Iterator[int], PlanPublisher]:
        """Draw the first sample, which publishes the plan; return the rest of them, and who publishes."""
        drawing = iter(sampler)
        next(drawing)
        assert sampler._publisher is not None
        return drawing, sampler._publisher

    def test_few_messages_say_where_the_reader_is(self, tmp_path: Path, store: VersionedStore) -> None:
        """One at the beginning, one at the end, and none in between while the clock stands still; with a second
        between the samples, and the daemon's answer, one each."""
        config, clock = config_at(tmp_path), ManualClock()
        with thread_node(tmp_path, store) as node:
            sampler = PlannedSampler(paths_of(self.COUNT), 1, config=config, clock=clock)
            drawing, publisher = self._begun(sampler)
            published = publisher.messages_sent
            list(drawing)
            assert publisher.messages_sent == published + 1
            for _ in iter(sampler):
                clock.advance(1.0)
                self._await_answer(node, sampler)
            assert publisher.messages_sent >= published + 1 + self.COUNT
            assert node.node.plans.status()[0]["epoch"] == 1
            sampler.close()

    def test_a_daemon_that_has_all_hears_of_it_once_a_second(self, tmp_path: Path, store: VersionedStore) -> None:
        """A tenth of a second between the samples: while nothing is left to fetch, every tenth of them is told."""
        config, clock = config_at(tmp_path), ManualClock()
        with thread_node(tmp_path, store) as node:
            sampler = PlannedSampler(paths_of(self.COUNT), 1, config=config, clock=clock)
            drawing, publisher = self._begun(sampler)
            while node.node.plans.rest_s(publisher.name) == 0:
                node.run(asyncio.sleep(0))
            published = publisher.messages_sent
            for _ in drawing:
                clock.advance(0.1)
                self._await_answer(node, sampler)
            assert self.COUNT // 10 <= publisher.messages_sent - published <= self.COUNT // 10 + 3
            sampler.close()

    def test_files_that_are_not_there_are_one_warning(
        self, tmp_path: Path, store: VersionedStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Misspelt paths would have the plan fetch nothing, and nobody know; what is there is fetched all the same."""
        with thread_node(tmp_path, store) as node, caplog.at_level(logging.WARNING, "orchestra.torch"):
            paths = [*paths_of(self.COUNT), "orchestra:///data/fO1", "orchestra:///dato/f1"]
            sampler = PlannedSampler(paths, 1, config=config_at(tmp_path))
            drawing, publisher = self._begun(sampler)
            while node.node.plans.rest_s(publisher.name) == 0:
                node.run(asyncio.sleep(0))
            list(drawing)
            assert sorted(sampler) == list(range(self.COUNT + 2))
            assert len(store.reads) == self.COUNT
            sampler.close()
        (said,) = [record.getMessage() for record in caplog.records]
        assert said.startswith("a file of the plan cannot be fetched ahead: no ")
        assert "/data/fO1" in said or "/dato/f1" in said

    def test_a_daemon_that_forgets_is_told_again(self, tmp_path: Path, store: VersionedStore) -> None:
        """In the middle of an epoch the daemon is another one: what it answers to the next message makes the one after
        tell it everything again."""
        config, clock = config_at(tmp_path), ManualClock()
        with thread_node(tmp_path, store) as node:
            sampler = PlannedSampler(paths_of(self.COUNT), 1, config=config, clock=clock)
            drawing = iter(sampler)
            for _ in range(10):
                next(drawing)
            node.run(self._forget(node))
            for _ in range(2):
                clock.advance(1.0)
                next(drawing)
                self._await_answer(node, sampler)
            (status,) = node.node.plans.status()
            assert (status["position"], status["known_samples"]) == (11, 2 * self.COUNT - 11)
            sampler.close()

    def test_a_daemon_that_does_not_answer_is_not_waited_for(self, tmp_path: Path, store: VersionedStore) -> None:
        """While it is busy with something else, samples are drawn and nothing more is said; then it is told where the
        reader is."""
        config, clock = config_at(tmp_path), ManualClock()
        with thread_node(tmp_path, store) as node:
            sampler = PlannedSampler(paths_of(self.COUNT), 1, config=config, clock=clock)
            drawing, publisher = self._begun(sampler)
            published = publisher.messages_sent
            with self._held(node):
                for _ in range(20):
                    clock.advance(1.0)
                    next(drawing)
                assert publisher.messages_sent == published + 1
            self._await_answer(node, sampler)
            clock.advance(1.0)
            next(drawing)
            self._await_answer(node, sampler)
            assert node.node.plans.status()[0]["position"] == 21
            sampler.close()

    @staticmethod
    @contextlib.contextmanager
    def _held(node: ThreadNode) -> Iterator[None]:
        """Keep the node's loop from doing anything inside the block."""
        is_held, may_go = threading.Event(), threading.Event()

        def hold() -> None:
            is_held.set()
            may_go.wait(PATIENCE_S)

        node.loop.call_soon_threadsafe(hold)
        assert is_held.wait(PATIENCE_S)
        try:
            yield
        finally:
            may_go.set()

    @staticmethod
    def _await_answer(node: ThreadNode, sampler: PlannedSampler) -> None:
        while sampler._publisher is not None and sampler._publisher.is_waiting:
            node.run(asyncio.sleep(0))

    @staticmethod
    async def _forget(node: Any) -> None:
        node.node.plans._plans.clear()
        node.node.plans._tables.clear()
