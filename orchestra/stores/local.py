"""A folder of this machine (or NFS, Lustre ...): plain files, read with pread.

Owns: names that stay below the root, versions by size and time, pages of a directory. Leaves to others: retries.

Calls that may wait for a disk or a server run in threads of the store's own: asyncio's default has six on a small
machine, and a hung NFS server would hold them all. A cancelled call leaves its thread to finish in the background.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from orchestra.errors import (
    AccessDeniedError,
    NotFoundError,
    OrchestraError,
    StaleObjectError,
    StoreError,
    StoreUnavailableError,
)
from orchestra.stores.contract import ListPage
from orchestra.stores.pages import PAGE_KEYS_MAX, PagedListing
from orchestra.stores.translate import Operation, as_stale, changed
from orchestra.values import ByteRange, ObjectInfo, weak_version

Answer = TypeVar("Answer")

# As many as a disk array or NFS mount has use for; a read beyond it waits its turn.
THREADS_MAX = 32
# As many as Linux follows.
_LINKS_MAX = 40
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO})
_DENIED = frozenset({errno.EACCES, errno.EPERM})
_STALE = frozenset({errno.ESTALE})


class LocalStore:
    """The files below `root`, an absolute folder.

    The version is size and mtime in nanoseconds. The inode is left out: nodes that mount one NFS or FUSE folder may
    see different numbers, and would then cache the same file once each. A symbolic link is followed as long as it
    stays below the root; one that leads out is refused, and a listing leaves it out, as it does links to a folder
    that contains them.
    """

    def __init__(self, root: str, *, threads_max: int = THREADS_MAX) -> None:
        self._root = root if root.endswith("/") else root + "/"
        self._label = f"file://{self._root}"
        self._threads = ThreadPoolExecutor(threads_max, thread_name_prefix="orchestra-local")

    @property
    def store_id(self) -> str:
        return self._label

    async def head(self, key: str) -> ObjectInfo:
        return await self._run(self._head, key, Operation("look up", key, self._label))

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> bytes:
        return await self._run(self._read, info, byte_range, Operation("read", info.key, self._label))

    def list_directory(self, prefix: str) -> PagedListing[Iterator[os.DirEntry[str]]]:
        operation = Operation("list", prefix, self._label)
        scans: list[Any] = []

        async def fetch_page(
            scan: Iterator[os.DirEntry[str]] | None,
        ) -> tuple[ListPage, Iterator[os.DirEntry[str]] | None]:
            if scan is not None:
                return await self._run(self._page, scan, prefix, operation)
            scan = await self._run(self._scan, prefix, operation)
            scans.append(scan)
            page, following = await self._run(self._page, scan, prefix, operation)
            if prefix and hasattr(scan, "close") and not (page.objects or page.prefixes):
                # An empty folder is there: said as object stores do, by an object of the prefix's own name.
                page = ListPage((ObjectInfo(prefix, 0, 0, weak_version(0, 0)),), ())
            return page, following

        def close() -> None:
            for scan in scans:
                getattr(scan, "close", int)()

        return PagedListing(fetch_page, close)

    async def probe(self) -> None:
        await self._run(self._probe, Operation("reach", "", self._label))

    async def close(self) -> None:
        # Not waited for: a thread may hang in a dead NFS mount, and the caller must not.
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Callable[..., Answer], *arguments: Any) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    # Below: in a thread.

    def _probe(self, operation: Operation) -> None:
        try:
            mode = os.stat(self._root).st_mode
            if not stat.S_ISDIR(mode):
                raise NotFoundError(operation.failed("it is a file, not a folder"))
            os.scandir(self._root).close()
        except OrchestraError:  # ours are OSErrors too
            raise
        except OSError as error:
            is_file = os.path.isfile(self._root.rstrip("/"))
            missing = "it is a file: mount the folder that holds it" if is_file else "no such folder"
            raise _translated(error, operation, missing=missing) from error

    def _not_found(self, error: OSError, operation: Operation) -> OrchestraError:
        """Return the error for something below the root that the system would not give, which says nothing of it if the
        root itself is gone: a file system that was unmounted is not an empty one."""
        failure = _translated(error, operation)
        if isinstance(failure, NotFoundError) and not os.path.isdir(self._root):
            return StoreError(operation.failed("the folder itself is gone: was its file system unmounted?"))
        return failure

    def _path(self, key: str, operation: Operation) -> str:
        segments = key.removesuffix("/").split("/")
        if "\0" in key or any(segment in ("", ".", "..") for segment in segments):
            raise NotFoundError(operation.failed("no such file"))  # no file can have this name
        return self._root + key

    def _open(self, key: str, operation: Operation) -> int:
        """Return a descriptor of a regular file that lies below the root, whatever links led to it."""
        if key.endswith("/"):
            raise NotFoundError(operation.failed("no such file"))
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        self._path(key, operation)
        try:
            path = self._resolved(key, operation)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        except OrchestraError:  # ours are OSErrors too
            raise
        except OSError as error:
            raise self._not_found(error, operation) from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise NotFoundError(operation.failed("not a regular file"))
            self._check_inside(os.readlink(f"/proc/self/fd/{descriptor}"), operation)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_inside(self, real_path: str, operation: Operation) -> None:
        if not (real_path + "/").startswith(self._real_root()):
            raise AccessDeniedError(operation.failed("a symbolic link leads out of the folder: refused"))

    def _real_root(self) -> str:
        return os.path.realpath(self._root).rstrip("/") + "/"

    def _resolved(self, key: str, operation: Operation) -> str:
        """Return the path that `key` leads to, link by link, without touching what lies outside the root: a link may
        lead into a mount of this very daemon, where even a look would wait for ourselves.

        Raises AccessDeniedError for a way out, OSError as stat would.
        """
        root = self._real_root().rstrip("/")
        here, links = root, 0
        ahead = key.split("/")[::-1]
        while ahead:
            name = ahead.pop()
            if name in ("", "."):
                continue
            if name == "..":
                here = here.rpartition("/")[0]
                self._check_inside(here, operation)
                continue
            try:
                target = os.readlink(f"{here}/{name}")
            except OSError as error:
                if error.errno != errno.EINVAL:  # EINVAL: no link
                    raise
                here = f"{here}/{name}"
                continue
            links += 1
            if links > _LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if target.startswith("/"):
                target = os.path.normpath(target)
                given = self._root.rstrip("/")
                inside = given if f"{target}/".startswith(f"{given}/") else root
                self._check_inside(root + target[len(inside) :] if target.startswith(inside) else target, operation)
                here, target = root, target[len(inside) :]
            ahead += target.split("/")[::-1]
        return here

    def _head(self, key: str, operation: Operation) -> ObjectInfo:
        try:
            self._path(key, operation)
            result = os.stat(self._resolved(key, operation), follow_symlinks=False)
            if not stat.S_ISREG(result.st_mode) or key.endswith("/"):
                raise NotFoundError(operation.failed("not a regular file"))
        except OrchestraError:  # ours are OSErrors too
            raise
        except OSError as error:
            raise self._not_found(error, operation) from error
        return _info(key, result)

    def _read(self, info: ObjectInfo, byte_range: ByteRange, operation: Operation) -> bytes:
        try:
            descriptor = self._open(info.key, operation)
        except NotFoundError as error:
            raise as_stale(error, operation) from error
        try:
            # Looked at before and after: bytes read between two looks at the same version are of that version.
            _check_version(descriptor, info, operation)
            data = _pread_all(descriptor, byte_range)
            _check_version(descriptor, info, operation)
        except OrchestraError:  # ours are OSErrors too
            raise
        except OSError as error:
            raise _translated(error, operation) from error
        finally:
            os.close(descriptor)
        if len(data) != byte_range.length:
            raise StoreUnavailableError(operation.failed(f"got {len(data)} of {byte_range.length} bytes"))
        return data

    def _scan(self, prefix: str, operation: Operation) -> Iterator[os.DirEntry[str]]:
        if prefix and ("\0" in prefix or any(part in ("", ".", "..") for part in prefix[:-1].split("/"))):
            return iter(())
        try:
            return os.scandir(self._resolved(prefix, operation) if prefix else self._root)
        except OrchestraError:
            raise
        except OSError as error:
            failure = self._not_found(error, operation)
            if isinstance(failure, NotFoundError):
                return iter(())  # a prefix that holds nothing
            raise failure from error

    def _page(
        self, scan: Iterator[os.DirEntry[str]], prefix: str, operation: Operation
    ) -> tuple[ListPage, Iterator[os.DirEntry[str]] | None]:
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        try:
            entries = list(islice(scan, PAGE_KEYS_MAX))
            for entry in entries:
                self._add(entry, prefix, objects, prefixes)
        except OSError as error:
            failure = _translated(error, operation)
            if isinstance(failure, StoreUnavailableError):
                # Not worth a retry: where the scan stood is lost, and asking again would leave names out.
                failure = StoreError(failure.message)
            raise failure from error
        page = ListPage(tuple(objects), tuple(prefixes))
        return page, scan if len(entries) == PAGE_KEYS_MAX else None

    def _add(self, entry: os.DirEntry[str], prefix: str, objects: list[ObjectInfo], prefixes: list[str]) -> None:
        key = prefix + entry.name
        if entry.is_symlink() and not self._may_follow(key):
            return
        try:
            result = entry.stat()
        except OSError as error:
            if error.errno in _MISSING:  # removed meanwhile, a link to nothing or to itself
                return
            raise
        if stat.S_ISDIR(result.st_mode):
            prefixes.append(key + "/")
        elif stat.S_ISREG(result.st_mode):
            objects.append(_info(key, result))

    def _may_follow(self, key: str) -> bool:
        """Whether a link stays below the root and does not lead to a folder on the way to it (a loop)."""
        try:
            real = self._resolved(key, Operation("look up", key, self._label)) + "/"
        except OSError:  # leads out (AccessDeniedError is one), to nothing, or to itself
            return False
        on_the_way = [self._root + key[:at] for at, character in enumerate(key) if character == "/"] + [self._root]
        return all(os.path.realpath(folder) + "/" != real for folder in on_the_way)


def _info(key: str, result: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, result.st_size, result.st_mtime_ns, weak_version(result.st_size, result.st_mtime_ns))


def _check_version(descriptor: int, info: ObjectInfo, operation: Operation) -> None:
    now = _info(info.key, os.fstat(descriptor)).version
    if now != info.version:
        raise changed(operation, was=info.version, now=now)


def _pread_all(descriptor: int, byte_range: ByteRange) -> bytes:
    data = os.pread(descriptor, byte_range.length, byte_range.start)
    while data and len(data) < byte_range.length:  # Linux stops at 2 GiB, NFS servers may stop earlier
        more = os.pread(descriptor, byte_range.length - len(data), byte_range.start + len(data))
        if not more:
            break
        data += more
    return data


def _translated(error: OSError, operation: Operation, *, missing: str = "no such file") -> OrchestraError:
    if error.errno in _MISSING:
        return NotFoundError(operation.failed(missing))
    if error.errno in _DENIED:
        return AccessDeniedError(operation.failed("permission denied: check the folder's owner and mode"))
    if error.errno in _STALE:
        return StaleObjectError(operation.failed("the server says that the file is stale"))
    return StoreUnavailableError(operation.failed(os.strerror(error.errno or errno.EIO)))
