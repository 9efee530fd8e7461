"""A cgroup with a limit of memory, version 2 or 1, for tests; what is not there or not ours to make skips the test."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One group; processes that `command` starts, and theirs, are in it."""

    folder: Path
    is_v2: bool

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command that joins the group and becomes `words`."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *words]

    def peak_bytes(self) -> int:
        """The most that was ever used, page cache included."""
        return int((self.folder / ("memory.peak" if self.is_v2 else "memory.max_usage_in_bytes")).read_text())

    def limit_hits(self) -> int:
        """How often something had to be given back because the limit was reached."""
        if self.is_v2:
            return self._table("memory.events")["max"]
        return int((self.folder / "memory.failcnt").read_text())

    def kills(self) -> int:
        """How many processes were killed for want of memory."""
        return self._table("memory.events" if self.is_v2 else "memory.oom_control")["oom_kill"]

    def processes(self) -> set[int]:
        """Who is in it."""
        return {int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()}

    def anonymous_bytes(self) -> int:
        """What processes hold that no file backs."""
        return self._table("memory.stat")["anon" if self.is_v2 else "rss"]

    def _table(self, name: str) -> dict[str, int]:
        lines = (line.split() for line in (self.folder / name).read_text().splitlines())
        return {words[0]: int(words[1]) for words in lines}


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A group that holds at most that much; its processes must have ended when the block does."""
    is_v2 = (_ROOT / "cgroup.controllers").exists()
    ours = {line.split(":")[1]: line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    parent = Path(f"{_ROOT}{ours['']}" if is_v2 else f"{_ROOT}/memory{ours.get('memory', '/')}")
    folder = parent / f"orchestra-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(limit_bytes))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield MemoryGroup(folder, is_v2)
    finally:
        folder.rmdir()
