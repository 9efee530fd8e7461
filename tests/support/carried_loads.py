"""Nodes whose loads go through a courier, over a real S3 store in a process, and what tests do with them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from common import OriginProcess, running_origin
from synthetic import dataset_keys, expected_bytes

from orchestra.config import FetchConfig
from orchestra.daemon.jobs import load
from orchestra.daemon.jobs.job import Job, LoadSpec
from orchestra.engine.courier import Courier
from orchestra.stores.contract import StoreSettings, UnderStore
from orchestra.stores.counting import StoreStatistics, statistics_of
from orchestra.stores.registry import open_store
from orchestra.units import MIB
from tests.support.node import PATIENCE_S, ThreadNode, thread_node

COUNT, SIZE = 150, 3000
# Blocks as long as a part, as they are by default: parts of several blocks are not carried.
BLOCK, EXTENT = 4 * MIB, 8 * MIB
LARGE_COUNT, LARGE_SIZE = 2, 9_000_000
BLOCKS = COUNT + LARGE_COUNT * 3
SECRET = "not-to-be-seen"
FETCH = FetchConfig(requests_max=16, attempt_timeout_s=30.0)


@contextmanager
def carried_origin() -> Iterator[OriginProcess]:
    """Small objects in folders of a hundred, and large ones."""
    datasets = {"small": (COUNT, SIZE), "large": (LARGE_COUNT, LARGE_SIZE)}
    words = [f"{name}:{count}x{size}" for name, (count, size) in datasets.items()]
    with running_origin(*(word for dataset in words for word in ("--dataset", dataset))) as running:
        yield running


def have_couriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load, however small, has one on a machine with however many cores and however busy."""
    monkeypatch.setattr(load, "_CARRIED_BYTES_MIN", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@contextmanager
def carrying_node(
    origin: OriginProcess, folder: Path, fetch: FetchConfig = FETCH, **settings: Any
) -> Iterator[ThreadNode]:
    """A node below `folder` over the origin's bucket at /data; `settings` are thread_node's."""
    origin.set(latency_ms=0)
    origin.call("/__reset")
    store = _opened(origin, fetch)
    with thread_node(folder, store, block_size_bytes=BLOCK, extent_size_bytes=EXTENT, **settings) as running:
        yield running


def _opened(origin: OriginProcess, fetch: FetchConfig) -> UnderStore:
    """The origin's bucket, as a mount opens it."""
    options = {"endpoint_url": origin.url, "key": "k", "secret": SECRET, "region": "us-east-1"}
    return open_store(StoreSettings("s3://bench", options), fetch)


def courier_of(node: ThreadNode) -> Courier:
    """The node's courier."""
    carried = node.node.engine.carried
    assert carried is not None, "a machine of two cores has one"
    return carried.courier


def counts_of(node: ThreadNode) -> StoreStatistics:
    """What was asked of the origin's bucket, as the node counts it."""
    location = node.node.engine.mounts.locate("/data/small")
    assert location is not None
    return statistics_of(location.mount.store)


async def wait_ready(courier: Courier) -> int:
    """Return the process's id when it takes errands."""
    async with asyncio.timeout(PATIENCE_S):
        await courier.wait_ready()
    assert courier.pid is not None
    return courier.pid


async def wait_asked(origin: OriginProcess, count: int) -> None:
    """Return when the origin was asked for so many objects."""
    while (await asyncio.to_thread(gets, origin)) < count:
        pass


def gets(origin: OriginProcess) -> int:
    """How many objects, or parts of them, were asked for since the last reset."""
    return int(origin.call("/__stats", "GET")["requests"].get("GET", 0))


async def do_load(node: ThreadNode, path: str, **options: Any) -> Job:
    """Load, and return how it ended. `options` are LoadSpec's."""
    jobs = node.node.jobs
    job = jobs.submit(LoadSpec(path, **options))
    async with asyncio.timeout(PATIENCE_S):
        while not (job := await jobs.wait(job.job_id, 1)).state.is_over:
            pass
    return job


async def do_carried_load(node: ThreadNode, path: str, **options: Any) -> Job:
    """Load with a courier that is up from the beginning."""
    with courier_of(node).held():
        await wait_ready(courier_of(node))
        return await do_load(node, path, **options)


async def do_disturbed_load(
    node: ThreadNode,
    origin: OriginProcess,
    path: str,
    disturb: Callable[[], Awaitable[object]],
    *,
    asked: int,
    latency_ms: int,
) -> Job:
    """Load with a courier from a store that is slow until so many objects were asked for, then `disturb` was done."""
    courier = courier_of(node)
    with courier.held():
        await wait_ready(courier)
        origin.set(latency_ms=latency_ms)
        loading = asyncio.create_task(do_load(node, path))
        await wait_asked(origin, asked)
        await disturb()
        await asyncio.to_thread(origin.set, latency_ms=0)
        return await loading


def tmp_of(node: ThreadNode) -> list[str]:
    """What lies in the folder of unfinished files."""
    return os.listdir(node.node.layout.tmp)


def check_all(node: ThreadNode) -> None:
    """Every byte that the node's readers see is the origin's."""
    client = node.client()
    for name, count, size in (("small", COUNT, SIZE), ("large", LARGE_COUNT, LARGE_SIZE)):
        for key in dataset_keys(name, count):
            assert client.read_file(f"/data/{key}") == expected_bytes(key, 0, size)
