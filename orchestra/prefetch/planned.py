"""Carries out plans: looks at what comes next, has the engine fetch it, and tells eviction what will be used when.

Covers: plans by name, whose turn it is, what is ahead, tables of paths that plans share. Does not cover: arithmetic
(plan), how an order travels (client/plans.py, daemon/api/plans.py), demand (engine).

How far a reader is comes from its sampler, a message in a tenth of a second, and not from what is read: a file that
the kernel serves from its page cache leaves no note in any ring, and finding a sample by what was read would take a
table of every object's name in memory.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestra.blocks.store import BlockStore
from orchestra.clock import Clock
from orchestra.engine.engine import Engine, Wanted
from orchestra.errors import OrchestraError, UsageError
from orchestra.fetch.budget import Priority
from orchestra.prefetch.loading import ANSWERS_MAX
from orchestra.prefetch.path_table import PathTable
from orchestra.prefetch.plan import (
    IndexSet,
    PlanLimits,
    Standing,
    Timeline,
    ahead_limit_bytes,
    most_urgent,
    next_rate,
    steps_to_look_at,
)
from orchestra.prefetch.squeeze import Squeeze
from orchestra.prefetch.steering import TICK_S, Steering
from orchestra.values import ByteRange, EntryKind

log = logging.getLogger(__name__)

# Readers of one node: eight accelerators, and a few jobs that ended without saying so.
PLANS_MAX = 64
# Tables that no plan uses (yet): the next job of a search over hyperparameters has the same paths.
_TABLES_UNUSED_MAX = 2
# A reader that draws nothing for so long is gone; should it come back it publishes again.
PLAN_IDLE_S = 1800.0
# How often a reader says where it is while that changes nothing: a look at how fast it goes, and what it has left.
_REST_S = 1.0
# Rounds of looking in one turn of the loop; what is here already is passed over a hundred at a time, in 100 us.
_ROUNDS_PER_TURN = 16


@dataclass(slots=True)
class _Ahead:
    """A step that was looked at."""

    step: int
    index: int
    size_bytes: int  # an estimate until the file's size is known
    names: Sequence[str] = ()
    is_counted: bool = True  # among its plan's bytes ahead


@dataclass(slots=True)
class _Table:
    paths: PathTable
    plans: set[str] = field(default_factory=set)
    present: IndexSet = field(default_factory=IndexSet)  # they were here, and nothing has left since
    left_count: int = -1


@dataclass(slots=True)
class _Plan:
    name: str
    table: _Table
    heard_ns: int
    timeline: Timeline = field(default_factory=Timeline)
    position: int = 0
    frontier: int = 0
    behind: int = 0  # the longest jump of the position: what its workers may not have read yet
    in_flight: int = 0
    ahead_bytes: int = 0
    ahead: deque[_Ahead] = field(default_factory=deque)  # steps from `position` on
    drawn: deque[_Ahead] = field(default_factory=deque)  # the ones before it that may still be read
    size_mean_bytes: float = 0.0
    store_id: str = ""  # whose file was looked at last: where it has a quota, that bounds the plan
    rate_steps_per_s: float = 0.0
    # What is here is all needed sooner than these: tried again as the reader goes on, and nothing else is meanwhile.
    no_room: list[_Ahead] = field(default_factory=list)
    told: tuple[int, int] | None = None  # (epoch, offset) as the reader said last
    fetched: int = 0
    failed: int = 0
    failure: str = ""  # the first of them

    def standing(self) -> Standing:
        """The plan's marks."""
        known = self.frontier if self.no_room else self.timeline.known_stop
        return Standing(self.position, self.frontier, known, self.ahead_bytes, self.in_flight, self.size_mean_bytes)


class PlanRunner:
    """All plans of a node. One event loop; every task is waited for by `close`."""

    def __init__(
        self,
        engine: Engine,
        blocks: BlockStore,
        *,
        steering: Steering,
        clock: Clock,
        capacity_bytes: int,
        requests_max: int,
    ) -> None:
        self._engine = engine
        self._blocks = blocks
        self._clock = clock
        self._capacity_bytes = capacity_bytes
        self._steering = steering
        self._steering_task: asyncio.Task[None] | None = None
        self._squeeze = Squeeze(requests_max)
        self._limit = self._squeeze.limit
        self._answers: list[tuple[int, int]] = []
        self.bytes_in_flight = 0
        self._plans: OrderedDict[str, _Plan] = OrderedDict()
        self._tables: OrderedDict[str, _Table] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_pumping = False
        self._is_closed = False

    # -- what publishers say ---------------------------------------------------------------------------------------

    def declare_paths(self, name: str, count: int) -> list[int]:
        """Make room for a table of `count` paths; return the indexes of the parts that are still missing."""
        table = self._tables.get(name)
        if table is None or table.paths.count != count:
            table = self._tables[name] = _Table(PathTable(count))
            unused = [one for one, held in self._tables.items() if not held.plans and one != name]
            for one in unused[: max(0, len(unused) - _TABLES_UNUSED_MAX)]:
                del self._tables[one]
        return table.paths.missing_parts()

    def add_paths_part(self, name: str, part: int, raw: bytes) -> None:
        """Take a part of a declared table. Raises UsageError."""
        self._table(name).paths.add_part(part, raw)

    def add_order(self, name: str, table_name: str, epoch: int, first: int, total: int, samples: array[int]) -> None:
        """Take samples `first`... of an epoch of `total` of the plan `name`, made if it is new. Raises UsageError."""
        table = self._table(table_name)
        if table.paths.missing_parts():
            raise UsageError("the plan's paths are not complete")
        if samples and max(samples) >= table.paths.count:
            raise UsageError(f"sample {max(samples)} of {table.paths.count} paths")
        plan = self._plans.get(name)
        if plan is not None and plan.table is not table:
            self.end(name)
            plan = None
        if plan is None:
            plan = self._begin(name, table)
        plan.heard_ns = self._clock.now_ns()
        if plan.timeline.put(epoch, first, total, samples):
            self._restart(plan, min(plan.frontier, plan.timeline.step_of(epoch, 0) or 0))
        self._pump()

    def move(self, name: str, epoch: int, offset: int) -> bool:
        """The reader has drawn `offset` samples of that epoch; False if nothing is known of the plan or epoch."""
        plan = self._plans.get(name)
        position = plan.timeline.step_of(epoch, offset) if plan is not None else None
        if plan is None or position is None:
            return False
        now_ns = self._clock.now_ns()
        before, plan.position = plan.position, position
        if plan.told is None or position < before:
            self._restart(plan, position)
        else:
            # Over the end of an epoch only what was drawn of the new one counts: the reader may have left the old.
            drawn = min(position - before, offset)
            plan.rate_steps_per_s = next_rate(plan.rate_steps_per_s, drawn, (now_ns - plan.heard_ns) / 1e9)
            plan.behind = max(plan.behind, drawn)
            plan.frontier = max(plan.frontier, position - plan.behind)
        plan.told, plan.heard_ns = (epoch, offset), now_ns
        self._pass(plan)
        self._try_again(plan)
        plan.timeline.forget_before(position - plan.behind)
        self._pump()
        return True

    def rest_s(self, name: str) -> float:
        """For how long the reader need not say where it is: nothing of what is known of its order is left to fetch."""
        plan = self._plans.get(name)
        if plan is None or plan.in_flight or plan.no_room or plan.frontier < plan.timeline.known_stop:
            return 0.0
        return _REST_S

    def failure(self, name: str) -> str:
        """Why the first of a plan's files that could not be fetched could not be; empty if all could."""
        plan = self._plans.get(name)
        return "" if plan is None else plan.failure

    def end(self, name: str) -> bool:
        """Forget a plan; what is being fetched for it comes. False if there is none of that name."""
        plan = self._plans.pop(name, None)
        if plan is None:
            return False
        plan.table.plans.discard(name)
        self._blocks.forget_plan(name)
        return True

    def status(self) -> list[dict[str, Any]]:
        """Each plan's progress, for people and tests."""
        rows = []
        for plan in self._plans.values():
            epoch, offset = plan.told or (0, 0)
            rows.append(
                {
                    "plan": plan.name,
                    "samples": plan.table.paths.count,
                    "epoch": epoch,
                    "position": offset,
                    "epoch_samples": plan.timeline.length_of(epoch),
                    "ahead_samples": max(0, plan.frontier - plan.position),
                    "ahead_bytes": plan.ahead_bytes,
                    "known_samples": max(0, plan.timeline.known_stop - plan.position),
                    "in_flight": plan.in_flight,
                    "fetched": plan.fetched,
                    "failed": plan.failed,
                    "samples_per_s": round(plan.rate_steps_per_s, 3),
                }
            )
        return rows

    @property
    def is_busy(self) -> bool:
        """Whether anything is being looked at or fetched."""
        return bool(self._tasks) or self._is_pumping

    async def close(self) -> None:
        """Stop fetching for plans."""
        self._is_closed = True
        tasks = [*self._tasks, *([self._steering_task] if self._steering_task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- how much at a time (see Steered) --------------------------------------------------------------------------

    priority = Priority.PLAN

    def set_limit(self, limit: int) -> None:
        """Look at so many steps at a time, over all plans; those under way end by themselves."""
        self._limit = limit
        self._pump_soon()

    def take_answers(self) -> list[tuple[int, int]]:
        """Return how long each file took that was fetched since the last call, in nanoseconds, and its bytes."""
        answers, self._answers = self._answers, []
        return answers

    async def _steer(self) -> None:
        """Until nothing has been fetched for a while."""
        async with self._steering.steer(self, self._squeeze):
            while self.bytes_in_flight or self._answers:
                await asyncio.sleep(2 * TICK_S)
        self._steering_task = None

    # -- plans -----------------------------------------------------------------------------------------------------

    def _table(self, name: str) -> _Table:
        table = self._tables.get(name)
        if table is None:
            raise UsageError(f"no paths are known by the name {name[:40]!r}; declare them first")
        return table

    def _begin(self, name: str, table: _Table) -> _Plan:
        now_ns = self._clock.now_ns()
        for old in list(self._plans.values()):
            if now_ns - old.heard_ns > PLAN_IDLE_S * 1e9:
                self.end(old.name)
        if len(self._plans) >= PLANS_MAX:
            self.end(min(self._plans.values(), key=lambda plan: plan.heard_ns).name)
        plan = self._plans[name] = _Plan(name, table, now_ns)
        table.plans.add(name)
        return plan

    def _restart(self, plan: _Plan, step: int) -> None:
        """Look at everything from `step` on again: the order changed, or the reader went back."""
        plan.frontier = step
        for entry in plan.ahead:
            entry.is_counted = False
        plan.ahead.clear()
        plan.drawn.clear()
        plan.no_room.clear()
        plan.ahead_bytes = 0
        self._blocks.forget_plan(plan.name)

    def _pass(self, plan: _Plan) -> None:
        """Let go of what the reader has drawn, and tell eviction when it comes again."""
        while plan.ahead and plan.ahead[0].step < plan.position:
            passed = plan.ahead.popleft()
            plan.ahead_bytes -= passed.size_bytes
            passed.is_counted = False
            plan.drawn.append(passed)
        done = plan.position - plan.behind
        while plan.drawn and plan.drawn[0].step < done:
            passed = plan.drawn.popleft()
            again = self._next_use(plan, passed) if passed.names else None
            if again is not None:
                self._blocks.expect(again[0], again[1], passed.names)
        if done > 0:
            self._blocks.advance_plan(plan.name, done)

    def _next_use(self, plan: _Plan, passed: _Ahead) -> tuple[str, int] | None:
        """Which reader of these paths reads that sample next, and at which step: any rank's share may have it."""
        uses = [
            (name, step)
            for name in plan.table.plans
            if (step := self._plans[name].timeline.use_after(self._plans[name].position, passed.index)) is not None
        ]
        return min(uses, key=lambda use: use[1] - self._plans[use[0]].position, default=None)

    # -- fetching --------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Start what is due, until enough is in flight or nothing is."""
        if self._is_closed:
            return
        for _ in range(_ROUNDS_PER_TURN):
            due = [(plan, steps) for plan in self._plans.values() if (steps := self._due(plan))]
            if not due:
                return
            plan, steps = due[most_urgent(one.frontier - one.position for one, _ in due)]
            for step in steps:
                self._look(plan, step)
        self._pump_soon()

    def _pump_soon(self) -> None:
        """In the loop's next turn, once for all that ends in this one."""
        if not self._is_pumping:
            self._is_pumping = True
            asyncio.get_running_loop().call_soon(self._pump_on)

    def _pump_on(self) -> None:
        self._is_pumping = False
        self._pump()

    def _due(self, plan: _Plan) -> range:
        standing = plan.standing()
        if plan.told is None or standing.frontier >= standing.known_stop:  # told: else it may begin far inside
            return range(0)
        others = sum(other.in_flight for other in self._plans.values()) - plan.in_flight
        return steps_to_look_at(standing, PlanLimits(self._ahead_max(plan), self._limit - others))

    def _ahead_max(self, plan: _Plan) -> int:
        sharing, capacity_bytes = list(self._plans.values()), self._capacity_bytes
        quota = self._blocks.space.quota_of(plan.store_id)
        if quota is not None:  # only what comes from that store has to make room
            capacity_bytes = min(capacity_bytes, quota[0])
            sharing = [other for other in sharing if other.store_id == plan.store_id]
        all_ahead = sum(other.ahead_bytes for other in sharing)
        on_the_way = sum(other.in_flight * other.size_mean_bytes for other in sharing)
        limit = ahead_limit_bytes(
            room_bytes=self._blocks.room_bytes(plan.store_id) - int(on_the_way),
            ahead_bytes=all_ahead,
            capacity_bytes=capacity_bytes,
            rate_bytes_per_s=sum(one.rate_steps_per_s * one.size_mean_bytes for one in sharing),
        )
        return limit - (all_ahead - plan.ahead_bytes)

    def _look(self, plan: _Plan, step: int) -> None:
        index = plan.timeline.index_at(step)
        assert index is not None, "only known steps are due"
        plan.frontier = step + 1
        if self._is_present(plan.table, index):
            return
        entry = _Ahead(step, index, int(plan.size_mean_bytes))
        plan.ahead.append(entry)
        plan.ahead_bytes += entry.size_bytes
        self._start(plan, entry)

    def _try_again(self, plan: _Plan) -> None:
        """There was no room, but the reader has gone on, and what it left may leave. One file is tried; each that is
        kept has the next one tried, so that a cache which keeps nothing new costs one try a message."""
        plan.no_room = [entry for entry in plan.no_room if entry.step >= plan.position - plan.behind]
        if plan.no_room:
            first = min(plan.no_room, key=lambda entry: entry.step)
            plan.no_room.remove(first)
            self._start(plan, first)

    def _start(self, plan: _Plan, entry: _Ahead) -> None:
        plan.in_flight += 1
        task = asyncio.create_task(self._fetch(plan, entry))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, plan: _Plan, entry: _Ahead) -> None:
        try:
            path = plan.table.paths.path(entry.index)
            if not path:  # a sample that lies outside of the namespace
                return
            found = await self._engine.stat(path)
            if found.kind is not EntryKind.FILE:
                raise UsageError(f"not a file: {path}")
            wanted = self._engine.want(path, found.version, found.size_bytes, ByteRange(0, found.size_bytes))
            plan.store_id = wanted.mount.store.store_id
            left_count = self._blocks.left_count  # before it is looked whether the file is here
            missing_bytes = self._settle(plan, entry, wanted.digest, found.size_bytes)
            # What the accounts hold is not looked at: after a reboot its first reader has it verified.
            if missing_bytes and not await self._bring(wanted):
                plan.no_room.append(entry)
            else:
                plan.fetched += bool(missing_bytes)
                self._mark_present(plan.table, entry.index, left_count)
                if plan.no_room:
                    self._try_again(plan)
        except (OrchestraError, OSError) as error:
            # The reader will see the error itself, if it is still there when he comes.
            plan.failed += 1
            plan.failure = plan.failure or str(error)
            log.info("ahead of plan %s: %s", plan.name, error)
        finally:
            plan.in_flight -= 1
            self._pump_soon()

    async def _bring(self, wanted: Wanted) -> bool:
        """Have the engine fetch a file; how long that took says how much to have in flight."""
        size_bytes, begun_ns = wanted.byte_range.length, self._clock.now_ns()
        is_timed = not self._engine.is_coming(wanted)  # else the time says when a reader asked
        self.bytes_in_flight += size_bytes
        if self._steering_task is None and not self._is_closed:
            self._steering_task = asyncio.create_task(self._steer(), name="steering of plans")
        try:
            is_kept = await self._engine.ensure(wanted, Priority.PLAN)
        finally:
            self.bytes_in_flight -= size_bytes
        if is_timed and len(self._answers) < ANSWERS_MAX:
            self._answers.append((self._clock.now_ns() - begun_ns, size_bytes))
        return is_kept

    def _settle(self, plan: _Plan, entry: _Ahead, digest: str, size_bytes: int) -> int:
        """The file's size and extents are known now. Returns what of it is missing: only that is ahead of the reader
        by this plan's doing, and bounded; in bytes of the disk, as the cache's size is."""
        entry.names = self._blocks.names_of(digest, size_bytes)
        if entry.names and self._plans.get(plan.name) is plan:
            self._blocks.expect(plan.name, entry.step, entry.names)
        missing_bytes = self._blocks.missing_charge(digest, size_bytes)
        if entry.is_counted:
            plan.ahead_bytes += missing_bytes - entry.size_bytes
        entry.size_bytes = missing_bytes
        was_blind = not plan.size_mean_bytes
        plan.size_mean_bytes = next_rate(plan.size_mean_bytes, max(1, self._blocks.charge_of(size_bytes)), 1.0)
        if was_blind:
            for other in plan.ahead:
                if other is not entry:
                    other.size_bytes = int(plan.size_mean_bytes)
                    plan.ahead_bytes += other.size_bytes
            self._pump()
        return missing_bytes

    # -- what is here ----------------------------------------------------------------------------------------------

    def _is_present(self, table: _Table, index: int) -> bool:
        if table.left_count != self._blocks.left_count:
            table.present.clear()
            return False
        return index in table.present

    def _mark_present(self, table: _Table, index: int, left_count: int) -> None:
        """Remember it until something leaves: an epoch that fits is then passed over without looking at disks."""
        if left_count != self._blocks.left_count:
            return
        if table.left_count != left_count:
            table.present.clear()
            table.left_count = left_count
        table.present.add(index)
