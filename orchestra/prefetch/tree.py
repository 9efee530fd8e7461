"""Walks over trees of the namespace in pages of files, without ever holding all of their paths.

Owns: the order (folders first to last, each before what lies below it), listing ahead of the walk, what is skipped and
what is a failure. Leaves to others: asking the stores (engine), what is done with the files (loading, plans).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from orchestra.engine.engine import Engine, Wanted
from orchestra.engine.mounted import OpenedMount
from orchestra.errors import OrchestraError
from orchestra.metadata.records import Record, RecordEntry
from orchestra.namespace.paths import join, normalize_path
from orchestra.values import ByteRange, EntryKind, ObjectInfo

# Files handed on at once: some 200 kB of values, and the loop is given back after each page.
PAGE_FILES = 512
# Folders that are listed at the same time: a tree of a hundred files a folder at 50 ms a LIST would otherwise be walked
# at 2,000 files a second. Reading such a LIST takes 3 ms, so with 32 the walk is bound by that, and no longer by how
# long they take. Their records are columns of about 90 bytes a file.
_LISTINGS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class TreeFile:
    """One file: its path, and the whole of its current version."""

    path: str
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Page:
    """Some files of one folder, or the reason why a path could not be looked at."""

    files: tuple[TreeFile, ...] = ()
    path: str = ""
    error: OrchestraError | None = None


async def walk(
    engine: Engine, path: str, *, refresh: bool = False, without: Collection[str] = ()
) -> AsyncGenerator[Page, None]:
    """Yield the files at and below `path`, but for what lies in the folders `without`; `refresh` asks the stores what
    there is now.

    Raises what looking at `path` itself raises (NotFoundError for a path that is not there). What fails below it is
    yielded as a page with an error, and the walk goes on.
    """
    path = normalize_path(path)
    entry = await engine.stat(path, refresh=refresh and not _is_immutable(engine, path))
    if entry.kind is EntryKind.FILE:
        yield Page((file_at(engine, path, entry),))
        return
    ahead = _Listings(engine, path, refresh=refresh, without=without)
    try:
        while (folder := await ahead.next()) is not None:
            where, listed = folder
            if isinstance(listed, OrchestraError):
                if where == path:
                    raise listed
                yield Page(path=where, error=listed)
                continue
            for files in _pages(engine, where, listed):
                yield Page(files)
                await asyncio.sleep(0)
    finally:
        await ahead.close()


async def walk_paths(engine: Engine, paths: Iterable[str], *, refresh: bool = False) -> AsyncGenerator[Page, None]:
    """Yield the files that `paths` name, in order, and those below folders among them; `paths` is read bit by bit.

    Whatever is named more than once, by itself or by a folder around it, comes once: else it would count twice in what
    there is to do, and seem to need the room of two.
    """
    seen: set[bytes] = set()
    waiting = iter(paths)
    while batch := [path for _, path in zip(range(PAGE_FILES), waiting, strict=False)]:
        async with aclosing(_looked_up(engine, dict.fromkeys(batch), refresh=refresh)) as pages:
            async for page in pages:
                if page.error is not None and not _is_new(page.path, seen):
                    continue
                yield replace(page, files=tuple(file for file in page.files if _is_new(file.path, seen)))


async def _looked_up(engine: Engine, paths: Iterable[str], *, refresh: bool) -> AsyncGenerator[Page, None]:
    looked = await asyncio.gather(*(_look_up(engine, path, refresh=refresh) for path in paths))
    yield Page(tuple(one for one in looked if isinstance(one, TreeFile)))
    for one in looked:
        if isinstance(one, Page):
            yield one
        elif isinstance(one, str):
            async with aclosing(walk(engine, one, refresh=refresh)) as pages:
                async for page in pages:
                    yield page


def _is_new(path: str, seen: set[bytes]) -> bool:
    """Whether `path` was not asked about yet: 16 bytes stand for it, some 80 in all, where a path takes 150."""
    mark = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    is_new = mark not in seen
    seen.add(mark)
    return is_new


async def _look_up(engine: Engine, path: str, *, refresh: bool) -> TreeFile | Page | str:
    """The file at `path`; its path again if it is a folder; a page with the error otherwise."""
    try:
        path = normalize_path(path)
        entry = await engine.stat(path, refresh=refresh and not _is_immutable(engine, path))
        return file_at(engine, path, entry) if entry.kind is EntryKind.FILE else path
    except OrchestraError as error:
        return Page(path=path, error=error)


def file_at(engine: Engine, path: str, entry: RecordEntry) -> TreeFile:
    """Return the file at the normalized `path`, as `entry` describes it."""
    return TreeFile(path, engine.want(path, entry.version, entry.size_bytes, ByteRange(0, entry.size_bytes)))


def _is_immutable(engine: Engine, path: str) -> bool:
    location = engine.mounts.locate(path)
    return location is not None and location.mount.freshness_s == float("inf")


def _pages(engine: Engine, folder: str, record: Record | None) -> Iterator[tuple[TreeFile, ...]]:
    """The files directly in `folder`; what a nested mount hides is left out."""
    location = engine.mounts.locate(folder)
    if record is None or location is None:
        return
    hidden = set(engine.mounts.names_below(folder))
    mount, prefix = location.mount, f"{location.key}/" if location.key else ""
    files: list[TreeFile] = []
    for row in record:
        if row.kind is EntryKind.FILE:
            name = row.name.decode("utf-8", "surrogateescape")
            if name not in hidden:
                files.append(_file(folder, name, mount, prefix, row))
        if len(files) == PAGE_FILES:
            yield tuple(files)
            files = []
    if files:
        yield tuple(files)


def _file(folder: str, name: str, mount: OpenedMount, prefix: str, row: RecordEntry) -> TreeFile:
    info = ObjectInfo(prefix + name, row.size_bytes, row.mtime_ns, row.version)
    return TreeFile(join(folder, name), Wanted(mount, info, ByteRange(0, row.size_bytes)))


def _folders_below(engine: Engine, folder: str, record: Record | None) -> Iterator[str]:
    mounted = engine.mounts.names_below(folder)
    yield from (join(folder, name) for name in mounted)
    for raw_name in record.directories() if record is not None else ():
        name = raw_name.decode("utf-8", "surrogateescape")
        if name not in mounted:
            yield join(folder, name)


Listed = Record | OrchestraError | None
_Asked = tuple[str, "asyncio.Task[Listed]"]


class _Listings:
    """Folders in the order of the walk, listed some ahead of it. Folders not asked for yet are iterators, not lists."""

    def __init__(self, engine: Engine, path: str, *, refresh: bool, without: Collection[str]) -> None:
        self._engine = engine
        self._refresh = refresh
        self._without = without
        self._nodes: deque[_Asked | Iterator[str]] = deque([iter((path,))])

    async def next(self) -> tuple[str, Listed] | None:
        """Return the next folder and its record (None above all mounts) or the error of listing it; None at the end."""
        self._ask_ahead()
        if not self._nodes:
            return None
        node = self._nodes.popleft()
        assert isinstance(node, tuple), "what comes first has been asked for"
        path, task = node
        listed = await task
        if not isinstance(listed, OrchestraError):
            below = _folders_below(self._engine, path, listed)
            self._nodes.appendleft(one for one in below if one not in self._without)
        return path, listed

    async def close(self) -> None:
        """Stop asking."""
        tasks = [node[1] for node in self._nodes if isinstance(node, tuple)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ask_ahead(self) -> None:
        """Ask for the next folders, those first that the walk comes to first."""
        nodes: deque[_Asked | Iterator[str]] = deque()
        asked = sum(isinstance(node, tuple) for node in self._nodes)
        for node in self._nodes:
            if isinstance(node, tuple):
                nodes.append(node)
                continue
            path: str | None = ""
            while not nodes or asked < _LISTINGS_AT_ONCE:
                path = next(node, None)
                if path is None:
                    break
                nodes.append((path, asyncio.create_task(self._list(path))))
                asked += 1
            if path is not None:
                nodes.append(node)
        self._nodes = nodes

    async def _list(self, path: str) -> Listed:
        try:
            refresh = self._refresh and not _is_immutable(self._engine, path)
            return await self._engine.list_directory(path, refresh=refresh)
        except OrchestraError as error:
            return error
