"""This node's parts of loads that all nodes of a cluster do together, as the node that leads such a load asks for them.

Owns: starting, telling of, releasing and stopping parts; what the leader sends is checked. Leaves to others: doing one
(load), which bytes are a node's (share), the whole (nodes.loads).

Nothing of a part is kept over a restart: its leader asks for it again, and what is cached is not fetched twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from orchestra.cluster.ring import Ring, RingNode, ring_of
from orchestra.config import MountConfig
from orchestra.daemon.jobs.job import Fit, Job, JobState, is_job_id, spec_from_json
from orchestra.daemon.jobs.journal import Journal
from orchestra.daemon.jobs.load import LoadRun, LoadTools
from orchestra.daemon.jobs.share import Share
from orchestra.errors import LedElsewhereError, NotFoundError, OrchestraError, UsageError

log = logging.getLogger(__name__)

# Parts that are over and still told of: as many as a leader can have under way, several times.
_PARTS_MAX = 64
# Failures in one answer: some 200 bytes each.
FAILURES_PER_ANSWER = 5000
# A part that is planned waits so long for its leader, which plans the others meanwhile.
_RELEASE_TIMEOUT_S = 3600.0


@dataclass(slots=True)
class _Part:
    job: Job
    term: int = 0  # of the leader's: a leader of an earlier one has lost the job to another node
    task: asyncio.Task[None] | None = None
    fit: Fit | None = None
    released: asyncio.Event = field(default_factory=asyncio.Event)


class PartRunner:
    """One event loop."""

    def __init__(self, tools: LoadTools, folder: Path, node_id: str, replicas_of: Callable[[MountConfig], int]) -> None:
        """`folder` takes what a part needs on disk while it runs; `replicas_of` holds for loads that do not say."""
        folder.mkdir(exist_ok=True)
        self._journal = Journal(folder)
        self._tools = dataclasses.replace(tools, journal=self._journal)
        self._folder = folder
        self._node_id = node_id
        self._replicas_of = replicas_of
        self._parts: OrderedDict[str, _Part] = OrderedDict()
        self._starting = asyncio.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether a part is under way."""
        return any(part.task is not None and not part.task.done() for part in self._parts.values())

    async def answer(self, action: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Do what the leader of a load asks for. Raises UsageError, NotFoundError for a part that is not known (any
        more), LedElsewhereError for one that another node has started since."""
        job_id = body.get("job")
        if not isinstance(job_id, str) or not is_job_id(job_id):
            raise UsageError("job: expected the id of a job")
        if action == "start":
            async with self._starting:  # what is there is looked at, stopped and replaced as one
                await self._start(job_id, body)
            return {}
        part = self._parts.get(job_id)
        if part is None or part.term != _term_of(body):
            raise NotFoundError(f"node {self._node_id} knows of no part of job {job_id}")
        match action:
            case "status":
                fit = part.fit
                return {**part.job.to_json(), "fit": None if fit is None else dataclasses.asdict(fit)}
            case "release":
                part.released.set()
            case "stop":
                await self._stop(part)
            case "failures":
                return {"failures": self._failures(job_id, body.get("offset"))}
            case _:
                raise UsageError(f"not an action on a part: {action[:100]!r}")
        return {}

    async def close(self) -> None:
        """Stop all parts."""
        for part in list(self._parts.values()):
            await self._stop(part)

    async def _start(self, job_id: str, body: Mapping[str, Any]) -> None:
        spec_body = body.get("spec")
        if not isinstance(spec_body, dict):
            raise UsageError("spec: expected a load")
        spec = spec_from_json({**spec_body, "retry_of": ""})
        ring = _ring_of(body.get("ring"))
        before, term = self._parts.get(job_id), _term_of(body)
        if before is not None and before.term > term:
            raise LedElsewhereError(f"job {job_id} is led by another node now")
        if before is not None:
            await self._stop(before)
            del self._parts[job_id]
        if spec.is_listed:
            self._keep_list(job_id, body.get("paths"))
        part = _Part(Job(job_id, spec, self._tools.clock.wall_s()), term)
        replicas_of = self._replicas_of if not spec.replicas else lambda _: spec.replicas
        share = Share(ring, self._node_id, self._tools.geometry, replicas_of)

        async def hold(fit: Fit) -> None:
            part.fit = fit
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                await part.released.wait()

        run = LoadRun(part.job, self._tools, lambda job: None, share=share, hold=hold)
        part.task = asyncio.create_task(self._run(run, part.job), name=f"part of job {job_id}")
        self._parts[job_id] = part
        self._forget_old()

    async def _run(self, run: LoadRun, job: Job) -> None:
        sampling = asyncio.create_task(_sample(run))
        try:
            await run.run()
        except TimeoutError:
            job.state, job.message = JobState.STOPPED, "its leader went away"
        except Exception as error:
            # The task's outermost frame: without this a bug would leave a part that never ends.
            log.exception("a part of job %s failed", job.job_id)
            job.state, job.reason = JobState.FAILED, "error"
            job.message = f"internal error ({type(error).__name__}); see the log of node {self._node_id}"
            raise
        finally:
            sampling.cancel()

    async def _stop(self, part: _Part) -> None:
        if part.task is not None and not part.task.done():
            part.task.cancel()
            await asyncio.wait([part.task])
        if not part.job.state.is_over:
            part.job.state = JobState.STOPPED

    def _forget_old(self) -> None:
        over = [job_id for job_id, part in self._parts.items() if part.task is None or part.task.done()]
        for job_id in over[: max(0, len(self._parts) - _PARTS_MAX)]:
            del self._parts[job_id]
            for suffix in ("failed", "paths"):
                (self._folder / f"{job_id}.{suffix}").unlink(missing_ok=True)

    def _failures(self, job_id: str, offset: object) -> list[dict[str, str]]:
        if not isinstance(offset, int) or offset < 0:
            raise UsageError("offset: expected a number")
        return list(islice(self._journal.failed(job_id), offset, offset + FAILURES_PER_ANSWER))

    def _keep_list(self, job_id: str, paths: object) -> None:
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise UsageError("paths: expected a list of paths")
        text = "".join(f"{path}\n" for path in paths)
        (self._folder / f"{job_id}.paths").write_text(text, encoding="utf-8", errors="surrogateescape")


async def _sample(run: LoadRun) -> None:
    while True:
        run.sample()
        await asyncio.sleep(0.25)


def _term_of(body: Mapping[str, Any]) -> int:
    term = body.get("term", 0)
    if not isinstance(term, int) or term < 0:
        raise UsageError("term: expected a number")
    return term


def _ring_of(nodes: object) -> Ring:
    """The ring that the leader shares the load by. Raises UsageError."""
    if not isinstance(nodes, list) or not nodes:
        raise UsageError("ring: expected a list of nodes")
    found = []
    for node in nodes:
        match node:
            case [str(node_id), int(weight)]:
                found.append(RingNode(node_id, weight))
            case _:
                raise UsageError("ring: expected [node, weight]")
    try:
        return ring_of(0, found)
    except OrchestraError as error:
        raise UsageError(f"ring: {error}") from error
