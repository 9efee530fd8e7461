"""Any fsspec file system as an under store: memory, HDFS, SFTP, SMB, hf, WebDAV ... and the rest.

Owns: one contract over what fsspec implementations differ in (async or not, names of times and checksums, errors).
Leaves to others: conditional reads, which fsspec does not have: the version is looked up again after each read.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import fsspec

from orchestra.errors import (
    AccessDeniedError,
    ConfigError,
    NotFoundError,
    OrchestraError,
    StaleObjectError,
    StoreError,
    StoreUnavailableError,
)
from orchestra.stores.contract import Buffer, ListPage
from orchestra.stores.options import literal
from orchestra.stores.pages import PagedListing, cut_into_pages, listing_that_arrives_whole
from orchestra.stores.translate import Operation, as_stale, changed, one_line, unavailable
from orchestra.stores.uri import StoreUri
from orchestra.values import ByteRange, ObjectInfo, weak_version

# Blocking clients hold a thread for each call; more than these seldom find more than one connection behind them.
THREADS_MAX = 16
# What implementations call the thing that changes with the bytes, and the time, in order of trust.
_VERSION_NAMES = ("ETag", "etag", "e_tag", "generation", "sha", "blob_id", "checksum", "md5", "content_hash")
_TIME_NAMES = (
    "mtime",
    "LastModified",
    "last_modified",
    "modified",
    "updated",
    "modificationTime",
    "modify",
    "time_modified",
    "created",
)
# Options that say which store it is, and hold no secret: part of the store's id.
_PLACE_NAMES = (
    "host",
    "port",
    "endpoint_url",
    "account_name",
    "namenode",
    "org",
    "repo",
    "sha",
    "ref",
    "share",
    "path",
)
_UNAVAILABLE = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EAGAIN,
        errno.EIO,
    }
)


class FsspecStore:
    """The files of an fsspec file system below `root` ("" or ending with "/", as the file system spells it).

    Without an ETag or the like a version is size and time; without a time a change that keeps the size goes unseen.
    """

    def __init__(self, fs: Any, *, root: str, store_id: str, threads_max: int = THREADS_MAX) -> None:
        self._fs = fs
        self._root = root
        self._store_id = store_id
        self._is_async = bool(getattr(fs, "async_impl", False) and getattr(fs, "asynchronous", False))
        self._threads = None if self._is_async else ThreadPoolExecutor(threads_max, thread_name_prefix="orchestra-fs")

    @property
    def store_id(self) -> str:
        return self._store_id

    async def head(self, key: str) -> ObjectInfo:
        return await self._head(key, Operation("look up", key, self._store_id))

    async def _head(self, key: str, operation: Operation) -> ObjectInfo:
        if not _is_file_key(key):
            raise NotFoundError(operation.failed("no such file"))
        found = await self._call(operation, "info", self._root + key)
        if found.get("type") == "directory":
            raise NotFoundError(operation.failed("it is a folder"))
        return info_of(key, found, operation)

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> Buffer:
        operation = Operation("read", info.key, self._store_id)
        path = self._root + info.key
        try:
            data: bytes = await self._call(operation, "cat_file", path, start=byte_range.start, end=byte_range.stop)
            now = await self._head(info.key, operation)
        except NotFoundError as error:
            raise as_stale(error, operation) from error
        if now.version != info.version:
            raise changed(operation, was=info.version, now=now.version)
        if len(data) != byte_range.length:
            raise unavailable(operation, f"got {len(data)} of {byte_range.length} bytes")
        return data

    def list_directory(self, prefix: str) -> PagedListing[int]:
        return listing_that_arrives_whole(lambda: self._list_whole(prefix))

    async def _list_whole(self, prefix: str) -> list[ListPage]:
        operation = Operation("list", prefix, self._store_id)
        if prefix and not _is_file_key(prefix[:-1]):
            return cut_into_pages((), ())
        try:
            found = await self._call(operation, "ls", (self._root + prefix).rstrip("/") or self._root, detail=True)
        except NotFoundError:
            return cut_into_pages((), ())
        objects: dict[str, ObjectInfo] = {}
        folders: dict[str, None] = {}
        for item in found:
            key = self._child(str(item["name"]), prefix)
            if key is None:
                continue
            if item.get("type") == "directory":
                folders[key + "/"] = None
            elif item.get("size") is None:  # a listing without sizes: one request a file is all that is left
                objects[key] = await self._head(key, operation)
            else:
                objects[key] = info_of(key, item, operation)
        return cut_into_pages(objects.values(), folders)

    def _child(self, name: str, prefix: str) -> str | None:
        """Return the key of a listed name, None for what is not directly below `prefix`."""
        root = self._fs._strip_protocol(self._root).strip("/")
        path = name.removeprefix("/") if name.startswith("/") else str(self._fs._strip_protocol(name)).lstrip("/")
        if path.endswith("/"):
            path = path[:-1]
        if root:
            if not path.startswith(root + "/"):
                return None
            path = path[len(root) + 1 :]
        below = path.removeprefix(prefix) if path.startswith(prefix) else ""
        return path if below and _is_file_key(below) and "/" not in below else None

    async def probe(self) -> None:
        operation = Operation("reach", self._root, self._store_id)
        try:
            await self._call(operation, "ls", self._root.rstrip("/") or self._root, detail=False)
        except NotFoundError as error:
            if self._fs.protocol in ("memory", ("memory",)):  # its folders exist by what they hold
                return
            raise NotFoundError(operation.failed("no such folder or bucket")) from error

    async def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        session = getattr(self._fs, "_session", None)
        close = getattr(session, "close", None)
        if self._is_async and close is not None:
            closing = close()
            if inspect.isawaitable(closing):
                await closing

    async def _call(self, operation: Operation, method: str, *arguments: Any, **named: Any) -> Any:
        try:
            if self._is_async:
                return await getattr(self._fs, f"_{method}")(*arguments, **named)
            call = partial(getattr(self._fs, method), *arguments, **named)
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except OrchestraError:
            raise
        except Exception as error:  # the border to code of anybody: all of it is translated and raised
            raise translated(error, operation) from error


def _is_file_key(key: str) -> bool:
    return "\0" not in key and not any(segment in ("", ".", "..") for segment in key.split("/"))


def info_of(key: str, found: Mapping[str, Any], operation: Operation) -> ObjectInfo:
    """Return what an fsspec info dict says in our words."""
    size = found.get("size")
    if size is None:
        raise StoreError(operation.failed("the file system does not know its size"))
    mtime_ns = next((_nanoseconds(found[name]) for name in _TIME_NAMES if found.get(name) is not None), 0)
    version = next((str(found[name]) for name in _VERSION_NAMES if found.get(name)), "")
    return ObjectInfo(key, int(size), mtime_ns, version or weak_version(int(size), mtime_ns))


def _nanoseconds(value: Any) -> int:
    """Return a time in any form that fsspec implementations use; 0 for an unreadable one."""
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, str):
        value = _seconds_of_text(value)
    if isinstance(value, (int, float)):
        seconds = value / 1000 if value > 1e11 else value  # WebHDFS counts milliseconds
        # Through microseconds: the same time as datetime and as float must give one number.
        return round(seconds * 1e6) * 1000
    return 0


def _seconds_of_text(text: str) -> float:
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            found = parse(text)
        except (ValueError, TypeError):
            continue
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    return 0.0


def translated(error: Exception, operation: Operation) -> OrchestraError:
    """Return our error for whatever an implementation raised."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return NotFoundError(operation.failed("no such file"))
    if isinstance(error, PermissionError):
        return AccessDeniedError(operation.failed("the store refused the request: check the mount's credentials"))
    if isinstance(error, IsADirectoryError):
        return NotFoundError(operation.failed("it is a folder"))
    if isinstance(error, OSError) and error.errno == errno.ESTALE:
        return StaleObjectError(operation.failed("the server says that the file is stale"))
    reason = f"{type(error).__name__}: {one_line(str(error))}"
    passing = isinstance(error, (ConnectionError, TimeoutError)) or (
        isinstance(error, OSError) and (error.errno is None or error.errno in _UNAVAILABLE)
    )
    if passing:
        return StoreUnavailableError(operation.failed(reason))
    return StoreError(operation.failed(reason))


def open_fsspec(uri: StoreUri, text: str, options: Mapping[str, str]) -> FsspecStore:
    """Return the store of an fsspec protocol; ConfigError if its package is missing or refuses the options."""
    try:
        kind = fsspec.get_filesystem_class(uri.scheme)
        named = {**kind._get_kwargs_from_urls(text), **{name: literal(name, value) for name, value in options.items()}}
        named.pop("client", None)
        root = str(kind._strip_protocol(text))
        if getattr(kind, "async_impl", False):
            named["asynchronous"] = True
        fs = kind(**named, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise ConfigError(f"{uri.scheme}: {one_line(str(error))} (a Python package that this store needs)") from error
    except Exception as error:  # the border to code of anybody: all of it is translated and raised
        raise ConfigError(f"{uri.scheme}: the store cannot be opened: {one_line(str(error))}") from error
    place = "&".join(f"{name}={named[name]}" for name in _PLACE_NAMES if named.get(name))
    shown = f"{uri.scheme}://{uri.authority}/{uri.root}" + (f"?{place}" if place else "")
    return FsspecStore(fs, root=root.rstrip("/") + "/", store_id=shown)
