"""The jobs of all nodes, seen from any of them; where there is an etcd, also those whose node does not answer.

Owns: finding the node that leads a job, passing questions on, what of a job is written to etcd. Leaves to others: jobs
(jobs.runner), following etcd (etcd_table).

A job is changed by the node that leads it alone: nobody else writes its row below /orchestra/v1/jobs/.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import xxhash

from orchestra.cluster.etcd_gateway import EtcdUnreachableError
from orchestra.cluster.etcd_table import EtcdTable
from orchestra.cluster.records import NodeRecord
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.jobs.job import JobState
from orchestra.daemon.jobs.runner import JobRunner
from orchestra.daemon.nodes.calls import ASK_TIMEOUT_S, NodeCalls
from orchestra.errors import DaemonUnavailableError, NotFoundError, OrchestraError

ROUTE = "/v1/node/jobs"
PREFIX = b"/orchestra/v1/jobs/"
# How often the progress of a job that runs is written to etcd: each write is a sync of its disks.
_WRITE_EVERY_S = 1.0
# Failures that etcd holds of a job: a row stays some kilobytes. The node that leads the job has all.
_FAILURES_WRITTEN_MAX = 20
# Two of a hundred nodes share six letters once in 3,000 clusters, and then both are asked.
SUFFIX_LETTERS = 6
log = logging.getLogger(__name__)


def suffix_of(node_id: str) -> str:
    """Return what the ids of jobs end with that this node leads."""
    return f"-{xxhash.xxh64_hexdigest(node_id.encode())[:SUFFIX_LETTERS]}"


class SharedJobs:
    """One event loop."""

    def __init__(self, cluster: ClusterNode, calls: NodeCalls, jobs: JobRunner) -> None:
        self._cluster = cluster
        self._calls = calls
        self._jobs = jobs
        endpoints: Sequence[str] = cluster.config.endpoints
        self._table = EtcdTable(endpoints, PREFIX, lambda rows: None) if endpoints else None
        self._written: dict[str, bytes] = {}

    async def run(self) -> None:
        """Write this node's jobs to etcd and follow those of others, until cancelled; returns where there is none."""
        if self._table is None:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._table.run())
            tasks.create_task(self._write_own(self._table))

    async def close(self) -> None:
        """Close connections."""
        if self._table is not None:
            await self._table.close()

    async def all(self) -> list[dict[str, Any]]:
        """Return the jobs of all nodes, oldest first; of a node that does not answer what etcd has of them."""
        found = {job["id"]: job for job in self._in_etcd()}
        found |= {job["id"]: job for _, job in await self._of_others()}
        found |= {job.job_id: job.to_json() for job in self._jobs.all()}
        return sorted(found.values(), key=lambda job: (job["created_s"], job["id"]))

    async def get(self, job_id: str, wait_s: float) -> dict[str, Any]:
        """Return a job, when its state has changed or after `wait_s`. Raises NotFoundError, DaemonUnavailableError
        where its node does not answer and there is no etcd."""
        try:
            return await self._ask(job_id, "GET", f"?wait_s={wait_s}", wait_s)
        except DaemonUnavailableError:
            for job in self._in_etcd():
                if job["id"] == job_id:
                    await asyncio.sleep(wait_s)
                    return job
            raise

    async def running(self, path: str) -> dict[str, Any] | None:
        """Return the load of `path` that another node leads just now, None where there is none."""
        for _, job in await self._of_others():
            if job["path"] == path and not (job["is_listed"] or job["retry_of"] or JobState(job["state"]).is_over):
                return job
        return None

    async def retry(self, spec: dict[str, Any], *, newer_than_s: float) -> dict[str, Any] | None:
        """Have the node that led the newest load of the path load what failed in it; return the job, None where no
        other node led one that is newer. Raises what that node answers."""
        led = [
            (job["created_s"], node.node_id, node)
            for node, job in await self._of_others()
            if job["path"] == spec["path"] and job["created_s"] > newer_than_s
        ]
        return await self._calls.ask(max(led)[2], "POST", ROUTE, spec) if led else None

    async def _of_others(self) -> list[tuple[NodeRecord, dict[str, Any]]]:
        """The jobs of the other nodes that answer, as those tell them."""
        nodes = self._others()
        answers = await self._calls.ask_all(nodes, lambda node: self._calls.ask(node, "GET", ROUTE))
        found = []
        for node, answer in zip(nodes, answers, strict=True):
            jobs = [] if isinstance(answer, OrchestraError) else answer.get("jobs")
            found += [(node, job) for job in jobs] if isinstance(jobs, list) else []
        return found

    async def stop(self, job_id: str) -> dict[str, Any]:
        """Stop a job, whoever leads it. Raises UsageError if it is over, and as `get` does."""
        return await self._ask(job_id, "POST", "/stop", 10.0)

    async def _ask(self, job_id: str, method: str, rest: str, wait_s: float) -> dict[str, Any]:
        leaders = [node for node in self._others() if job_id.endswith(suffix_of(node.node_id))]
        missing: OrchestraError = NotFoundError(f"there is no job {job_id!r} (see: orchestra job ls)")
        if not leaders and any(job["id"] == job_id for job in self._in_etcd()):
            missing = DaemonUnavailableError(f"the node that leads job {job_id} is not in the cluster now")
        for node in leaders:
            route = f"{ROUTE}/{quote(job_id, safe='')}{rest}"
            try:
                return await self._calls.ask(node, method, route, timeout_s=ASK_TIMEOUT_S + wait_s)
            except (NotFoundError, DaemonUnavailableError) as error:
                missing = error
        raise missing

    def _others(self) -> list[NodeRecord]:
        return [node for node in self._cluster.members if node.node_id != self._cluster.node_id]

    def _in_etcd(self) -> list[dict[str, Any]]:
        found = []
        for name, row in self._table.rows.items() if self._table is not None else ():
            try:
                job = json.loads(row.value)
                JobState(job["state"]), float(job["created_s"])
                if job["id"].encode() != name:
                    raise ValueError("it is of another job")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("etcd's key %r is left out: %s", PREFIX + name, error)
                continue
            found.append(job)
        return found

    async def _write_own(self, table: EtcdTable) -> None:
        while True:
            try:
                await self._write_changed(table)
            except EtcdUnreachableError as error:
                log.debug("jobs are written to etcd when it is back: %s", error)
            await asyncio.sleep(_WRITE_EVERY_S)

    async def _write_changed(self, table: EtcdTable) -> None:
        own = {job.job_id: job for job in self._jobs.all()}
        for job_id, job in own.items():
            shown = {**job.to_json(), "leader": self._cluster.node_id}
            shown["failures"] = shown["failures"][:_FAILURES_WRITTEN_MAX]
            value = json.dumps(shown).encode()
            if self._written.get(job_id) != value and await table.put(job_id.encode(), value):
                self._written[job_id] = value
        for shown in self._in_etcd():
            if shown.get("leader") == self._cluster.node_id and shown["id"] not in own:
                await table.delete(shown["id"].encode())
                self._written.pop(shown["id"], None)
