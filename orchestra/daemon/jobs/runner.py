"""Which jobs there are: started, found again after a restart, waited for, stopped.

Owns: one task per job that runs, ids, joining a load that is under way already. Leaves to others: what a load does
(load), what stays on disk (journal).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from orchestra.daemon.jobs.job import Job, JobState, LoadSpec
from orchestra.daemon.jobs.load import LoadRun, LoadTools
from orchestra.errors import NotFoundError, UsageError

log = logging.getLogger(__name__)

# Loads at a time; they share one link, so more would only take turns. Others wait as CREATED.
_RUNNING_MAX = 4
_SAMPLE_INTERVAL_S = 0.25


class Run(Protocol):
    """One job being carried out; see LoadRun."""

    async def run(self) -> None: ...

    def sample(self) -> None: ...


RunMaker = Callable[[Job, Callable[[Job], None]], Run]


class JobRunner:
    """The jobs of one node. One event loop."""

    def __init__(self, tools: LoadTools) -> None:
        self.tools = self._tools = tools
        self._make_run: RunMaker = lambda job, changed: LoadRun(job, tools, changed)
        self._id_suffix = ""
        # Whether a job has that id of which this node knows nothing (any more).
        self.is_taken: Callable[[str], bool] = lambda job_id: False
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_RUNNING_MAX)
        self._change = asyncio.Event()  # set once, at the next change of any job, and then replaced

    def lead(self, make_run: RunMaker, id_suffix: str) -> None:
        """Have jobs carried out by what `make_run` makes from now on; the ids of new ones end with `id_suffix`, so that
        no two nodes of a cluster use one."""
        self._make_run = make_run
        self._id_suffix = id_suffix

    @property
    def is_busy(self) -> bool:
        """Whether a job is under way."""
        return bool(self._tasks)

    def resume(self) -> None:
        """Find the jobs of earlier daemons, and go on with those that were not over."""
        for job in self._tools.journal.load():
            self._jobs[job.job_id] = job
            if not job.state.is_over:
                log.info("job %s of %s goes on", job.job_id, job.spec.path)
                job.state = JobState.CREATED
                self._start(job)

    def submit(self, spec: LoadSpec, *, list_file: str = "") -> Job:
        """Start a load, or return the same one (its path and all its options) that is under way.

        `list_file` holds the paths of a spec that `is_listed`. Raises UsageError for a list that cannot be read,
        NotFoundError for a job to retry that there is not.
        """
        if spec.retry_of:
            self.get(spec.retry_of)
        if not spec.is_listed and not spec.retry_of:
            for job in self._jobs.values():
                if not job.state.is_over and job.spec == spec:
                    return job
        job = Job(self._new_id(), spec, self._tools.clock.wall_s())
        if spec.is_listed:
            self._tools.journal.keep_list(job.job_id, list_file)
        self._jobs[job.job_id] = job
        self._tools.journal.save(job)
        self._start(job)
        for old in self._tools.journal.forget_old(list(self._jobs.values())):
            del self._jobs[old.job_id]
        return job

    def _new_id(self) -> str:
        number = int(self._tools.journal.next_id())
        while self.is_taken(f"{number}{self._id_suffix}"):
            number += 1
        return f"{number}{self._id_suffix}"

    def last_of(self, path: str) -> Job:
        """Return the newest load of `path`. Raises NotFoundError."""
        for job in reversed(self._jobs.values()):
            if job.spec.path == path:
                return job
        raise NotFoundError(f"there was no load of {path} (see: orchestra job ls)")

    def get(self, job_id: str) -> Job:
        """Return a job. Raises NotFoundError."""
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError(f"there is no job {job_id!r} (see: orchestra job ls)")
        return job

    def has(self, job_id: str) -> bool:
        """Whether that is a job of this node."""
        return job_id in self._jobs

    def has_path(self, path: str, *, running: bool = False) -> bool:
        """Whether this node has a load of `path` (one that is under way)."""
        return any(job.spec.path == path and not (running and job.state.is_over) for job in self._jobs.values())

    def all(self) -> list[Job]:
        """Return all jobs, oldest first."""
        return list(self._jobs.values())

    async def wait(self, job_id: str, timeout_s: float) -> Job:
        """Return the job when its state has changed, or after `timeout_s`, or at once if it is over."""
        job = self.get(job_id)
        state = job.state
        if state.is_over:
            return job
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while job.state is state:
                    await self._change.wait()
        return job

    async def stop(self, job_id: str) -> Job:
        """Stop a job; what is cached stays. Raises UsageError if it is over."""
        job = self.get(job_id)
        task = self._tasks.get(job_id)
        if task is None or job.state.is_over:
            raise UsageError(f"job {job_id} is over: {job.state.value}")
        task.cancel()
        await asyncio.wait([task])
        if not job.state.is_over:
            job.state, job.message = JobState.STOPPED, "stopped; what is cached stays, and another load goes on from it"
            self._changed(job)
        return job

    def adopt(self, job: Job) -> None:
        """Go on with a job that another node led."""
        log.info("job %s of %s goes on here", job.job_id, job.spec.path)
        job.state = JobState.CREATED
        self._jobs[job.job_id] = job
        self._tools.journal.save(job)
        self._start(job)

    async def give_up(self, job_id: str) -> None:
        """Forget a job that another node leads now, without stopping it there."""
        log.info("job %s goes on at another node", job_id)
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._tools.journal.give_up(job)

    async def close(self) -> None:
        """End all tasks; on disk the jobs stay as they are, and the next daemon goes on with them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._tools.journal.settle()

    def _start(self, job: Job) -> None:
        task = asyncio.create_task(self._run(job), name=f"job {job.job_id}")
        self._tasks[job.job_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.job_id, None))

    async def _run(self, job: Job) -> None:
        async with self._slots:
            run = self._make_run(job, self._changed)
            sampling = asyncio.create_task(_sample(run))
            try:
                await run.run()
            except Exception as error:
                # The task's outermost frame: without this a bug would leave a job that never ends.
                log.exception("job %s failed", job.job_id)
                job.state, job.reason = JobState.FAILED, "error"
                job.message = f"internal error ({type(error).__name__}); see the daemon's log"
                self._changed(job)
                raise
            finally:
                sampling.cancel()

    def _changed(self, job: Job) -> None:
        self._tools.journal.save_soon(job)
        self._change.set()
        self._change = asyncio.Event()


async def _sample(run: Run) -> None:
    while True:
        run.sample()
        await asyncio.sleep(_SAMPLE_INTERVAL_S)
