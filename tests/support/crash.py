"""Dying on purpose: a scenario runs in a forked child that is killed (SIGKILL) at a chosen step, and the parent looks
at what is left.

A step is a call to the disk, or a line of the modules that change the cache directory. Nothing is flushed, closed or
undone: what the kernel had is what remains, as after `kill -9` of a daemon.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from tests.support.disks import HookedDisk

# Lines of these are the steps between system calls: marks in mapped memory, accounts, the index's transactions.
_TRACED = tuple(f"/orchestra/blocks/{name}.py" for name in ("store", "files", "formats", "accounts", "index"))


class Fuse:
    """Counts steps from `light` on, and kills the process before the `at`-th (None: never)."""

    def __init__(self, at: int | None) -> None:
        self._at = at
        self._is_lit = False
        self.steps = 0

    def light(self) -> None:
        """From now on steps count: what came before was preparation."""
        self._is_lit = True

    def step(self) -> None:
        """One step is about to be done."""
        if not self._is_lit:
            return
        self.steps += 1
        if self.steps == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # the signal is on its way


def count_steps(run: Callable[[Fuse], object]) -> int:
    """Run once in a child without dying; return how many steps there are."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _in_child(lambda: _tell(writing, run))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, "the scenario fails even without a crash"
    return int(told)


def die_at(step: int, run: Callable[[Fuse], object]) -> None:
    """Run in a child that dies before that step; fails unless it did."""
    pid = os.fork()
    if not pid:
        _in_child(lambda: run(Fuse(step)))
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"step {step} was not reached: {status}"


def crash_points(run: Callable[[Fuse], object], *, stride: int = 1) -> Iterator[int]:
    """Run the scenario once for each `stride`-th step, dying there; yields after each death."""
    count = count_steps(run)
    assert count > 0, "nothing was done, so nothing would be proved"
    for step in range(1, count + 1, stride):
        die_at(step, run)
        yield step


def burn_before_each_call(disk: HookedDisk, fuse: Fuse) -> None:
    """Make every call to the disk a step, before whatever else it does first."""
    first = disk.before

    def before(operation: str, number: int) -> None:
        fuse.step()
        first(operation, number)

    disk.before = before


def trace_lines(fuse: Fuse, *, times_max: int | None = None) -> None:
    """Make every line of the traced modules a step; with `times_max` only the first so many times that it is reached:
    the tenth block of an object goes the way of the third."""
    times: Counter[tuple[CodeType, int]] = Counter()

    def on_line(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            place = (frame.f_code, frame.f_lineno)
            times[place] += 1
            if times_max is None or times[place] <= times_max:
                fuse.step()
        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> Any:
        return on_line if frame.f_code.co_filename.endswith(_TRACED) else None

    sys.settrace(on_call)


def _tell(writing: int, run: Callable[[Fuse], object]) -> None:
    fuse = Fuse(None)
    run(fuse)
    sys.settrace(None)
    os.write(writing, str(fuse.steps).encode())


def _in_child(run: Callable[[], object]) -> None:
    status = 1
    try:
        run()
        status = 0
    finally:
        os._exit(status)  # no handler of the test's process runs in its copy
