"""The process that reads, so that what reading costs is measured apart from everything else.

Takes one JSON object a line on standard input, {"method", "setup", "work"}, and answers one line: seconds, its own CPU
seconds, files, bytes and, when asked to check, the CRC-32 of each object. Started by contestants.py, which says how.

Owns: the reading loops, the same for every contestant of a kind. Leaves to others: what is read, and who serves it.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEP_BYTES = 1 << 20
RANGE_BYTES = 4 << 20


@dataclass(slots=True)
class Work:
    """What is to be read: `names` one after the other or `concurrency` at a time; `whole`: each in one call, else in
    steps; `ranges`: one object in parallel ranges."""

    names: list[str]
    size: int
    concurrency: int = 1
    ranges: bool = False
    check: bool = False


@dataclass(slots=True)
class Outcome:
    """What was read."""

    byte_count: int = 0
    crcs: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, pieces: Iterator[memoryview | bytes], check: bool) -> None:
        """Count an object's pieces, and check them if asked to."""
        crc = 0
        for piece in pieces:
            self.byte_count += len(piece)
            if check:
                crc = zlib.crc32(piece, crc)
        if check:
            self.crcs[name] = crc


def file_pieces(path: str, size: int, buffer: memoryview) -> Iterator[memoryview]:
    """Open a file and yield what read(2) gives, as `cp` or `PIL` would."""
    fd = os.open(path, os.O_RDONLY)
    try:
        left = size
        while left > 0:
            count = os.readv(fd, [buffer[: min(left, len(buffer))]])
            if count == 0:
                return
            left -= count
            yield buffer[:count]
    finally:
        os.close(fd)


def pread_range(path: str, start: int, stop: int) -> bytes:
    """Return bytes of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, stop - start, start)
    finally:
        os.close(fd)


class FolderReader:
    """Reads files below a folder with the plain system calls."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.buffer = memoryview(bytearray(STEP_BYTES))

    def read(self, work: Work) -> Outcome:
        """Do the work."""
        outcome = Outcome()
        if work.concurrency == 1:
            for name in work.names:
                outcome.add(name, file_pieces(f"{self.folder}/{name}", work.size, self.buffer), work.check)
            return outcome
        with ThreadPoolExecutor(work.concurrency) as pool:
            if work.ranges:
                path = f"{self.folder}/{work.names[0]}"
                spans = ((at, min(at + RANGE_BYTES, work.size)) for at in range(0, work.size, RANGE_BYTES))
                parts = pool.map(lambda span: pread_range(path, *span), spans)
                outcome.add(work.names[0], parts, work.check)
                return outcome
            contents = pool.map(lambda name: (name, Path(self.folder, name).read_bytes()), work.names)
            for name, content in contents:
                outcome.add(name, iter([content]), work.check)
        return outcome


class FsspecReader:
    """Reads through an fsspec file system; `whole` by cat_file, else as a file."""

    def __init__(self, protocol: str, options: dict[str, Any], prefix: str, by_file: bool) -> None:
        import fsspec

        self.filesystem = fsspec.filesystem(protocol, **options)
        self.prefix = prefix
        self.by_file = by_file

    def whole(self, name: str) -> bytes:
        """Return an object's bytes in one call."""
        if not self.by_file:
            return bytes(self.filesystem.cat_file(self.prefix + name))
        with self.filesystem.open(self.prefix + name, "rb") as file:
            return bytes(file.read())

    def steps(self, name: str) -> Iterator[bytes]:
        """Yield an object's bytes as a program reads a file."""
        with self.filesystem.open(self.prefix + name, "rb") as file:
            while piece := file.read(STEP_BYTES):
                yield piece

    def read(self, work: Work) -> Outcome:
        """Do the work."""
        outcome = Outcome()
        if work.concurrency == 1:
            for name in work.names:
                pieces = self.steps(name) if work.size > RANGE_BYTES else iter([self.whole(name)])
                outcome.add(name, pieces, work.check)
        elif work.ranges:
            spans = ((at, min(at + RANGE_BYTES, work.size)) for at in range(0, work.size, RANGE_BYTES))
            path = self.prefix + work.names[0]
            with ThreadPoolExecutor(work.concurrency) as pool:
                parts = pool.map(lambda span: self.filesystem.cat_file(path, start=span[0], end=span[1]), spans)
                outcome.add(work.names[0], parts, work.check)
        elif self.by_file:
            with ThreadPoolExecutor(work.concurrency) as pool:
                for name, content in zip(work.names, pool.map(self.whole, work.names), strict=True):
                    outcome.add(name, iter([content]), work.check)
        else:
            found = self.filesystem.cat([self.prefix + name for name in work.names], batch_size=work.concurrency)
            by_name = {path.split("://")[-1].lstrip("/"): content for path, content in found.items()}
            for name in work.names:
                content = by_name[(self.prefix + name).split("://")[-1].lstrip("/")]
                outcome.add(name, iter([content]), work.check)
        return outcome


class ObstoreReader:
    """Reads with the bare store client, as many requests at a time as the work says."""

    def __init__(self, url: str, bucket: str) -> None:
        from obstore.store import S3Store

        self.store = S3Store(
            bucket,
            endpoint=url,
            access_key_id="bench",
            secret_access_key="bench",
            region="us-east-1",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def read(self, work: Work) -> Outcome:
        """Do the work."""
        return asyncio.run(self._read(work))

    async def _read(self, work: Work) -> Outcome:
        import obstore

        outcome = Outcome()
        if work.ranges or work.size > RANGE_BYTES:
            name = work.names[0]
            spans = [(at, min(at + RANGE_BYTES, work.size)) for at in range(0, work.size, RANGE_BYTES)]
            parts: dict[int, Any] = {}

            async def fetch_range(span: tuple[int, int]) -> None:
                parts[span[0]] = await obstore.get_range_async(self.store, name, start=span[0], end=span[1])

            await for_each(spans, fetch_range, work.concurrency)
            outcome.add(name, (memoryview(parts[span[0]]) for span in spans), work.check)
            return outcome

        async def fetch(name: str) -> None:
            answer = await obstore.get_async(self.store, name)
            outcome.add(name, iter([memoryview(await answer.bytes_async())]), work.check)

        await for_each(work.names, fetch, work.concurrency)
        return outcome


async def for_each(items: Any, action: Callable[[Any], Awaitable[None]], concurrency: int) -> None:
    """Run `action` on every item, `concurrency` at a time."""
    waiting = iter(items)

    async def run() -> None:
        for item in waiting:
            await action(item)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(run())


READERS: dict[str, Callable[..., Any]] = {"folder": FolderReader, "fsspec": FsspecReader, "obstore": ObstoreReader}


def main() -> None:
    """Answer until standard input ends."""
    reader = None
    for line in sys.stdin:
        request = json.loads(line)
        if reader is None:
            reader = READERS[request["method"]](**request["setup"])
        work = Work(**request["work"])
        before = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        outcome = reader.read(work)
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF)
        answer = {
            "seconds": seconds,
            "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "files": len(work.names),
            "byte_count": outcome.byte_count,
            "crcs": outcome.crcs,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
