"""Loads and the space there is: whether they fit is said first, quotas, pins and what a policy would rather keep."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.blocks.rules import SpaceRules, StoreRule
from orchestra.daemon.jobs.job import Fit, JobState, within_quotas
from orchestra.values import ByteRange
from tests.support.cache import BLOCK
from tests.support.node import ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore
from tests.unit.test_load_jobs import load, put_tree


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


def test_what_does_not_fit_is_said_before_anything_is_fetched(tmp_path: Path, store: VersionedStore) -> None:
    """The job fails with one line of numbers, and the store was only listed."""
    put_tree(store, 40)
    with thread_node(tmp_path, store, cache={"size_bytes": 10 * BLOCK}) as node:
        job = load(node)
        assert (job.state, job.reason) == (JobState.FAILED, "space")
        assert job.message == "needs 160.0 KiB, 40.0 KiB free: would hold 25 %"
        assert not store.reads


def test_what_is_pinned_is_no_room(tmp_path: Path, store: VersionedStore) -> None:
    """Pinned files of others stay, so a load counts their space as taken."""
    put_tree(store, 20)
    with thread_node(tmp_path, store, cache={"size_bytes": 12 * BLOCK}) as node:
        load(node, "/data/00")
        node.run(node.node.space.pin("/data/00"))
        job = load(node, "/data/01")
        assert (job.state, job.message) == (JobState.FAILED, "needs 40.0 KiB, 8.0 KiB free: would hold 20 %")
        assert load(node, "/data/01", partial=True).files_done == 2


def test_a_partial_load_holds_what_fits_and_fetches_no_more(tmp_path: Path, store: VersionedStore) -> None:
    """As many files as there is room for are fetched, once each, and all of them are there in the end."""
    put_tree(store, 40)
    with thread_node(tmp_path, store, cache={"size_bytes": 10 * BLOCK}) as node:
        job = load(node, partial=True)
        assert (job.state, job.files_done) == (JobState.SUCCEEDED, 10)
        assert "10 of 40" in job.message
        assert len(store.reads) == 10
        assert node.node.blocks.statistics().evicted_count == 0
        assert load(node, partial=True).files_done == 10
        assert len(store.reads) == 10


def test_a_load_makes_room_by_evicting_what_was_there_before(tmp_path: Path, store: VersionedStore) -> None:
    """What fits the cache fits, whatever else is in it; a part of it that was there already does not leave."""
    put_tree(store, 20)
    with thread_node(tmp_path, store, cache={"size_bytes": 12 * BLOCK, "eviction": "lru"}) as node:
        load(node, "/data/00")
        load(node, "/data/01/015")
        assert load(node, "/data/01").state is JobState.SUCCEEDED
        assert len(store.reads) == 20


def test_a_load_is_kept_though_the_policy_keeps_what_it_has(tmp_path: Path, store: VersionedStore) -> None:
    """Under `auto` a full cache admits nothing while a data set is read epoch by epoch; what somebody asks for is there
    in the end all the same, whole and fetched once."""
    put_tree(store, 60)
    with thread_node(tmp_path, store, cache={"size_bytes": 20 * BLOCK, "eviction": "auto"}) as node:
        engine, blocks, chance = node.node.engine, node.node.blocks, random.Random(1)
        for folder in ("/data/00", "/data/01"):
            load(node, folder)
        scanned = [f"/data/{index // 10:02d}/{index:03d}" for index in range(40)]
        digests = [_digest(node, path) for path in scanned]
        for _ in range(4):
            for digest in chance.sample(digests, len(digests)):
                blocks.touch(digest, 0)
        newcomer = "/data/04/040"
        entry = node.client().stat(newcomer)
        assert not node.run(engine.ensure(engine.want(newcomer, entry.version, BLOCK, ByteRange(0, BLOCK))))
        before = len(store.reads)
        for _ in range(2):
            job = load(node, "/data/05")
            assert (job.state, job.files_done) == (JobState.SUCCEEDED, 10)
        assert len(store.reads) == before + 10


def _digest(node: ThreadNode, path: str) -> str:
    entry = node.client().stat(path)
    wanted = node.node.engine.want(path, entry.version, entry.size_bytes, ByteRange(0, entry.size_bytes))
    return wanted.object_id.digest()


def test_a_quota_is_asked_before_anything_is_fetched(tmp_path: Path, store: VersionedStore) -> None:
    """A load of more than its mount may hold fails at once and says why; a partial one holds as much as that."""
    put_tree(store, 20)
    with thread_node(tmp_path, store, cache={"size_bytes": 100 * BLOCK}) as node:
        rules = SpaceRules(stores={store.store_id: StoreRule(quota_bytes=5 * BLOCK)})
        node.node.blocks.space.set_rules(rules)
        job = load(node)
        assert (job.state, job.reason) == (JobState.FAILED, "space")
        assert job.message == "needs 80.0 KiB, 20.0 KiB free within its mount's quota: would hold 25 %"
        assert not store.reads
        assert load(node, partial=True).files_done == 5


def test_quotas_take_from_what_is_free_only_where_they_are_short() -> None:
    """A part that its quota holds changes nothing; one that is short lowers what fits by what it lacks."""
    whole = Fit(100, 1000, 0)
    assert within_quotas(whole, [Fit(40, 50, 0)]) == whole
    assert within_quotas(whole, [Fit(40, 10, 0), Fit(60, 60, 0)]) == Fit(100, 70, 0, is_by_quota=True)
    assert within_quotas(Fit(100, 20, 0), [Fit(40, 10, 0)]) == Fit(100, 20, 0)
