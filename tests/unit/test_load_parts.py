"""A node's part of a load that all nodes do together: whose orders it takes, and what of jobs goes to another node."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestra.cluster.records import NodeRecord
from orchestra.cluster.ring import RingNode, ring_of
from orchestra.daemon.jobs.job import Job, JobState, LoadSpec, job_from_json
from orchestra.daemon.jobs.journal import Journal
from orchestra.daemon.jobs.parts import PartRunner
from orchestra.daemon.nodes.loads import LeadLoads
from orchestra.errors import LedElsewhereError, NotFoundError, UsageError
from tests.support.cache import data_of
from tests.support.node import ThreadNode, thread_node
from tests.support.versioned_store import VersionedStore

JOB = "1-abcdef"


async def _made(node: ThreadNode, folder: Path) -> PartRunner:
    return PartRunner(node.node.jobs.tools, folder, "a", lambda mount: 1)


@contextmanager
def node_with_parts(folder: Path) -> Iterator[tuple[ThreadNode, PartRunner]]:
    """A node of one file, and what runs its parts of the cluster's loads."""
    store = VersionedStore()
    store.put("file", data_of("file", 5000))
    with thread_node(folder, store) as node:
        parts = node.run(_made(node, folder / "parts"))
        try:
            yield node, parts
        finally:
            node.run(parts.close())


def start(term: int) -> dict[str, Any]:
    return {"job": JOB, "term": term, "spec": {"path": "/data"}, "ring": [["a", 1]]}


def test_a_leader_that_lost_its_job_gives_no_orders(tmp_path: Path) -> None:
    """Once a part was started by the job's new leader, the one before is refused, whatever it asks for; the next one is
    obeyed."""
    with node_with_parts(tmp_path) as (node, parts):
        assert node.run(parts.answer("start", start(1))) == {}
        with pytest.raises(LedElsewhereError, match="is led by another node now"):
            node.run(parts.answer("start", start(0)))
        for action in ("status", "release", "stop", "failures"):
            with pytest.raises(NotFoundError, match="knows of no part"):
                node.run(parts.answer(action, {"job": JOB, "term": 0, "offset": 0}))
        assert node.run(parts.answer("status", {"job": JOB, "term": 1}))["state"] in ("CREATED", "RUNNING")
        assert node.run(parts.answer("start", start(2))) == {}
        with pytest.raises(NotFoundError):
            node.run(parts.answer("stop", {"job": JOB, "term": 1}))
        with pytest.raises(UsageError, match="term: expected a number"):
            node.run(parts.answer("stop", {"job": JOB, "term": "2"}))


async def _start_both(parts: PartRunner, first: int, second: int) -> tuple[list[Any], int]:
    """Start a part in two terms at once; return both answers, and how many parts run."""
    answers = await asyncio.gather(
        *(parts.answer("start", start(term)) for term in (first, second)), return_exceptions=True
    )
    return answers, sum(task.get_name() == f"part of job {JOB}" for task in asyncio.all_tasks())


def test_of_two_leaders_that_ask_at_once_the_later_one_is_obeyed(tmp_path: Path) -> None:
    """The old leader asks while the part that it had here is being stopped for the new one: it is refused, and one
    part runs, which the new one can stop."""
    with node_with_parts(tmp_path) as (node, parts):
        assert node.run(parts.answer("start", start(0))) == {}
        (new, old), running = node.run(_start_both(parts, 2, 1))
        assert new == {}
        assert isinstance(old, LedElsewhereError)
        assert running == 1
        assert node.run(parts.answer("stop", {"job": JOB, "term": 2})) == {}
        assert not parts.is_busy


async def _lead(node: ThreadNode, parts: PartRunner, job: Job) -> Job:
    """Lead a load of all nodes, of which this is the only one, to its end here."""
    cluster: Any = SimpleNamespace(
        node_id="a", members=[NodeRecord("a", "127.0.0.1:1", 1)], ring=ring_of(0, [RingNode("a", 1)])
    )
    calls: Any = None
    await LeadLoads(cluster, calls, parts, node.node.jobs.tools).run(job, lambda changed: None).run()
    return job


def test_a_leader_that_lost_its_job_does_not_end_it(tmp_path: Path) -> None:
    """It is refused by a node that the new leader has asked, and the job stays as it was until this node forgets it;
    without a new leader it succeeds."""
    with node_with_parts(tmp_path) as (node, parts):
        assert node.run(parts.answer("start", start(1))) == {}
        job = node.run(_lead(node, parts, Job(JOB, LoadSpec("/data"), 1.0)))
        assert (job.state, job.message) == (JobState.CREATED, "")
        assert node.run(parts.answer("status", {"job": JOB, "term": 1}))["state"] in ("CREATED", "RUNNING")
        assert node.run(_lead(node, parts, Job(JOB, LoadSpec("/data"), 1.0, term=1))).state is JobState.SUCCEEDED


async def _submit(node: ThreadNode) -> Job:
    return node.node.jobs.submit(LoadSpec("/data"))


async def _adopt(node: ThreadNode, job: Job) -> None:
    node.node.jobs.adopt(job)


async def _over(node: ThreadNode, job_id: str) -> Job:
    while not (job := await node.node.jobs.wait(job_id, 1)).state.is_over:
        pass
    return job


def test_a_job_of_another_node_goes_on_under_its_id_and_is_given_up_without_a_trace(tmp_path: Path) -> None:
    """It is kept on disk as own jobs are, with its term; given up, it is gone there, and what it loaded stays. Its
    number is not used again, nor one that is in use elsewhere."""
    store = VersionedStore()
    store.put("file", data_of("file", 5000))
    told = {**Job(JOB, LoadSpec("/data"), 1.0, term=3).to_json(), "leader": "b"}
    with thread_node(tmp_path, store) as node:
        jobs = node.node.jobs
        node.run(_adopt(node, job_from_json(told)))
        assert node.run(_over(node, JOB)).message
        assert [(job.job_id, job.term) for job in jobs.tools.journal.load()] == [(JOB, 3)]
        node.run(jobs.give_up(JOB))
        assert not jobs.has(JOB)
        assert jobs.tools.journal.load() == []
        client = node.client()
        assert client.cached_bytes(client.stat("/data/file")) == 5000
        jobs.is_taken = lambda job_id: job_id == "2"
        assert node.run(_submit(node)).job_id == "3"


@pytest.mark.parametrize("job_id", ["../../x", "/etc/x", "1-abcdef/../../x", "x", ""])
def test_what_is_no_id_becomes_no_file(tmp_path: Path, job_id: str) -> None:
    """Nothing is written for it, wherever it came from."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    with pytest.raises(UsageError, match="not the id of a job"):
        Journal(folder).save(Job(job_id, LoadSpec("/data"), 1.0))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
