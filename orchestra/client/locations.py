"""Paths as a training script writes them: `orchestra:///a/b` lies in the namespace, any other on this machine.

Owns: which of the two a path is, and reading either in the same way. Leaves to others: the namespace's bytes (the
client), what the bytes mean (the faces).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from orchestra.client.memory import keep_freed_memory
from orchestra.client.reading import RawFile, in_parallel
from orchestra.client.shared import shared_client
from orchestra.clock import SystemClock
from orchestra.errors import NotADirectoryPathError, NotFoundError

_SCHEME = "orchestra:"
# Two files that took longer than this came from afar (a mount that fetches, NFS): then the rest of a batch is read many
# at a time. A local one takes 20 us, and threads would only cost.
_FAR_NS = 4_000_000
_LOOK_EVERY = 2
_FILE_BUFFER_BYTES = 64 * 1024

_Result = TypeVar("_Result")


def namespace_path(path: str | os.PathLike[str]) -> str | None:
    """Return the absolute path in the namespace that `path` names, None if it names a file of this machine."""
    text = os.fspath(path)
    if not text.startswith(_SCHEME):
        return None
    return "/" + text[len(_SCHEME) :].strip("/")


def open_binary(path: str | os.PathLike[str], config: str | None = None) -> BinaryIO:
    """Open a file for reading, wherever it lies. Raises NotFoundError."""
    inside = namespace_path(path)
    if inside is None:
        return _local(lambda: Path(path).open("rb"), path)
    raw = RawFile(shared_client(config).open(inside))
    return cast("BinaryIO", io.BufferedReader(raw, _FILE_BUFFER_BYTES))


def read_many(paths: Sequence[str], config: str | None = None) -> list[bytes]:
    """Return the contents of many small files, in order; those that must be fetched are fetched at the same time.

    Raises NotFoundError and whatever else the client raises, for the first that fails.
    """
    keep_freed_memory()
    inside = [namespace_path(path) for path in paths]
    named = [path for path in inside if path is not None]
    fetched = iter(shared_client(config).read_many(named) if named else ())
    local = iter(_read_local([path for path, name in zip(paths, inside, strict=True) if name is None]))
    return [next(local) if name is None else next(fetched) for name in inside]


def ready(paths: Sequence[str], config: str | None = None) -> None:
    """Make the process's client if the first of the files lies in the namespace. Nothing is sent. Raises
    ConfigError."""
    if paths and namespace_path(paths[0]) is not None:
        shared_client(config)


def list_folder(path: str | os.PathLike[str], config: str | None = None) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files in a folder, each sorted. Raises NotFoundError and
    NotADirectoryPathError."""
    inside = namespace_path(path)
    if inside is not None:
        view = shared_client(config).list(inside)
        return [entry.name for entry in view if entry.is_directory], [e.name for e in view if not e.is_directory]
    folders: list[str] = []
    files: list[str] = []
    for entry in _local(lambda: list(os.scandir(path)), path):
        (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def _read_local(paths: Sequence[str]) -> list[bytes]:
    clock = SystemClock()
    contents: list[bytes] = []
    for first in range(0, len(paths), _LOOK_EVERY):
        began_ns = clock.now_ns()
        contents += [_read_one(path) for path in paths[first : first + _LOOK_EVERY]]
        if clock.now_ns() - began_ns > _FAR_NS:
            return contents + in_parallel(_read_one, paths[first + _LOOK_EVERY :])
    return contents


def _read_one(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a Path costs as much as the read
            return file.readall()
    except (FileNotFoundError, NotADirectoryError):
        return _local(Path(path).read_bytes, path)


def _local(call: Callable[[], _Result], path: str | os.PathLike[str]) -> _Result:
    try:
        return call()
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file or directory: {os.fspath(path)}") from error
    except NotADirectoryError as error:
        raise NotADirectoryPathError(f"not a directory: {os.fspath(path)}") from error
