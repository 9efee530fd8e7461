"""Batches handed over in memory that is used again: what a training gets is what torch would have given."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from orchestra.torch import FileDataset, handover

SAMPLE_BYTES = 20_000
BATCH = 8  # 160 kB
COUNT = 8 * 40 + 3


def pixels(data: bytes) -> torch.Tensor:
    """A sample of 20 kB that begins with the file's number."""
    return torch.full((SAMPLE_BYTES // 4,), int(data), dtype=torch.int32)


def parts(data: bytes) -> dict[str, Any]:
    """A sample of many kinds."""
    wide = pixels(data)
    return {
        "wide": wide.view(100, 50).to(torch.bfloat16),
        "flags": wide % 2 == 0,
        "small": wide[:3],
        "one": wide[0] / 2,
    }


def of_two_lengths(data: bytes) -> torch.Tensor:
    """Samples of which some batches have longer ones."""
    return pixels(data).repeat(1 + int(data) // 64)


def with_views(samples: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """A collate function of the user's: the batch, a part of it, its transpose, and another that was made of it."""
    batch: torch.Tensor = default_collate([sample for sample, _ in samples])
    return batch, batch[:, 1:5], batch.T, batch + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that hold their number."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(COUNT):
        (folder / str(number)).write_text(str(number))
    return folder


@pytest.fixture(autouse=True)
def nothing_mapped() -> Iterator[None]:
    """Each test begins and ends without a worker's memory."""
    handover._mapped.clear()
    yield
    handover._mapped.clear()


def dataset(folder: Path, transform: Callable[[bytes], Any] = pixels, count: int = COUNT) -> FileDataset:
    return FileDataset([str(number) for number in range(count)], range(count), transform, folder=folder)


def loader(data: Any, workers: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=BATCH, num_workers=workers, **options)


def wanted(number: int, count: int = COUNT) -> torch.Tensor:
    """The first values of batch `number`."""
    return torch.arange(number * BATCH, min(count, (number + 1) * BATCH), dtype=torch.int32)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("transform", [pixels, parts, len])
def test_batches_are_those_without_workers(folder: Path, transform: Callable[[bytes], Any]) -> None:
    """Every value, type and shape, the smaller last batch and the labels included."""
    data = dataset(folder, transform, 19)
    assert same(list(loader(data)), list(loader(data, workers=0)))


def test_samples_of_other_lengths_follow_one_another(folder: Path) -> None:
    """Batches of 160, 320 and 480 kB in turn."""
    chosen = [number for start in (0, 64, 128, 8, 72, 136) for number in range(start, start + BATCH)]
    data = Subset(dataset(folder, of_two_lengths), chosen)
    assert same(list(loader(data)), list(loader(data, workers=0)))


def test_memory_is_used_again_and_only_then(folder: Path) -> None:
    """An epoch of forty batches lies in a few places; each holds what it should, those that are kept to the end too."""
    kept = []
    places = set()
    for number, (batch, labels) in enumerate(loader(dataset(folder))):
        places.add(batch.data_ptr())
        assert torch.equal(batch[:, 0], wanted(number))
        assert torch.equal(labels, wanted(number).long())
        if number % 10 == 3:
            kept.append((number, batch.numpy()[:, 7:9]))
        batch.zero_()
    assert len(places) <= 20
    assert len(kept) == 4
    for number, values in kept:
        assert not values.any(), number  # zeroed above; a worker that wrote there would show


def test_a_training_that_keeps_all_batches_gets_all(folder: Path) -> None:
    """More of them than a worker has memory for: the others come torch's way."""
    count = (handover.SEGMENTS_MAX + 4) * BATCH
    batches = list(loader(dataset(folder, count=count), workers=1))
    assert len(handover._mapped) == handover.SEGMENTS_MAX
    for number, (batch, _) in enumerate(batches):
        assert torch.equal(batch[:, -1], wanted(number, count))


def test_a_users_collate_function_may_do_as_it_likes(folder: Path) -> None:
    """Views of a batch and what is computed from it come as they are."""
    data = dataset(folder, count=40)
    got = list(loader(data, collate_fn=with_views))
    assert same(got, list(loader(data, workers=0, collate_fn=with_views)))


def test_workers_that_stay_begin_anew_in_the_middle_of_an_epoch(folder: Path) -> None:
    """An epoch that is left after three batches, and two whole ones; few places in all."""
    data = loader(dataset(folder, count=120), persistent_workers=True)
    for number, (batch, _) in enumerate(data):
        assert torch.equal(batch[:, 0], wanted(number, 120))
        if number == 2:
            break
    for _ in range(2):
        for number, (batch, _labels) in enumerate(data):
            assert torch.equal(batch[:, 0], wanted(number, 120))
    assert 0 < len(handover._mapped) <= 20


@pytest.mark.parametrize("start_method", ["spawn"])
def test_workers_that_are_started_anew(folder: Path, start_method: str) -> None:
    """Workers that inherit nothing hand over in the same way."""
    data = loader(dataset(folder, count=64), workers=1, multiprocessing_context=start_method)
    for number, (batch, _) in enumerate(data):
        assert torch.equal(batch[:, 0], wanted(number, 64))
    assert 0 < len(handover._mapped) <= 8


def test_what_ended_workers_had_is_forgotten(folder: Path) -> None:
    """With the last batch of an epoch goes the rest; descriptors as well."""
    before = len(os.listdir("/proc/self/fd"))
    for batch, _ in loader(dataset(folder)):
        assert len(batch)
    assert handover._mapped
    del batch
    assert not handover._mapped
    gc.collect()  # a loader's own pipes may hang on a cycle
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # torch's and multiprocessing's own, of the first time


def test_a_child_of_the_training_keeps_its_batch(folder: Path) -> None:
    """A process that is forked with a batch reads the same values when the training is many batches further."""
    batches = iter(loader(dataset(folder), workers=1))
    batch, _ = next(batches)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(tell)
        os.read(told, 1)  # until the training is through
        os._exit(0 if torch.equal(batch[:, 5], wanted(0)) and not handover._mapped else 1)
    for batch, _ in batches:
        assert len(batch)
    os.close(told)
    os.close(tell)
    assert os.waitpid(child, 0)[1] == 0


def test_an_array_of_a_batch_that_is_sent_on_stays_as_it_was(folder: Path) -> None:
    """`share_memory_`, which any queue calls, gives a batch other memory: arrays made before keep theirs, unchanged."""
    kept = []
    for batch, _ in loader(dataset(folder, count=80), workers=1):
        kept.append(batch.numpy())
        batch.share_memory_()
    for number, values in enumerate(kept):
        assert (values[:, 7] == wanted(number, 80).numpy()).all()


def as_a_view_and_an_array(samples: Sequence[Any]) -> tuple[torch.Tensor, Any]:
    """A collate function of the user's: one part of the batch as a tensor, the other as an array."""
    batch: torch.Tensor = default_collate([sample for sample, _ in samples])
    return batch[:, :5], batch[:, 5:].numpy()


def test_an_array_of_a_workers_batch_goes_over_as_it_was(folder: Path) -> None:
    """A view's journey takes the batch its memory: what the array shows is not written to before it is sent."""
    for number, (view, rest) in enumerate(loader(dataset(folder), collate_fn=as_a_view_and_an_array)):
        assert torch.equal(view[:, 4], wanted(number))
        assert (rest == wanted(number).numpy()[:, None]).all()


def test_a_default_device_is_not_the_batchs(folder: Path) -> None:
    """A training whose new tensors are on another device gets its batches where they are."""
    batches = iter(loader(dataset(folder, count=16), workers=1))
    with torch.device("meta"):
        batch, labels = next(batches)
    assert torch.equal(batch[:, 0], wanted(0))
    assert torch.equal(labels, wanted(0).long())


def test_garbage_may_hold_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that the collector finds while others are being forgotten is dropped as any."""

    class Holder:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            handover._mapped.pop(((os.getpid(), b""), 0))

    monkeypatch.setattr(handover, "_mapped", {((os.getpid(), b""), n): np.zeros(1, np.uint8) for n in range(100)})
    before = gc.get_threshold()
    gc.collect()
    Holder()
    gc.set_threshold(30)
    try:
        handover._forget_ended()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(handover._mapped) == 99


def test_only_workers_are_changed(folder: Path) -> None:
    """Reading a batch here, or by workers, leaves torch's collation in this process as it is."""
    before = dict(default_collate_fn_map)
    data = dataset(folder, count=16)
    data.__getitems__([0, 1])
    assert len(list(loader(data))) == 2
    assert default_collate_fn_map == before


class TestPool:
    """A worker's memory, without a worker."""

    @pytest.fixture
    def pool(self) -> Iterator[handover._Pool]:
        pool = handover._Pool()
        yield pool
        pool.close()

    def test_a_tensor_that_was_not_sent_comes_back(self, pool: handover._Pool) -> None:
        """At once, for one that is up to half as large; a much smaller one gets memory of its own."""
        first = pool.tensor((100, 1000), torch.float32)
        assert first is not None
        place = first.data_ptr()
        other = pool.tensor((100, 1000), torch.float32)
        assert other is not None
        assert other.data_ptr() != place
        del first
        for shape, is_there in (((60, 1000), True), ((20, 1000), False), ((100, 1000), True)):
            again = pool.tensor(shape, torch.float32)
            assert again is not None
            assert (again.data_ptr() == place) is is_there
            del again

    def test_a_child_of_a_worker_shares_nothing_that_is_written_to(self, pool: handover._Pool) -> None:
        """A tensor that a worker has while it forks: its place is not used again."""
        first = pool.tensor((100, 1000), torch.float32)
        assert first is not None
        place = first.data_ptr()
        memory = pool._segments[0].memory  # mapped, so that no other gets its address
        handover._count_fork()
        del first
        held = [pool.tensor((100, 1000), torch.float32) for _ in range(2)]
        assert all(one is not None and one.data_ptr() != place for one in held)
        assert place == memory[handover._HEADER_BYTES :].ctypes.data

    def test_memory_is_bounded(self, pool: handover._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pool that is full gives none; what is free and does not fit makes room for what does."""
        monkeypatch.setattr(handover, "POOL_BYTES_MAX", 1_000_000)
        small = [pool.tensor((100_000,), torch.uint8) for _ in range(8)]
        assert all(one is not None for one in small)
        assert pool.tensor((400_000,), torch.uint8) is None
        del small
        assert pool.tensor((400_000,), torch.uint8) is not None

    def test_a_sent_tensor_is_the_trainings_until_it_is_dropped(self, pool: handover._Pool) -> None:
        """And the same memory is not sent twice."""
        made = pool.tensor((100, 1000), torch.float32)
        assert made is not None
        made.fill_(3)
        place = made.data_ptr()
        how = pool.sent(made)
        assert how is not None
        assert pool.sent(made) is None
        received = how[0](*how[1])
        del made
        other = pool.tensor((100, 1000), torch.float32)
        assert other is not None
        assert other.data_ptr() != place
        other.fill_(4)
        assert torch.equal(received, torch.full((100, 1000), 3.0))
        del received, other
        again = [pool.tensor((100, 1000), torch.float32) for _ in range(2)]
        assert place in [one.data_ptr() for one in again if one is not None]
