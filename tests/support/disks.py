"""A real disk with a say before every call: where a test crashes, fails or looks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from orchestra.blocks.disk import Buffer, LocalDisk


class HookedDisk(LocalDisk):
    """Calls `before(operation, number)` first; numbers count from 1. What it raises, the call raises."""

    def __init__(self, before: Callable[[str, int], None] = lambda operation, number: None) -> None:
        self.before = before
        self.calls: list[str] = []

    def _note(self, operation: str) -> None:
        self.calls.append(operation)
        self.before(operation, len(self.calls))

    def create(self, path: str) -> int:
        self._note("create")
        return super().create(path)

    def write_at(self, fd: int, data: Buffer, offset: int) -> None:
        self._note("write_at")
        super().write_at(fd, data, offset)

    def set_length(self, fd: int, length: int) -> None:
        self._note("set_length")
        super().set_length(fd, length)

    def set_attribute(self, fd: int, name: str, value: bytes) -> None:
        self._note("set_attribute")
        super().set_attribute(fd, name, value)

    def close(self, fd: int) -> None:
        try:
            self._note("close")
        finally:
            super().close(fd)  # as the kernel does, also when close(2) fails

    def rename(self, source: str, target: str) -> None:
        self._note("rename")
        super().rename(source, target)

    def unlink(self, path: str) -> None:
        self._note("unlink")
        super().unlink(path)


def failing(operation: str, error: int, *, at: int = 1, times: int = 1_000_000) -> HookedDisk:
    """A disk on which the `at`-th call of that operation, and as many after it as `times` says, fail with `error`."""
    seen = [0]

    def before(name: str, _: int) -> None:
        if name == operation:
            seen[0] += 1
            if at <= seen[0] < at + times:
                raise OSError(error, os.strerror(error))

    return HookedDisk(before)


def without_attributes() -> HookedDisk:
    """A disk whose file system has no extended attributes."""
    return failing("set_attribute", errno.ENOTSUP)
