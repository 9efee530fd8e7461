"""Dying on purpose: a scenario runs in a forked child that is killed (SIGKILL) at a chosen step, and the parent looks
at what is left.

A step is a call to the disk, or a line of the modules that change the cache directory. Nothing is flushed, closed or
undone: what the kernel had is what remains, as after `kill -9` of a daemon. So a step before which nothing changed on
the disk leaves what the step before it leaves, and need not be died at a second time.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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


class Witness(Fuse):
    """Never kills; notes the steps before which something in one of the `folders` (not below them) is otherwise than
    before the step before: names, inodes, sizes, times, attributes, bytes."""

    def __init__(self, folders: Sequence[Path]) -> None:
        super().__init__(None)
        self._folders = folders
        self._seen: object = None
        self.changes: list[int] = []

    def step(self) -> None:
        """See Fuse."""
        before = self.steps
        super().step()
        if self.steps > before and (found := [_what_is_in(folder) for folder in self._folders]) != self._seen:
            self._seen = found
            self.changes.append(self.steps)


def _what_is_in(folder: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for entry in os.scandir(folder):
        info = entry.stat(follow_symlinks=False)
        attributes = [
            (name, os.getxattr(entry.path, name, follow_symlinks=False))
            for name in os.listxattr(entry.path, follow_symlinks=False)
        ]
        data = Path(entry.path).read_bytes() if entry.is_file(follow_symlinks=False) else b""
        found.append((entry.name, info.st_ino, info.st_mode, info.st_size, info.st_mtime_ns, attributes, data))
    return found


def witnessed(run: Callable[[Fuse], object], folders: Sequence[Path]) -> tuple[int, list[int]]:
    """Run once in a child without dying; return how many steps there are, and before which something changed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _in_child(lambda: _tell(writing, run, Witness(folders)))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = [int(word) for word in pipe.read().split()]
    assert os.waitpid(pid, 0)[1] == 0, "the scenario fails even without a crash"
    return told[0], told[1:]


def die_at(step: int, run: Callable[[Fuse], object]) -> None:
    """Run in a child that dies before that step; fails unless it did."""
    pid = os.fork()
    if not pid:
        _in_child(lambda: run(Fuse(step)))
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"step {step} was not reached: {status}"


def crash_points(run: Callable[[Fuse], object], *, stride: int = 1) -> Iterator[int]:
    """Run the scenario once for each `stride`-th step, dying there; yields after each death."""
    count, _ = witnessed(run, ())
    assert count > 0, "nothing was done, so nothing would be proved"
    for step in range(1, count + 1, stride):
        die_at(step, run)
        yield step


def changing_points(run: Callable[[Fuse], object], folders: Sequence[Path]) -> Iterator[int]:
    """Run the scenario once for each step before which something changed in `folders`, dying there; yields after each
    death."""
    count, changes = witnessed(run, folders)
    assert count > 10, "hardly anything was done, so nothing would be proved"
    for step in changes:
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


def _tell(writing: int, run: Callable[[Fuse], object], fuse: Witness) -> None:
    run(fuse)
    sys.settrace(None)
    with os.fdopen(writing, "w") as pipe:
        print(fuse.steps, *fuse.changes, file=pipe)


def _in_child(run: Callable[[], object]) -> None:
    status = 1
    gc.disable()  # what earlier tests left must not be finalized between two steps: they would be others each time
    try:
        run()
        status = 0
    finally:
        os._exit(status)  # no handler of the test's process runs in its copy
