"""A node's part of a load that all nodes do together: whose orders it takes, and what of jobs goes to another node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestra.daemon.jobs.job import Job, LoadSpec, job_from_json
from orchestra.daemon.jobs.parts import PartRunner
from orchestra.errors import NotFoundError, UsageError
from tests.support.cache import data_of
from tests.support.node import ThreadNode, thread_node
from tests.support.versioned_store import VersionedStore

JOB = "1-abcdef"


async def _made(node: ThreadNode, folder: Path) -> PartRunner:
    return PartRunner(node.node.jobs.tools, folder, "a", lambda mount: 1)


def start(term: int) -> dict[str, Any]:
    return {"job": JOB, "term": term, "spec": {"path": "/data"}, "ring": [["a", 1]]}


def test_a_leader_that_lost_its_job_gives_no_orders(tmp_path: Path) -> None:
    """Once a part was started by the job's new leader, the one before is refused, whatever it asks for; the next one is
    obeyed."""
    store = VersionedStore()
    store.put("file", data_of("file", 5000))
    with thread_node(tmp_path, store) as node:
        parts = node.run(_made(node, tmp_path / "parts"))
        try:
            assert node.run(parts.answer("start", start(1))) == {}
            with pytest.raises(UsageError, match="is led by another node now"):
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
        finally:
            node.run(parts.close())


async def _adopt(node: ThreadNode, job: Job) -> None:
    node.node.jobs.adopt(job)


async def _over(node: ThreadNode, job_id: str) -> Job:
    while not (job := await node.node.jobs.wait(job_id, 1)).state.is_over:
        pass
    return job


def test_a_job_of_another_node_goes_on_under_its_id_and_is_given_up_without_a_trace(tmp_path: Path) -> None:
    """It is kept on disk as own jobs are, with its term; given up, it is gone there, and what it loaded stays."""
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
