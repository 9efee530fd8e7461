"""Load jobs of a whole node: what is fetched, what is told, how they end, and how they go on after a restart.

The node runs in a thread over a store in memory that counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.daemon.jobs.job import Job, JobState, LoadSpec
from orchestra.errors import NotFoundError, StoreError
from orchestra.testing.fault_store import Fail, FaultStore, Stall
from tests.support.cache import BLOCK, EXTENT, data_of
from tests.support.node import PATIENCE_S, ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def store() -> VersionedStore:
    return VersionedStore()


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
