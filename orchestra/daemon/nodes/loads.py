"""Leads a load that all nodes of the cluster do together: each its own share by the ring, all as one job.

Owns: which nodes take part by which ring, the phases of the whole, its counts and its one list of failures, what a node
that goes away costs. Leaves to others: one node's part (jobs.parts), keeping jobs (jobs.runner, journal).

A part that was lost with its node is nobody's until the next round: all parts begin anew by the ring of then, and find
in the cache what is there already.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from orchestra.cluster.records import NodeRecord
from orchestra.cluster.ring import Ring
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.jobs.job import FAILURES_SHOWN_MAX, Fit, Job, JobState
from orchestra.daemon.jobs.journal import FAILURES_KEPT_MAX, FailureFile
from orchestra.daemon.jobs.load import LoadTools, job_pages
from orchestra.daemon.jobs.parts import FAILURES_PER_ANSWER, PartRunner
from orchestra.daemon.nodes.calls import NodeCalls
from orchestra.errors import DaemonUnavailableError, LedElsewhereError, OrchestraError
from orchestra.fetch.budget import Priority
from orchestra.prefetch.tree import Page
from orchestra.stores.limit import URGENCY
from orchestra.units import format_size

log = logging.getLogger(__name__)

ROUTE = "/v1/node/parts/"
_POLL_S = 0.25
# A node that does not answer for so long has lost its part. The membership lets go of a dead one within 10 s.
LOST_AFTER_S = 12.0
# Rounds with another ring each, or with a node that is lost; more means that the cluster does not come to rest.
ROUNDS_MAX = 8
# Paths of a list, or of a load to be retried, that are sent to each node: they travel as one message of at most 8 MiB.
_PATHS_BYTES_MAX = 6 * 1024 * 1024


@dataclass(slots=True)
class _PartState:
    """What the leader knows of one node's part; `told` is what it said last."""

    node: NodeRecord
    told: dict[str, Any]
    heard_ns: int
    error: OrchestraError | None = None

    @property
    def state(self) -> JobState:
        """How the part is; STOPPED where it is lost."""
        return JobState.STOPPED if self.error is not None else JobState(self.told["state"])

    def count(self, name: str) -> int:
        """One of its numbers."""
        return int(self.told.get(name, 0))


async def _always(job: Job) -> bool:
    return True


class LeadLoads:
    """Makes the runs of the loads that this node leads."""

    def __init__(self, cluster: ClusterNode, calls: NodeCalls, parts: PartRunner, tools: LoadTools) -> None:
        self.cluster = cluster
        self.calls = calls
        self.parts = parts
        self.tools = tools
        # Whether this node leads that job still: another one takes it over where this one was away (nodes.jobs).
        self.may_lead: Callable[[Job], Awaitable[bool]] = _always

    def run(self, job: Job, changed: Callable[[Job], None]) -> ClusterLoad:
        """Return what carries out `job`."""
        return ClusterLoad(self, job, changed)

    async def ask(self, node: NodeRecord, action: str, body: dict[str, Any]) -> dict[str, Any]:
        """Have `node` (which may be this one) do `action` on a part."""
        if node.node_id == self.cluster.node_id:
            return await self.parts.answer(action, body)
        return await self.calls.ask(node, "POST", ROUTE + action, body)


class ClusterLoad:
    """One load, led from here. Has what LoadRun has for the one who runs jobs."""

    def __init__(self, lead: LeadLoads, job: Job, changed: Callable[[Job], None]) -> None:
        self._lead = lead
        self._job = job
        self._changed = changed
        self._parts: list[_PartState] = []
        self._failed: dict[str, str] = {}

    async def run(self) -> None:
        """Do it all; the job is over afterwards, unless another node leads it now. Cancelling stops the parts and
        leaves the job as it is."""
        job, tools = self._job, self._lead.tools
        if not await self._lead.may_lead(job):
            return  # who leads the jobs here forgets it
        job.begin_again()
        URGENCY.set(Priority.LOAD)
        with tools.journal.failures(job.job_id) as failure_file:
            try:
                await self._look()
                await self._load()
                await self._gather(failure_file)
                self._conclude()
            except _DoesNotFitError as error:
                self._end(JobState.FAILED, str(error), "space")
            except LedElsewhereError as error:
                log.info("%s: it goes on there", error)  # and is forgotten here, as above
            except OrchestraError as error:
                self._end(JobState.FAILED, str(error), "error")
            finally:
                await self._stop_parts()

    def sample(self) -> None:
        """Bring the job's numbers up to date; called now and then while it runs."""
        job, parts = self._job, self._parts
        if parts and job.state is not JobState.CREATED:
            job.bytes_total = sum(part.count("bytes_total") for part in parts)
            job.bytes_done = sum(part.count("bytes_done") for part in parts)
            job.files_done = sum(part.count("files_done") for part in parts)
            job.blocks_damaged = sum(part.count("blocks_damaged") for part in parts)
            job.files_failed = max(len(self._failed), *(part.count("files_failed") for part in parts))
            if not self._failed:
                job.failures = _shown(failure for part in parts for failure in part.told.get("failures", ()))
        job.sample(self._lead.tools.clock.now_ns())

    # -- phases ----------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Count what there is, asking the stores; parts then go by what is known. Raises what looking raises."""
        job = self._job
        files_total = bytes_total = 0
        async with aclosing(self._pages()) as pages:
            async for page in pages:
                files_total += len(page.files) + (page.error is not None)
                bytes_total += sum(file.wanted.info.size_bytes for file in page.files)
                job.files_total, job.bytes_total = files_total, bytes_total

    def _pages(self) -> AsyncGenerator[Page, None]:
        return job_pages(self._job, self._lead.tools, refresh=True)

    async def _load(self) -> None:
        """Have all nodes load their shares until each did and no node came or went meanwhile. Raises OrchestraError,
        LedElsewhereError where a node is told so."""
        for _ in range(ROUNDS_MAX):
            ring = await self._wait_ring()
            if await self._round(ring) and self._lead.cluster.ring.nodes == ring.nodes:
                return
            log.info("job %s: the nodes changed while it ran: another round", self._job.job_id)
            await self._stop_parts()
        lost = next((part.error for part in self._parts if part.error is not None), None)
        raise lost or OrchestraError("the nodes of the cluster changed again and again while it ran; start it again")

    async def _wait_ring(self) -> Ring:
        """The ring of now; right after the start it takes a moment until there is one. Raises OrchestraError."""
        for _ in range(int(LOST_AFTER_S / _POLL_S)):
            if self._lead.cluster.ring.nodes:
                return self._lead.cluster.ring
            await asyncio.sleep(_POLL_S)
        raise OrchestraError("no node of the cluster owns anything now: all of them drain, or none is registered")

    async def _round(self, ring: Ring) -> bool:
        """Start a part on each node, have all begin when all fit, and follow them to their end; False if one was lost.

        Raises OrchestraError for what does not fit.
        """
        await self._start_parts(ring)
        if not await self._follow(lambda part: part.told.get("fit") is not None):
            return False
        self._check_fits()
        await self._each("release")
        self._enter(JobState.RUNNING)
        return await self._follow(lambda part: False)

    async def _start_parts(self, ring: Ring) -> None:
        members = {member.node_id: member for member in self._lead.cluster.members}
        now_ns = self._lead.tools.clock.now_ns()
        created = {"state": JobState.CREATED.value}
        self._parts = [
            _PartState(members[node.node_id], dict(created), now_ns) for node in ring.nodes if node.node_id in members
        ]
        job = self._job
        body: dict[str, Any] = {
            "spec": {**job.spec.to_json(), "bandwidth_bytes_per_s": self._bandwidth()},
            "ring": [[node.node_id, node.weight] for node in ring.nodes],
        }
        if job.spec.is_listed or job.spec.retry_of:
            body["paths"] = self._listed()
            body["spec"] |= {"is_listed": True, "retry_of": ""}
        await self._each("start", body)
        for part in self._parts:
            if isinstance(part.error, LedElsewhereError):
                raise part.error

    def _bandwidth(self) -> int:
        """Each part's share of the rate that was asked for."""
        rate = self._job.spec.bandwidth_bytes_per_s
        return max(1, rate // len(self._parts)) if rate else 0

    def _listed(self) -> list[str]:
        """The paths to send along. Raises OrchestraError if there are too many."""
        job, journal = self._job, self._lead.tools.journal
        retried = job.spec.retry_of
        listed = journal.failed_paths(retried) if retried else journal.listed_paths(job.job_id, job.spec.path)
        paths, size = [], 0
        for path in listed:
            paths.append(path)
            size += len(json.dumps(path)) + 2
            if size > _PATHS_BYTES_MAX:
                raise OrchestraError(
                    f"a list of over {format_size(_PATHS_BYTES_MAX)} of paths cannot be sent to all nodes: cut it"
                )
        return paths

    async def _follow(self, is_enough: Callable[[_PartState], bool]) -> bool:
        """Ask all parts how they are until each is over, or `is_enough` of it holds; False if one is lost."""
        while True:
            await asyncio.gather(*(self._look_at(part) for part in self._parts if not part.state.is_over))
            self.sample()
            if any(part.state is JobState.VERIFYING for part in self._parts):
                self._enter(JobState.VERIFYING)
            if all(part.state.is_over or is_enough(part) for part in self._parts):
                return all(part.state is not JobState.STOPPED for part in self._parts)
            await asyncio.sleep(_POLL_S)

    async def _look_at(self, part: _PartState) -> None:
        now_ns = self._lead.tools.clock.now_ns()
        try:
            part.told = await self._lead.ask(part.node, "status", self._of_job())
            JobState(part.told["state"])
            part.heard_ns = now_ns
        except DaemonUnavailableError as error:
            if now_ns - part.heard_ns > LOST_AFTER_S * 1e9 or not self._is_member(part.node):
                part.error = error
        except (KeyError, ValueError) as error:
            part.error = OrchestraError(f"node {part.node.node_id} says of its part what cannot be understood: {error}")
        except OrchestraError as error:  # it was started anew, and knows nothing of its part
            part.error = error

    def _of_job(self) -> dict[str, Any]:
        return {"job": self._job.job_id, "term": self._job.term}

    def _is_member(self, node: NodeRecord) -> bool:
        return any(member.node_id == node.node_id for member in self._lead.cluster.members)

    async def _each(self, action: str, body: dict[str, Any] | None = None) -> None:
        """Have every part that is not lost do that; one whose node does not answer is lost."""

        async def one(part: _PartState) -> None:
            try:
                await self._lead.ask(part.node, action, {**(body or {}), **self._of_job()})
            except OrchestraError as error:
                part.error = error

        await asyncio.gather(*(one(part) for part in self._parts if part.error is None))

    async def _stop_parts(self) -> None:
        running = [part for part in self._parts if not part.state.is_over]
        if running:
            await asyncio.shield(self._each("stop"))

    # -- the end ---------------------------------------------------------------------------------------------------

    def _check_fits(self) -> None:
        if self._job.spec.partial:
            return
        for part in self._parts:
            try:
                fit = Fit(**part.told["fit"])
            except (KeyError, TypeError):
                continue  # it is over already, and says why itself
            if not fit.fits:
                raise _DoesNotFitError(f"node {part.node.node_id} {fit}")

    async def _gather(self, failure_file: FailureFile) -> None:
        """Make one list of what failed, each path once."""
        for part in self._parts:
            offset = 0
            while part.count("files_failed") and len(self._failed) < FAILURES_KEPT_MAX:
                answer = await self._lead.ask(part.node, "failures", {**self._of_job(), "offset": offset})
                found = answer.get("failures", [])
                for failure in found:
                    self._failed.setdefault(str(failure["path"]), str(failure["message"]))
                offset += len(found)
                if len(found) < FAILURES_PER_ANSWER:
                    break
        for path, message in self._failed.items():
            failure_file.add(path, message)
        self._job.failures = list(self._failed.items())[:FAILURES_SHOWN_MAX]

    def _conclude(self) -> None:
        self.sample()
        job, parts = self._job, self._parts
        job.files_failed = len(self._failed)
        broken = next((part for part in parts if part.told["reason"] == "error"), None)
        full = next((part for part in parts if part.told["reason"] == "space"), None)
        if broken is not None:
            self._end(JobState.FAILED, f"node {broken.node.node_id}: {broken.told['message']}", "error")
        elif job.files_failed:
            first = f"; first: {job.failures[0][0]}: {job.failures[0][1]}" if job.failures else ""
            self._end(JobState.FAILED, f"{job.files_failed} of {job.files_total} files failed{first}", "files")
        elif full is not None:
            state = JobState.SUCCEEDED if job.spec.partial else JobState.FAILED
            self._end(state, f"node {full.node.node_id} {full.told['message']}", "space")
        else:
            size = format_size(job.bytes_total)
            self._end(
                JobState.SUCCEEDED, f"{job.files_total} files, {size} on {len(parts)} node{'s' * (len(parts) > 1)}", ""
            )

    def _enter(self, state: JobState) -> None:
        if self._job.state is not state:
            self._job.state = state
            self._job.is_planned = True
            self._changed(self._job)

    def _end(self, state: JobState, message: str, reason: str) -> None:
        self._job.message, self._job.reason = message, reason
        log.info("job %s of %s: %s: %s", self._job.job_id, self._job.spec.path, state.value, message)
        self._enter(state)


class _DoesNotFitError(OrchestraError):
    """A node has no room for its share."""


def _shown(failures: Iterable[Any]) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for failure in failures:
        found.setdefault(str(failure["path"]), str(failure["message"]))
    return list(found.items())[:FAILURES_SHOWN_MAX]
