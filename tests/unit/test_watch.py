"""A watched loader yields what the loader yields, and its waits add up to the time that the loop waited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from orchestra.clock import ManualClock
from orchestra.observe.stalls import Waits
from orchestra.torch import PlannedSampler, TensorBatches, prefetch_to_device, watch
from tests.support.cache import BLOCK, data_of
from tests.support.node import ThreadNode, thread_node, write_config
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

COUNT = 12


class Slow(Dataset[int]):
    """Each sample takes a second of the test's clock."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> int:
        self.clock.advance(1.0)
        return index


class Reading(Dataset[int]):
    """Each sample is a file of the node."""

    def __init__(self, node: ThreadNode) -> None:
        self.client = node.client()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> int:
        return len(self.client.read_file(f"/data/f{index}"))


class Scalars:
    """A writer that remembers."""

    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.written.append((tag, scalar_value, global_step))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "orchestra.toml"
    write_config(path, mounts=[], daemon={"autostart": False})
    return str(path)


def test_the_batches_are_the_loaders_own(config: str) -> None:
    """In order, epoch after epoch, with its length and its attributes."""
    clock = ManualClock()
    loader = DataLoader(Slow(clock), batch_size=5)
    watched = watch(loader, config=config, clock=clock)
    for _ in range(2):
        assert [batch.tolist() for batch in watched] == [batch.tolist() for batch in loader]
    assert (len(watched), watched.batch_size) == (3, 5)


def test_waiting_and_computing_are_told_apart(config: str) -> None:
    """Four seconds a batch are waited for, ten are computed: without a node all of the wait is the loader's own."""
    clock = ManualClock()
    watched = watch(DataLoader(Slow(clock), batch_size=4), config=config, clock=clock)
    for _ in watched:
        clock.advance(10.0)
    (epoch,) = watched.epochs
    assert (epoch.steps, epoch.time_s, epoch.waits) == (3, 42.0, Waits(decode_s=12.0))
    assert [step.waits.total_s for step in watched.steps] == [4.0] * 3
    assert "decoding" in watched.report()


def test_an_epoch_that_is_left_early_is_counted(config: str) -> None:
    """With the steps that there were; the next has the next number."""
    clock = ManualClock()
    watched = watch(DataLoader(Slow(clock), batch_size=1), config=config, clock=clock)
    for _ in watched:
        break
    assert len(list(watched)) == COUNT
    assert [(epoch.epoch, epoch.steps) for epoch in watched.epochs] == [(1, 1), (2, COUNT)]


def test_a_writer_gets_steps_and_epochs(config: str) -> None:
    """One scalar a step over all epochs, and each cause once an epoch."""
    clock, writer = ManualClock(), Scalars()
    watched = watch(DataLoader(Slow(clock), batch_size=4), writer, config=config, clock=clock)
    for _ in range(2):
        list(watched)
    steps = [step for tag, _, step in writer.written if tag == "stalls/wait_s"]
    assert steps == list(range(8))  # three batches an epoch, and finding that there are no more
    assert ("stalls/epoch/decode_s", 12.0, 1) in writer.written
    assert {tag for tag, _, step in writer.written if step == 2 and tag.startswith("stalls/epoch")} == {
        f"stalls/epoch/{name}"
        for name in ("store_s", "peer_s", "disk_s", "metadata_s", "queue_s", "decode_s", "waited_ratio")
    }


@pytest.mark.parametrize("wraps", [False, True])
def test_a_planned_sampler_is_told_what_was_delivered(config: str, wraps: bool) -> None:
    """Its state is where the training is, though the loader drew ahead; also inside of a batch sampler."""
    clock = ManualClock()
    sampler = PlannedSampler([f"orchestra:///data/f{index}" for index in range(COUNT)], 1, config=config)
    options: dict[str, Any] = {"batch_size": 4, "sampler": sampler}
    if wraps:
        options = {"batch_sampler": BatchSampler(sampler, 4, drop_last=False)}
    watched = watch(DataLoader(Slow(clock), **options), config=config, clock=clock)
    for number, _ in enumerate(watched, 1):
        assert sampler.state_dict()["consumed"] == 4 * number
        if number == 2:
            break


def test_batches_that_no_dataloader_gives_are_watched_too(config: str) -> None:
    """TensorBatches, and a generator that goes round it."""
    batches = TensorBatches(torch.arange(COUNT), batch_size=5)
    for loader in (batches, prefetch_to_device(batches, "cpu")):
        watched = watch(loader, config=config, clock=ManualClock())
        assert [len(numbers) for (numbers,) in watched] == [5, 5, 2]
        assert [epoch.steps for epoch in watched.epochs] == [3]


def test_what_the_node_waited_for_is_the_steps_own(tmp_path: Path, config: str) -> None:
    """A cold epoch waited for the store among others, a warm one for nothing of the node's; bytes are counted."""
    store = VersionedStore()
    for index in range(COUNT):
        store.put(f"f{index}", data_of(f"f{index}", BLOCK))
    with thread_node(tmp_path, store) as node:
        watched = watch(DataLoader(Reading(node), batch_size=4), config=config)
        for _ in range(2):
            assert [batch.tolist() for batch in watched] == [[BLOCK] * 4] * 3
        cold, warm = watched.epochs
        assert cold.node.misses == COUNT
        assert cold.node.fetched_bytes == cold.node.read_bytes == COUNT * BLOCK
        assert cold.waits.store_s > 0
        assert (warm.node.misses, warm.node.fetched_bytes, warm.waits.store_s) == (0, 0, 0.0)
        assert warm.node.read_bytes == COUNT * BLOCK
