"""Load jobs of a whole node: what is fetched, what is told, how they end, and how they go on after a restart.

The node runs in a thread over a store in memory that counts.
"""

from __future__ import annotations

import asyncio
import errno
import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from orchestra.blocks.disk import LocalDisk
from orchestra.clock import ManualClock, SystemClock
from orchestra.config import FetchConfig
from orchestra.daemon.jobs.job import Job, JobState, LoadSpec
from orchestra.errors import NotFoundError, StoreError
from orchestra.prefetch.pace import Pace
from orchestra.prefetch.tree import PAGE_FILES, TreeFile
from orchestra.stores.contract import ListPage
from orchestra.stores.registry import wrapped
from orchestra.testing.fault_store import Fail, Fault, FaultStore, Stall, Swap
from tests.support.cache import BLOCK, EXTENT, data_of
from tests.support.node import PATIENCE_S, ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


async def _submit(node: ThreadNode, spec: LoadSpec, list_file: str) -> Job:
    return node.node.jobs.submit(spec, list_file=list_file)


async def _wait_over(node: ThreadNode, job_id: str) -> Job:
    async with asyncio.timeout(PATIENCE_S):
        while not (job := await node.node.jobs.wait(job_id, 1)).state.is_over:
            pass
    return job


def submit(node: ThreadNode, path: str = "/data", *, list_file: str = "", **spec: object) -> Job:
    """Start a load."""
    return node.run(_submit(node, LoadSpec(path, is_listed=bool(list_file), **spec), list_file))  # type: ignore[arg-type]


def load(node: ThreadNode, path: str = "/data", **spec: object) -> Job:
    """Start a load and wait for its end."""
    return node.run(_wait_over(node, submit(node, path, **spec).job_id))  # type: ignore[arg-type]


def put_tree(store: VersionedStore, count: int, size: int = BLOCK) -> dict[str, bytes]:
    """Put files into folders of ten; return them by path."""
    files = {f"{index // 10:02d}/{index:03d}": data_of(str(index), size) for index in range(count)}
    for key, data in files.items():
        store.put(key, data)
    return {f"/data/{key}": data for key, data in files.items()}


def test_a_load_brings_everything_once_and_reads_ask_for_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """Small files, large ones and empty ones are all cached by one GET per part; reads afterwards ask nobody."""
    files = put_tree(store, 30)
    files |= {"/data/large": data_of("large", 3 * EXTENT + 5), "/data/empty": b""}
    store.put("large", files["/data/large"])
    store.put("empty", b"")
    with thread_node(tmp_path, store) as node:
        job = load(node)
        assert (job.state, job.files_total, job.files_done, job.files_failed) == (JobState.SUCCEEDED, 32, 32, 0)
        assert job.bytes_done == job.bytes_total == sum(map(len, files.values()))
        assert len(store.reads) == 31
        client, asked = node.client(), store.requests
        assert {path: client.read_file(path) for path in files} == files
        assert store.requests == asked
        assert client.messages_sent == 0


def test_a_second_load_fetches_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """What is cached is found in the cache."""
    put_tree(store, 25)
    with thread_node(tmp_path, store) as node:
        load(node)
        reads = len(store.reads)
        assert load(node).state is JobState.SUCCEEDED
        assert len(store.reads) == reads


# -- what is where -------------------------------------------------------------------------------------------------


def test_a_load_of_one_folder_leaves_the_rest_alone(tmp_path: Path, store: VersionedStore) -> None:
    """Only what lies at and below the path comes; a path may be one file."""
    put_tree(store, 30)
    with thread_node(tmp_path, store) as node:
        assert load(node, "/data/01").files_total == 10
        assert {key for key, _, _ in store.reads} == {f"01/{index:03d}" for index in range(10, 20)}
        assert load(node, "/data/00/003").files_total == 1
        assert len(store.reads) == 11


def test_a_load_of_the_root_enters_every_mount(tmp_path: Path) -> None:
    """Nested mounts are loaded from their own stores, and what they hide is not loaded."""
    outer, inner = VersionedStore("outer://"), VersionedStore("inner://")
    for key in ("a", "deep/hidden", "other/b"):
        outer.put(key, b"outer")
    inner.put("c", b"inner")
    with thread_node(tmp_path, {"/data": outer, "/data/deep": inner}) as node:
        job = load(node, "/")
        assert (job.state, job.files_total) == (JobState.SUCCEEDED, 3)
    assert sorted(key for key, _, _ in outer.reads) == ["a", "other/b"]
    assert [key for key, _, _ in inner.reads] == ["c"]


def test_an_empty_prefix_is_loaded_at_once(tmp_path: Path, store: VersionedStore) -> None:
    """Nothing to load is a success."""
    with thread_node(tmp_path, store) as node:
        job = load(node)
        assert (job.state, job.files_total, job.bytes_total) == (JobState.SUCCEEDED, 0, 0)


def test_a_missing_path_fails_the_job_with_its_name(tmp_path: Path, store: VersionedStore) -> None:
    """The job ends as FAILED and says what is not there."""
    store.put("a", b"x")
    with thread_node(tmp_path, store) as node:
        job = load(node, "/data/nothing")
        assert (job.state, job.reason) == (JobState.FAILED, "error")
        assert "/data/nothing" in job.message


def test_what_a_list_names_twice_is_there_once(tmp_path: Path, store: VersionedStore) -> None:
    """A file named again, absolute and relative, or named with a folder around it counts once in files, bytes,
    failures, and in the room that the load needs."""
    put_tree(store, 20)
    listed = tmp_path / "list"
    listed.write_text("00/001\n/data/00/001\n00\nnothing\n00/\n" + "00/002\nnothing\n" * PAGE_FILES)
    with thread_node(tmp_path, store, cache={"size_bytes": 12 * BLOCK}) as node:
        job = node.run(_wait_over(node, submit(node, list_file=str(listed)).job_id))
        assert (job.files_total, job.files_done, job.files_failed) == (11, 10, 1), job.failures
        assert job.bytes_done == job.bytes_total == 10 * BLOCK
        assert [path for path, _ in job.failures] == ["/data/nothing"]


def test_a_list_names_what_is_loaded(tmp_path: Path, store: VersionedStore) -> None:
    """Relative lines start at the path, folders mean what is below them, and a missing name is a failure of its own."""
    put_tree(store, 30)
    listed = tmp_path / "list"
    listed.write_text("00/001\n/data/00/002\n\n02\nnothing\n")
    with thread_node(tmp_path, store) as node:
        job = submit(node, list_file=str(listed))
        listed.unlink()  # the daemon has a copy
        job = node.run(_wait_over(node, job.job_id))
        assert (job.state, job.files_done, job.files_failed) == (JobState.FAILED, 12, 1)
        assert [path for path, _ in job.failures] == ["/data/nothing"]
        assert len(store.reads) == 12


# -- failures ------------------------------------------------------------------------------------------------------


def test_files_that_fail_are_named_and_a_second_load_fetches_only_those(tmp_path: Path, store: VersionedStore) -> None:
    """Errors in the middle do not stop the rest; the next load asks for what is missing and nothing else."""
    put_tree(store, 40)
    faults = FaultStore(store)
    with thread_node(tmp_path, faults) as node:
        fault = faults.inject(Fail(StoreError("the store has lost it")), on="read", at=11, times=5)
        job = load(node)
        assert fault.fired == 5
        assert (job.state, job.reason, job.files_done, job.files_failed) == (JobState.FAILED, "files", 35, 5)
        assert all("has lost it" in message for _, message in job.failures)
        lost = {path.removeprefix("/data/") for path, _ in job.failures}
        store.reads.clear()
        assert load(node).state is JobState.SUCCEEDED
        assert {key for key, _, _ in store.reads} == lost
        assert len(store.reads) == 5


def test_retry_looks_only_at_what_failed(tmp_path: Path, store: VersionedStore) -> None:
    """A retry asks the store about the failed files and about nothing else, not even by a listing."""
    put_tree(store, 40)
    faults = FaultStore(store)
    with thread_node(tmp_path, faults) as node:
        faults.inject(Fail(StoreError("the store has lost it")), on="read", at=11, times=5)
        failed = load(node)
        store.reads.clear()
        store.lists.clear()
        job = load(node, retry_of=failed.job_id)
        assert (job.state, job.files_total, job.files_done) == (JobState.SUCCEEDED, 5, 5)
        assert {f"/data/{key}" for key, _, _ in store.reads} == {path for path, _ in failed.failures}
        assert not store.lists


class HalfListed(VersionedStore):
    """A store that cannot list one folder."""

    async def list_directory(self, prefix: str) -> AsyncIterator[ListPage]:
        if prefix == "01/":
            raise StoreError("no such shard")
        async for page in super().list_directory(prefix):
            yield page


def test_a_folder_that_cannot_be_listed_is_a_failure_and_the_rest_comes(tmp_path: Path) -> None:
    """An error of a LIST names the folder."""
    store = HalfListed()
    put_tree(store, 30)
    with thread_node(tmp_path, store) as node:
        job = load(node)
        assert (job.state, job.files_done, job.files_failed) == (JobState.FAILED, 20, 1)
        assert job.failures == [("/data/01", "no such shard")]


def test_a_file_replaced_during_the_load_comes_in_its_new_version(tmp_path: Path, store: VersionedStore) -> None:
    """What is in the cache in the end is what the store holds then."""
    files = put_tree(store, 10)
    with thread_node(tmp_path, store) as node:
        path = "/data/00/009"

        async def replace_after_listing() -> Job:
            job = node.node.jobs.submit(LoadSpec("/data"))
            while job.state is JobState.CREATED:
                await node.node.jobs.wait(job.job_id, 1)
            files[path] = b"another, of another length"
            store.put("00/009", files[path])
            return job

        job = node.run(_wait_over(node, node.run(replace_after_listing()).job_id))
        assert job.state is JobState.SUCCEEDED
        client = node.client()
        assert {name: client.read_file(name) for name in files} == files


def test_a_file_that_was_deleted_during_the_load_is_a_failure(tmp_path: Path, store: VersionedStore) -> None:
    """The file is named; the others are there."""
    put_tree(store, 10)
    faults = FaultStore(store)
    with thread_node(tmp_path, faults) as node:

        async def delete() -> None:
            store.delete("00/004")

        store_keys = sorted(store.objects)
        assert store_keys[4] == "00/004"
        faults.inject(Swap(delete), on="read", at=1)
        job = load(node)
        assert (job.state, job.files_done, job.files_failed) == (JobState.FAILED, 9, 1)
        assert job.failures[0][0] == "/data/00/004"


# -- a full disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_fails_the_job_and_not_the_daemon(tmp_path: Path, store: VersionedStore) -> None:
    """Nothing that the disk refused counts as loaded; reads go on without the cache."""
    files = put_tree(store, 20)
    with thread_node(tmp_path, store) as node:
        node.node.blocks._files._disk = FullDisk(after=6)
        job = load(node)
        assert job.state is JobState.FAILED
        assert job.files_done < 20
        path, data = list(files.items())[-1]
        assert node.client().read_file(path) == data


class FullDisk(LocalDisk):
    """Says that it is full after so many files."""

    def __init__(self, after: int) -> None:
        self.left = after

    def create(self, path: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return super().create(path)


# -- verifying -----------------------------------------------------------------------------------------------------


def test_verify_finds_damage_and_mends_it(tmp_path: Path, store: VersionedStore) -> None:
    """A flipped bit in a small and in a large object is found and the bytes are fetched again."""
    files = put_tree(store, 10) | {"/data/large": data_of("large", 2 * EXTENT)}
    store.put("large", files["/data/large"])
    with thread_node(tmp_path, store) as node:
        load(node)
        store.reads.clear()
        small, extent = ([path for path in held_files(tmp_path) if path.suffix == suffix] for suffix in ("", ".ext"))
        for path in (*small[:2], extent[0]):
            flip(path)
        job = load(node, verify=True)
        assert (job.state, job.blocks_damaged) == (JobState.SUCCEEDED, 3)
        assert store.reads
        client = node.client()
        assert {path: client.read_file(path) for path in files} == files


def held_files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "cache" / "extents").rglob("*") if path.is_file())


def flip(path: Path) -> None:
    """Turn over the bits of one byte, in place."""
    data = bytearray(path.read_bytes())
    data[7] ^= 0xFF
    with path.open("r+b") as file:
        file.write(data)


def test_verify_of_sound_files_fetches_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """Checksums that match cost no request."""
    put_tree(store, 10)
    with thread_node(tmp_path, store) as node:
        load(node)
        reads = len(store.reads)
        job = load(node, verify=True)
        assert (job.state, job.blocks_damaged, len(store.reads)) == (JobState.SUCCEEDED, 0, reads)


# -- stopping, and going on ----------------------------------------------------------------------------------------


async def _stop(node: ThreadNode, job_id: str) -> Job:
    return await node.node.jobs.stop(job_id)


def test_a_job_that_is_stopped_stays_so_and_another_goes_on_from_there(tmp_path: Path, store: VersionedStore) -> None:
    """Stopping ends a load that waits for the store; what had come is not fetched again by the next."""
    put_tree(store, 30)
    faults = FaultStore(store)
    with thread_node(tmp_path, faults) as node:
        stall = faults.inject(Stall(), on="read", at=21, times=None)
        job = submit(node)
        node.run(stall.wait_fired())
        assert node.run(_stop(node, job.job_id)).state is JobState.STOPPED
        node.loop.call_soon_threadsafe(stall.release)
        assert load(node).state is JobState.SUCCEEDED
        assert len(store.reads) == 30


def test_what_leaves_while_a_load_goes_on_is_brought_again(tmp_path: Path, store: VersionedStore) -> None:
    """Somebody frees files that a load had brought already: its end finds that out, and it ends with all of them."""
    put_tree(store, 30)
    faults = FaultStore(store)
    with thread_node(tmp_path, faults) as node:
        stall = faults.inject(Stall(), on="read", at=21, times=None)
        job = submit(node)
        node.run(stall.wait_fired())
        assert node.node.blocks.space.free(lambda origin: True).freed_bytes
        node.loop.call_soon_threadsafe(stall.release)
        assert node.run(_wait_over(node, job.job_id)).state is JobState.SUCCEEDED
        assert node.node.blocks.statistics().extents_count == 30
    assert len(store.reads) > 30


def test_a_job_goes_on_after_the_daemon_was_stopped(tmp_path: Path, store: VersionedStore) -> None:
    """The next daemon ends the job by itself, under its number, and fetches nothing that was there."""
    put_tree(store, 30)
    faults = FaultStore(store)
    with thread_node(tmp_path, faults) as node:
        stall = faults.inject(Stall(), on="read", at=21, times=None)
        job = submit(node)
        node.run(stall.wait_fired())
    held = len(store.reads)
    assert held == 20
    with thread_node(tmp_path, store) as node:
        again = node.run(_wait_over(node, job.job_id))
        assert (again.job_id, again.state, again.files_done) == (job.job_id, JobState.SUCCEEDED, 30)
    assert len(store.reads) == 30
    assert len(set(store.reads)) == 30


def test_a_load_of_a_path_that_is_being_loaded_is_that_job(tmp_path: Path, store: VersionedStore) -> None:
    """Two who start the same load share one; one that is to be verified too is a load of its own, and shares every
    fetch."""
    put_tree(store, 10)
    faults = FaultStore(store)
    with thread_node(tmp_path, faults) as node:
        stall = faults.inject(Stall(), on="read")
        first = submit(node)
        node.run(stall.wait_fired())
        assert submit(node).job_id == first.job_id
        verified = submit(node, verify=True)
        assert verified.job_id != first.job_id
        node.loop.call_soon_threadsafe(stall.release)
        for job in (first, verified):
            assert node.run(_wait_over(node, job.job_id)).state is JobState.SUCCEEDED
        assert len(store.reads) == 10
        assert submit(node).job_id != first.job_id


def test_a_job_that_there_is_not_is_named(tmp_path: Path, store: VersionedStore) -> None:
    """Asking for an unknown number is an error that says how to see the known ones."""
    with thread_node(tmp_path, store) as node, pytest.raises(NotFoundError, match="job ls"):
        node.node.jobs.get("77")


# -- bounds --------------------------------------------------------------------------------------------------------


def load_that_stalls(node: ThreadNode, faults: FaultStore, path: str) -> tuple[Job, Fault]:
    """Start a load whose requests are not answered, and wait until it has as many as it may have (31 of 32)."""
    stall = faults.inject(Stall(), on="read", times=31)
    job = submit(node, path)
    while faults.requests["read"] < 31 or job.state is not JobState.RUNNING:
        node.run(asyncio.sleep(0))
    return job, stall


def test_a_demand_overtakes_a_load(tmp_path: Path, store: VersionedStore) -> None:
    """With a load stalled in every turn that it may have, and more of it waiting, a reader's miss is the next request
    that reaches the store, and is answered."""
    for index in range(200):
        store.put(f"set/{index:03d}", b"x")
    store.put("wanted", b"now")
    faults = FaultStore(store)
    with thread_node(tmp_path, wrapped(faults, FetchConfig(requests_max=32), clock=SystemClock())) as node:
        job, stall = load_that_stalls(node, faults, "/data/set")
        assert node.client().read_file("/data/wanted") == b"now"
        assert [key for key, _, _ in store.reads] == ["wanted"]
        assert faults.requests["read"] == 32
        node.loop.call_soon_threadsafe(stall.release)
        assert node.run(_wait_over(node, job.job_id)).state is JobState.SUCCEEDED


def test_a_file_that_waits_in_a_load_is_fetched_when_a_reader_wants_it(tmp_path: Path, store: VersionedStore) -> None:
    """A miss of a file that the load has queued already does not wait for the load's turns."""
    for index in range(200):
        store.put(f"{index:03d}", b"x")
    faults = FaultStore(store)
    with thread_node(tmp_path, wrapped(faults, FetchConfig(requests_max=32), clock=SystemClock())) as node:
        job, stall = load_that_stalls(node, faults, "/data")
        assert node.client().read_file("/data/060") == b"x"
        assert [key for key, _, _ in store.reads] == ["060"]
        node.loop.call_soon_threadsafe(stall.release)
        assert node.run(_wait_over(node, job.job_id)).state is JobState.SUCCEEDED
        assert len(store.reads) == 200


def test_a_load_holds_a_window_of_files_and_not_all(tmp_path: Path, store: VersionedStore) -> None:
    """Of 5,000 files no more are in the loader at one time than a page and two windows; no more pieces are in flight
    than the store may be asked for."""
    for index in range(5000):
        store.put(f"{index:05d}", b"x")
    with thread_node(tmp_path, store, fetch=FetchConfig(requests_max=8)) as node:
        peaks = []

        async def watch() -> None:
            job = node.node.jobs.submit(LoadSpec("/data"))
            while not job.state.is_over:
                await asyncio.sleep(0)
                # Not isinstance, which asks whatever lazy module lies around in the process for its class.
                peaks.append(sum(type(one) is TreeFile for one in gc.get_objects()))
                for _ in range(200):
                    await asyncio.sleep(0)

        gc.collect()
        gc.freeze()  # what is there already is not counted: with torch in the process a million objects
        try:
            node.run(watch())
        finally:
            gc.unfreeze()
        assert 0 < max(peaks) <= 2 * PAGE_FILES + 16
    assert len(store.reads) == 5000


def test_what_is_here_waits_for_no_bandwidth(tmp_path: Path, store: VersionedStore) -> None:
    """A load that goes on, is begun again or verified takes its turns for what it fetches alone: at a byte a second
    everything else is passed over at once, in a large object too."""
    put_tree(store, 20)
    store.put("large", data_of("large", 3 * EXTENT))
    with thread_node(tmp_path, store) as node:
        load(node)
        reads = len(store.reads)
        assert load(node, verify=True, bandwidth_bytes_per_s=1).state is JobState.SUCCEEDED
        assert len(store.reads) == reads


def test_bandwidth_is_bounded(tmp_path: Path, store: VersionedStore) -> None:
    """A load of 40 blocks at 10 blocks a second waits for its turns: what is asked for at once is a tenth of a second's
    worth."""
    clock = ManualClock()
    pace = Pace(10 * BLOCK, clock)
    waits = [pace.wait_s(BLOCK) for _ in range(40)]
    assert waits == [pytest.approx(index / 10) for index in range(40)]
    clock.advance(10)
    assert [pace.wait_s(BLOCK), pace.wait_s(BLOCK)] == [0.0, 0.0], "no more than a tenth of a second is saved up"
    assert pace.wait_s(BLOCK) == pytest.approx(0.1)
