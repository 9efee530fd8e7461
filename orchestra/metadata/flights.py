"""Single flight: a question that is under way is not asked a second time. One event loop.

Owns: who joins which question. Leaves to others: the questions, and what becomes of the answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from orchestra.clock import Clock

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Name = tuple[str, str]  # store id and key


@dataclass(frozen=True, slots=True)
class _Flight(Generic[Answer]):
    task: asyncio.Task[Answer]
    asked_ns: int


class Flights(Generic[Answer]):
    """Questions of one kind that are under way."""

    def __init__(self, kind: str, clock: Clock) -> None:
        self._kind = kind
        self._clock = clock
        self._running: dict[Name, _Flight[Answer]] = {}

    def ask(
        self, name: Name, question: Callable[[], Coroutine[Any, Any, Answer]], *, age_max_s: float
    ) -> Awaitable[Answer]:
        """Return the answer to `question`, or to the same one that was asked at most `age_max_s` ago (0: not before
        this call). It is asked at once; cancelling a waiter does not stop it. Raises what it raises."""
        running = self._running.get(name)
        if running is None:
            return asyncio.shield(self._start(name, question))
        age_ns = self._clock.now_ns() - running.asked_ns
        if age_max_s > 0 and age_ns <= age_max_s * 1e9:
            return asyncio.shield(running.task)
        return self._after(running.task, name, question)

    def start(self, name: Name, question: Callable[[], Coroutine[Any, Any, Answer]]) -> None:
        """Have the question asked, unless it is under way; nobody waits for the answer."""
        if name not in self._running:
            self._start(name, question)

    async def close(self) -> None:
        """Stop what is under way."""
        tasks = [flight.task for flight in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _after(
        self, earlier: asyncio.Task[Answer], name: Name, question: Callable[[], Coroutine[Any, Any, Answer]]
    ) -> Answer:
        # Its answer is too old for us, but the store is spared the same question twice at a time. Whatever is under
        # way after it was asked after our call.
        await asyncio.wait([earlier])
        running = self._running.get(name)
        task = running.task if running is not None else self._start(name, question)
        return await asyncio.shield(task)

    def _start(self, name: Name, question: Callable[[], Coroutine[Any, Any, Answer]]) -> asyncio.Task[Answer]:
        task = asyncio.create_task(question())
        self._running[name] = _Flight(task, self._clock.now_ns())
        task.add_done_callback(lambda done: self._land(name, done))
        return task

    def _land(self, name: Name, task: asyncio.Task[Answer]) -> None:
        del self._running[name]
        if not task.cancelled() and task.exception() is not None:
            # Whoever waits gets the error itself; a background listing has no one else to tell.
            log.info("%s of %s in %s failed: %s", self._kind, name[1] or "/", name[0], task.exception())
