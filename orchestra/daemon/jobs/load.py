"""Carries out one load: find out what there is and whether it fits, bring it, look whether it is there, verify it.

Owns: the phases of one job and what they mean for its state. Leaves to others: which files (prefetch.tree), bringing
them (prefetch.loading), keeping jobs (journal, runner).

Nothing of its progress is kept. Begun anew, by the next daemon or by a second load, it looks at every file and finds in
the cache what is there already: that costs microseconds a file, and cannot be wrong.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.store import BlockStore
from orchestra.clock import Clock
from orchestra.daemon.jobs.job import FAILURES_SHOWN_MAX, Fit, Job, JobState, within_quotas
from orchestra.daemon.jobs.journal import FailureFile, Journal
from orchestra.daemon.jobs.share import Share
from orchestra.engine.engine import Engine
from orchestra.errors import OrchestraError
from orchestra.fetch.budget import Priority
from orchestra.prefetch.loading import Loader
from orchestra.prefetch.pace import Pace
from orchestra.prefetch.steering import Steering
from orchestra.prefetch.tree import Page, TreeFile, walk, walk_paths
from orchestra.prefetch.yielding import Yielding
from orchestra.stores.limit import URGENCY
from orchestra.units import MIB, format_size

log = logging.getLogger(__name__)

# Bytes verified in one go by a thread of the disk's pool: a tenth of a second, after which others have it.
_VERIFIED_AT_ONCE_BYTES = 64 * MIB
# Missing bytes from which on a load has a courier: below it is over before that process is up.
_CARRIED_BYTES_MIN = 64 * MIB
# ... unless so many programs a core want to run already. A file then waits for its turn on a core in two processes
# instead of one: with four and more a core a load was a third slower so, with two it was faster.
_BUSY_PER_CORE = 3.0
# Pieces beyond the store's turns that lie ready with the courier, so that a turn need not wait for the daemon: what it
# gets through while a batch of answers is on its way there and back.
_AHEAD_RATIO = 0.5
# Rounds over what was there and is gone again when the end is looked at; more means that others need the space.
_ROUNDS_MAX = 2


@dataclass(frozen=True, slots=True)
class LoadTools:
    """What a load works with; the same for all."""

    engine: Engine
    blocks: BlockStore
    geometry: Geometry
    writers: ThreadPoolExecutor
    steering: Steering
    journal: Journal
    clock: Clock
    requests_max: int


class LoadRun:
    """One job being carried out. `changed` is called whenever its state is another."""

    def __init__(
        self,
        job: Job,
        tools: LoadTools,
        changed: Callable[[Job], None],
        *,
        share: Share | None = None,
        hold: Callable[[Fit], Awaitable[None]] | None = None,
    ) -> None:
        """`share`: this node's part of a load that all nodes of a cluster do, whose leader asked the stores what there
        is. `hold` is waited for when it is known what is to be done."""
        self._job = job
        self._tools = tools
        self._changed = changed
        self._share = share
        self._hold = hold
        self._failure_file: FailureFile | None = None
        # On disk, of a load that does not fit and may stay partial: in all, and left in this pass over the files.
        self._allowance_bytes: int | None = None
        self._left_bytes = 0
        self._loader: Loader | None = None
        self._is_counting = True
        self._is_courier_decided = self._has_courier = False
        self._helped = ExitStack()

    async def run(self) -> None:
        """Do it all; the job is over afterwards. Cancelling leaves the job as it is, to be begun again or stopped."""
        job = self._job
        job.begin_again()
        URGENCY.set(Priority.LOAD)
        with self._helped, self._tools.journal.failures(job.job_id) as self._failure_file:
            try:
                fit = await self._plan()
                if self._hold is not None:
                    await self._hold(fit)
                if not fit.fits and not job.spec.partial:
                    self._end(JobState.FAILED, str(fit), "space")
                    return
                if not fit.fits:
                    self._allowance_bytes = fit.free_bytes + fit.held_bytes
                self._enter(JobState.RUNNING)
                is_whole = await self._load_all()
                if job.spec.verify:
                    self._enter(JobState.VERIFYING)
                    is_whole = await self._bring(self._verified_pages()) and is_whole
                self._conclude(is_whole)
            except OrchestraError as error:
                self._end(JobState.FAILED, str(error), "error")

    def sample(self) -> None:
        """Bring the job's numbers up to date; called now and then while it runs."""
        if self._loader is not None and self._is_counting:
            self._job.bytes_done = self._loader.bytes_done
        self._job.sample(self._tools.clock.now_ns())

    # -- phases ----------------------------------------------------------------------------------------------------

    async def _plan(self) -> Fit:
        """Count what there is, and what of it is here. Raises what looking at the path raises."""
        job, blocks = self._job, self._tools.blocks
        files_total = bytes_total = 0
        missing: Counter[str] = Counter()  # by store
        charged: Counter[str] = Counter()
        async for page in self._pages(refresh=self._share is None):
            files_total += page.error is not None
            for file in page.files:
                size_bytes = file.wanted.byte_range.length
                files_total += self._counts(file)
                bytes_total += size_bytes
                lacking = self._touch(file)
                store_id = file.wanted.mount.store.store_id
                missing[store_id] += lacking
                charged[store_id] += blocks.charge_of(size_bytes) - lacking
            job.files_total, job.bytes_total = files_total, bytes_total
            self._call_courier(missing.total())
        job.is_planned = True
        held = blocks.statistics()
        # Pinned files of others stay; which of the pinned are ours is not asked, they count as ours as far as they can.
        others_pinned = max(0, held.pinned_bytes - charged.total())
        free = held.used_bytes + blocks.room_bytes() - charged.total() - others_pinned
        return within_quotas(Fit(missing.total(), free, charged.total()), self._fits_of_quotas(missing, charged))

    def _call_courier(self, missing_bytes: int) -> None:
        carried, sharing = self._tools.engine.carried, self._tools.engine.sharing
        if carried is None or sharing is not None or missing_bytes < _CARRIED_BYTES_MIN or self._is_courier_decided:
            return
        self._is_courier_decided = True
        if os.getloadavg()[0] <= _BUSY_PER_CORE * len(os.sched_getaffinity(0)):
            self._has_courier = True
            self._helped.enter_context(carried.courier.held())

    def _fits_of_quotas(self, missing: Counter[str], charged: Counter[str]) -> Iterator[Fit]:
        for store_id, missing_bytes in missing.items():
            quota = self._tools.blocks.space.quota_of(store_id)
            if quota is not None:
                limit_bytes, _, pinned_bytes = quota
                held_bytes = charged[store_id]
                yield Fit(missing_bytes, limit_bytes - held_bytes - max(0, pinned_bytes - held_bytes), held_bytes)

    def _touch(self, file: TreeFile) -> int:
        """Return the bytes that the file lacks on disk; what is here counts as used now, so that it does not make room
        for the rest."""
        blocks, geometry = self._tools.blocks, self._tools.geometry
        span = file.wanted.byte_range
        if not span.length:
            return 0
        digest = file.wanted.digest
        lacking = blocks.missing_charge(digest, file.wanted.info.size_bytes, span)
        if lacking < blocks.charge_of(span.length):
            for _, run in geometry.extents_of(geometry.blocks_of(file.wanted.byte_range)):
                blocks.touch(digest, run.start)
        return lacking

    async def _load_all(self) -> bool:
        """Bring everything, then what left again meanwhile; False if the cache was full before the end."""
        blocks = self._tools.blocks
        left_before = blocks.left_count
        is_whole = await self._bring(self._pages(refresh=False))
        self.sample()
        self._is_counting = False  # what follows looks at the same files again
        for _ in range(_ROUNDS_MAX):
            if not is_whole or blocks.left_count == left_before or not await self._count_missing():
                return is_whole
            is_whole = await self._bring(self._missing_pages())
        return is_whole and not await self._count_missing()

    async def _bring(self, pages: AsyncGenerator[Page, None]) -> bool:
        spec, tools = self._job.spec, self._tools
        self._left_bytes = self._allowance_bytes or 0
        pace = Pace(spec.bandwidth_bytes_per_s, tools.clock) if spec.bandwidth_bytes_per_s else None
        ahead = int(tools.requests_max * _AHEAD_RATIO) if self._has_courier else 0
        self._loader = Loader(
            tools.engine,
            tools.geometry,
            self,
            priority=Priority.LOAD,
            limit=tools.requests_max + ahead,
            clock=tools.clock,
            pace=pace,
            has_room=self._has_room,
            share=self._shared,
        )
        async with tools.steering.steer(self._loader, Yielding(tools.requests_max + ahead)):
            return await self._loader.run(pages)

    def _conclude(self, is_whole: bool) -> None:
        job = self._job
        if job.files_failed:
            first = f"; first: {job.failures[0][0]}: {job.failures[0][1]}" if job.failures else ""
            self._end(JobState.FAILED, f"{job.files_failed} of {job.files_total} files failed{first}", "files")
        elif is_whole:
            self._end(JobState.SUCCEEDED, f"{job.files_total} files, {format_size(job.bytes_total)}", "")
        else:
            held = f"holds {job.files_done} of {job.files_total} files: there is no room for the rest"
            state = JobState.SUCCEEDED if job.spec.partial else JobState.FAILED
            self._end(state, held, "space")

    # -- which files -----------------------------------------------------------------------------------------------

    async def _pages(self, *, refresh: bool) -> AsyncGenerator[Page, None]:
        async with aclosing(job_pages(self._job, self._tools, refresh=refresh)) as pages:
            async for page in pages:
                if self._share is not None:
                    page = replace(page, files=tuple(part for file in page.files for part in self._shared(file)))
                yield page

    def _shared(self, file: TreeFile) -> list[TreeFile]:
        return [file] if self._share is None else self._share.of(file)

    def _counts(self, file: TreeFile) -> bool:
        return self._share is None or self._share.counts(file)

    async def _missing_pages(self) -> AsyncGenerator[Page, None]:
        """The files that are not wholly here; no failures, those are known by now."""
        async with aclosing(self._pages(refresh=False)) as pages:
            async for page in pages:
                missing = tuple(file for file in page.files if self._is_missing(file))
                if missing:
                    yield Page(missing)

    async def _count_missing(self) -> int:
        if self._job.files_failed:
            return 0
        count = 0
        async for page in self._missing_pages():
            count += len(page.files)
        return count

    def _is_missing(self, file: TreeFile) -> bool:
        size, digest = file.wanted.info.size_bytes, file.wanted.digest
        if not size or not self._tools.blocks.missing_charge(digest, size, file.wanted.byte_range):
            return False
        local = self._tools.blocks.open_object(digest, size)  # the accounts of a crash may be some pages off
        try:
            return bool(local.missing_blocks(file.wanted.byte_range))
        finally:
            local.close()

    async def _verified_pages(self) -> AsyncGenerator[Page, None]:
        """The files that are here, after their bytes were compared with their checksums: what did not match is gone
        then, and is fetched again by who takes the page."""
        async with aclosing(self._pages(refresh=False)) as pages:
            async for page in pages:
                held = tuple(file for file in page.files if self._tools.engine.holds_some(file.wanted))
                for batch in self._batches(held):
                    loop = asyncio.get_running_loop()
                    self._job.blocks_damaged += await loop.run_in_executor(self._tools.writers, self._verify, batch)
                if held:
                    yield Page(held)

    def _batches(self, files: tuple[TreeFile, ...]) -> Iterator[list[tuple[str, int, int]]]:
        """The files' extents as (digest, size, first block), some megabytes at a time."""
        geometry = self._tools.geometry
        batch: list[tuple[str, int, int]] = []
        batch_bytes = 0
        for file in files:
            size, digest = file.wanted.info.size_bytes, file.wanted.digest
            for index, run in geometry.extents_of(geometry.blocks_of(file.wanted.byte_range)):
                batch.append((digest, size, run.start))
                batch_bytes += geometry.extent_length(size, index)
                if batch_bytes >= _VERIFIED_AT_ONCE_BYTES:
                    yield batch
                    batch, batch_bytes = [], 0
        if batch:
            yield batch

    def _verify(self, batch: list[tuple[str, int, int]]) -> int:
        blocks = self._tools.blocks
        return sum(blocks.verify(*one) for one in batch if blocks.holds(*one))

    # -- what becomes of them --------------------------------------------------------------------------------------

    def on_done(self, file: TreeFile) -> None:
        """See LoadObserver."""
        if self._is_counting and self._counts(file):
            self._job.files_done += 1

    def on_failed(self, path: str, error: OrchestraError) -> None:
        """See LoadObserver."""
        job = self._job
        job.files_failed += 1
        if len(job.failures) < FAILURES_SHOWN_MAX:
            job.failures.append((path, str(error)))
        if self._failure_file is not None:
            self._failure_file.add(path, str(error))

    def _has_room(self, size_bytes: int) -> bool:
        if self._allowance_bytes is None:
            return True
        self._left_bytes -= self._tools.blocks.charge_of(size_bytes)
        return self._left_bytes >= 0

    # -- states ----------------------------------------------------------------------------------------------------

    def _enter(self, state: JobState) -> None:
        self._job.state = state
        self._changed(self._job)

    def _end(self, state: JobState, message: str, reason: str) -> None:
        self.sample()
        self._job.message, self._job.reason = message, reason
        log.info("job %s of %s: %s: %s", self._job.job_id, self._job.spec.path, state.value, message)
        self._enter(state)


def job_pages(job: Job, tools: LoadTools, *, refresh: bool) -> AsyncGenerator[Page, None]:
    """Return the files that the job is about, in pages; `refresh` asks the stores what there is now."""
    if job.spec.retry_of:
        return walk_paths(tools.engine, tools.journal.failed_paths(job.spec.retry_of), refresh=refresh)
    if job.spec.is_listed:
        return walk_paths(tools.engine, tools.journal.listed_paths(job.job_id, job.spec.path), refresh=refresh)
    return walk(tools.engine, job.spec.path, refresh=refresh)
