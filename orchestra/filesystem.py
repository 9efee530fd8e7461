"""The fsspec face: `orchestra:///imagenet/a.jpg` for pandas, pyarrow, torch and everything else that speaks fsspec.

Owns: fsspec's methods over the client contract, and its file objects. Leaves to others: caching, freshness, versions
and fork safety (client); nothing is kept here: fsspec's own listing cache and block caches are not used. Read-only for
now.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fsspec.callbacks import DEFAULT_CALLBACK, Callback
from fsspec.spec import AbstractFileSystem
from fsspec.utils import isfilelike, stringify_path

from orchestra.client.contract import READ_MANY_AT_ONCE
from orchestra.client.reading import RangeReader, RawFile, in_parallel, read_slice
from orchestra.client.shared import close_shared_clients, shared_client
from orchestra.errors import NotADirectoryPathError, NotFoundError, OrchestraError, ReadOnlyError

if TYPE_CHECKING:
    from orchestra.client.contract import Client, DirectoryView
    from orchestra.values import Entry

_SCHEME = "orchestra://"
# What a small read of an open file fetches from the local disk: 5 us of copying, against 3 us for the call itself.
FILE_BUFFER_SIZE_BYTES = 64 * 1024


class OrchestraFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The node's namespace as an fsspec file system.

    `config` is the path of an `orchestra.toml`; None looks where the command line looks. Instances pickle by that
    option alone, and work in processes made by fork, spawn and forkserver, also when made before the fork.

    Errors are those of `orchestra.errors` (NotFoundError is a FileNotFoundError, and so on). A store that fails raises;
    it is never taken for a missing file. Every method that would write raises ReadOnlyError.
    """

    protocol = "orchestra"
    root_marker = "/"

    def __init__(self, config: str | os.PathLike[str] | None = None, **storage_options: Any) -> None:
        # The client knows better what is fresh than fsspec's listing cache could.
        storage_options.pop("use_listings_cache", None)
        super().__init__(use_listings_cache=False, **storage_options)
        self._config = None if config is None else os.fspath(config)
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The process's client for this configuration, made at first use. Raises ConfigError."""
        if self._client is None:
            self._client = shared_client(self._config)
        return self._client

    @classmethod
    def clear_instance_cache(cls) -> None:
        """Forget fsspec's instances and close their clients, which reconnect if an instance is still in use."""
        super().clear_instance_cache()
        close_shared_clients()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if type(path) is str and path[:1] == "/" and path[-1] != "/":
            return path
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        path = stringify_path(path)
        if not isinstance(path, str):
            raise TypeError(f"path: expected str or os.PathLike, got {type(path).__name__}")
        if path.startswith(_SCHEME):
            path = path[len(_SCHEME) :]
        elif path.startswith("orchestra:"):
            path = path[len("orchestra:") :]
        path = path.rstrip("/")
        return path if path.startswith("/") else "/" + path

    # What is there

    def info(self, path: str, refresh: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Return name, size, type, mtime (seconds) and version; `refresh`: as it is now. Raises NotFoundError."""
        return _info(self.client.stat(self._strip_protocol(path), refresh=refresh))

    def ls(self, path: str, detail: bool = True, refresh: bool = False, **kwargs: Any) -> list[Any]:
        """Return what `path` holds, sorted by name; a file lists itself. `refresh`: as it is now."""
        path = self._strip_protocol(path)
        entries: Iterable[Entry]
        try:
            entries = self.client.list(path, refresh=refresh)
        except NotADirectoryPathError:
            entries = [self.client.stat(path)]
        return [_info(entry) for entry in entries] if detail else [entry.path for entry in entries]

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether something is there. A store that fails raises instead of answering False."""
        return self._entry(path) is not None

    def isdir(self, path: str) -> bool:
        """Whether `path` is a directory."""
        entry = self._entry(path)
        return entry is not None and entry.is_directory

    def isfile(self, path: str) -> bool:
        """Whether `path` is a file."""
        entry = self._entry(path)
        return entry is not None and not entry.is_directory

    def _entry(self, path: str) -> Entry | None:
        try:
            return self.client.stat(self._strip_protocol(path))
        except (NotFoundError, NotADirectoryPathError):
            return None

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """Return the files below `path`, sorted; the directories of one level are listed at the same time."""
        if maxdepth is not None and maxdepth < 1:
            raise ValueError("maxdepth must be at least 1")
        root = self._entry(path)
        found: list[Entry] = [] if root is None or (root.is_directory and not withdirs) else [root]
        level = [root.path] if root is not None and root.is_directory else []
        depth = 0
        while level and (maxdepth is None or depth < maxdepth):
            depth += 1
            entries = [entry for view in self._listings(level) for entry in view]
            found.extend(entry for entry in entries if withdirs or not entry.is_directory)
            level = [entry.path for entry in entries if entry.is_directory]
        found.sort(key=lambda entry: entry.path)
        return {entry.path: _info(entry) for entry in found} if detail else [entry.path for entry in found]

    def _listings(self, paths: Sequence[str]) -> list[Iterable[Entry]]:
        known: list[DirectoryView | None] = [self.client.list_cached(path) for path in paths]
        missing = [path for path, view in zip(paths, known, strict=True) if view is None]
        listed = iter(in_parallel(self._list_or_nothing, missing))
        return [next(listed) if view is None else view for view in known]

    def _list_or_nothing(self, path: str) -> Iterable[Entry]:
        try:
            return self.client.list(path)
        except (NotFoundError, NotADirectoryPathError):
            return []  # removed since its parent was listed

    def sizes(self, paths: Sequence[str]) -> list[int]:
        """Return the size of each file in bytes, unknown ones asked for at the same time."""
        return in_parallel(self.size, paths)

    def modified(self, path: str) -> datetime:
        """Return when the object was last written, in UTC."""
        return datetime.fromtimestamp(self.client.stat(self._strip_protocol(path)).mtime_ns / 1e9, UTC)

    def created(self, path: str) -> datetime:
        """Return when the object was written: objects are replaced whole, so this is `modified`."""
        return self.modified(path)

    def ukey(self, path: str) -> str:
        """Return a text that differs for every version of every file."""
        entry = self.client.stat(self._strip_protocol(path))
        return f"{entry.path}\0{entry.version}"

    def checksum(self, path: str) -> int:
        """Return a number that differs for every version of every file."""
        import xxhash

        return int(xxhash.xxh3_128_intdigest(self.ukey(path).encode("utf-8", "surrogateescape")))

    # Reading

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Return the bytes [start, end) of a file as a slice would: negative numbers count from its end."""
        path = self._strip_protocol(path)
        if start is None and end is None:
            return self.client.read_file(path)
        handle = self.client.open(path)
        try:
            return read_slice(handle, start, end)
        finally:
            handle.close()

    def cat(self, path: Any, recursive: bool = False, on_error: str = "raise", **kwargs: Any) -> Any:
        """Return a file's bytes, or {path: bytes} for a list, a pattern or `recursive`; missing ones fetched at once.

        `on_error`: "raise", "omit" (leave the file out) or "return" (the error stands in place of the bytes).
        `batch_size`: how many are fetched at the same time, as in fsspec's asynchronous file systems.
        """
        if on_error not in ("raise", "omit", "return"):
            raise ValueError(f'on_error: expected "raise", "omit" or "return", got {on_error!r}')
        if isinstance(path, (str, os.PathLike)) and not recursive:
            stripped = self._strip_protocol(path)
            if not any(magic in stripped for magic in "*?["):
                return self.cat_file(stripped, **kwargs)
        paths = self.expand_path(path, recursive=recursive)
        if recursive or not isinstance(path, list):
            paths = [one for one in paths if not self.isdir(one)]
        at_once = kwargs.pop("batch_size", None) or READ_MANY_AT_ONCE
        if on_error == "raise" and not kwargs:
            return dict(zip(paths, self.client.read_many(paths, at_once=at_once), strict=True))
        results = in_parallel(lambda one: self._cat_or_error(one, on_error, kwargs), paths)
        pairs = zip(paths, results, strict=True)
        return {one: data for one, data in pairs if on_error != "omit" or not isinstance(data, OrchestraError)}

    def _cat_or_error(self, path: str, on_error: str, kwargs: dict[str, Any]) -> bytes | OrchestraError:
        try:
            return self.cat_file(path, **kwargs)
        except OrchestraError as error:
            if on_error == "raise":
                raise
            return error

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        """Return the bytes of each range; what is cached at once, what is missing fetched at the same time.

        `max_gap` is accepted and not needed: the node reads whole blocks. With `on_error="return"` an error stands in
        place of the bytes.
        """
        if not isinstance(paths, list):
            raise TypeError(f"paths: expected a list, got {type(paths).__name__}")
        starts = starts if isinstance(starts, list) else [starts] * len(paths)
        ends = ends if isinstance(ends, list) else [ends] * len(paths)
        if not len(paths) == len(starts) == len(ends):
            raise ValueError(f"{len(paths)} paths, {len(starts)} starts and {len(ends)} ends: as many are needed")
        reader = RangeReader(self.client, on_error)
        try:
            return reader.read([self._strip_protocol(path) for path in paths], starts, ends)
        finally:
            reader.close()

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> OrchestraFile:
        if mode in ("rb", "r"):
            return OrchestraFile(self, path)
        if set(mode) <= set("rwxabt+") and set(mode) & set("wxa+"):
            _refuse(path)
        raise ValueError(f"mode: expected 'rb', got {mode!r}")

    def get_file(
        self, rpath: str, lpath: Any, callback: Callback = DEFAULT_CALLBACK, outfile: Any = None, **kwargs: Any
    ) -> None:
        """Copy a file to the local `lpath`, whole or not at all; a directory becomes an empty local one.

        `lpath` may be a file object open for writing, too.
        """
        from orchestra.client.export import export_file, read_pieces

        entry = self.client.stat(self._strip_protocol(rpath))
        outfile = lpath if isfilelike(lpath) else outfile
        if entry.is_directory and outfile is None:
            Path(lpath).mkdir(parents=True, exist_ok=True)
            return
        callback.set_size(entry.size_bytes)
        if outfile is None:
            Path(lpath).parent.mkdir(parents=True, exist_ok=True)
            export_file(self.client, entry, lpath, callback.relative_update)
            return
        handle = self.client.open(entry.path, entry=entry)
        try:
            for piece in read_pieces(handle):
                outfile.write(piece)
                callback.relative_update(len(piece))
        finally:
            handle.close()

    def get(
        self,
        rpath: Any,
        lpath: Any,
        recursive: bool = False,
        callback: Callback = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Copy files to local ones by fsspec's rules for names, several at a time."""
        plan = _GetPlan(self)
        AbstractFileSystem.get(plan, rpath, lpath, recursive=recursive, maxdepth=maxdepth)

        def copy(pair: tuple[str, Any]) -> None:
            with callback.branched(*pair) as child:
                self.get_file(*pair, callback=child, **kwargs)
            callback.relative_update(1)

        callback.set_size(len(plan.copies))
        in_parallel(copy, plan.copies)

    # Writing comes with a later version: each way to write is refused by name, before anything is looked up.

    def mkdir(self, path: Any, create_parents: bool = True, **kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path)

    def makedirs(self, path: Any, exist_ok: bool = False) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path)

    def rmdir(self, path: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path)

    def rm_file(self, path: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path)

    _rm = rm_file

    def touch(self, path: Any, truncate: bool = True, **kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path)

    def pipe(self, path: Any, value: Any = None, **kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path)

    def pipe_file(self, path: Any, value: Any, mode: str = "overwrite", **kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path)

    def put(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(rpath)

    def put_file(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(rpath)

    def copy(self, path1: Any, path2: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path2)

    def cp_file(self, path1: Any, path2: Any, **kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path2)

    def mv(self, path1: Any, path2: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ReadOnlyError."""
        _refuse(path1)


class OrchestraFile(io.BufferedReader):
    """One version of one file, open for reading; pickles by path and position, and then opens what is there now.

    Small reads are buffered; a large `readinto` goes from the node's disk straight into the caller's memory.
    """

    def __init__(self, fs: OrchestraFileSystem, path: str) -> None:
        handle = fs.client.open(path)
        super().__init__(RawFile(handle), FILE_BUFFER_SIZE_BYTES)
        self.fs = fs
        self.path = path
        self.size = handle.entry.size_bytes
        self._entry = handle.entry

    @property
    def full_name(self) -> str:
        """The file's URL."""
        return _SCHEME + self.path

    def info(self) -> dict[str, Any]:
        """Return what `fs.info` said of the version that is open."""
        return _info(self._entry)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.fs, self.path, self.tell()))


def _reopen(fs: OrchestraFileSystem, path: str, position: int) -> OrchestraFile:
    file = OrchestraFile(fs, path)
    file.seek(position)
    return file


class _GetPlan:
    """Stands in for the file system in fsspec's own `get`, and writes down what that would copy."""

    def __init__(self, fs: OrchestraFileSystem) -> None:
        self._fs = fs
        self.copies: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def get_file(self, rpath: str, lpath: Any, **kwargs: Any) -> None:
        """Note one copy."""
        self.copies.append((rpath, lpath))


def _info(entry: Entry) -> dict[str, Any]:
    """Return what fsspec's `info` says; mtime in seconds."""
    return {
        "name": entry.path,
        "size": entry.size_bytes,
        "type": "directory" if entry.is_directory else "file",
        "mtime": entry.mtime_ns / 1e9,
        "version": entry.version,
    }


def _refuse(path: Any) -> NoReturn:
    paths = list(path) if isinstance(path, (list, tuple, dict)) else [path]
    shown = OrchestraFileSystem._strip_protocol(paths[0]) if paths else "the namespace"
    raise ReadOnlyError(f"cannot write {shown}: orchestra reads this namespace, and cannot write to it yet")
