"""The mount table: which store serves a path. Pure: immutable, no I/O.

Mounts may nest ("/data" and "/data/labels"): the longest prefix wins, and inside "/data" the nested mount shows as a
directory. Directories above mount points ("/", "/teams" for "/teams/vision") exist only in the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from orchestra.errors import ConfigError, NotFoundError, OrchestraError
from orchestra.namespace.paths import normalize_path, parent_and_name


class HasPath(Protocol):
    """Anything that is mounted somewhere: a setting, a published mount, an opened one."""

    @property
    def path(self) -> str: ...


Mounted = TypeVar("Mounted", bound=HasPath)


@dataclass(frozen=True, slots=True)
class Location(Generic[Mounted]):
    """Where a path's bytes are: the mount, and the key below its root ("" for the mount point itself)."""

    mount: Mounted
    key: str


class MountTable(Generic[Mounted]):
    """Mounts by path. Raises ConfigError for a mount over a mount or a path that cannot be a mount point."""

    def __init__(self, mounts: Iterable[Mounted]) -> None:
        self._by_path: dict[str, Mounted] = {}
        for mount in mounts:
            check_mount_path(mount.path)
            if mount.path in self._by_path:
                raise ConfigError(f"mount {mount.path}: something is mounted there already; remove one of the two")
            self._by_path[mount.path] = mount
        self._children = _children_of_directories(self._by_path)

    def __iter__(self) -> Iterator[Mounted]:
        return iter(self._by_path.values())

    def __len__(self) -> int:
        return len(self._by_path)

    def get(self, path: str) -> Mounted | None:
        """Return what is mounted exactly at `path`."""
        return self._by_path.get(path)

    def locate(self, path: str) -> Location[Mounted] | None:
        """Return where the normalized `path` lies, or None for a directory above all mounts.

        Raises NotFoundError for a path that no mount covers and that leads to none.
        """
        prefix = path
        while True:
            mount = self._by_path.get(prefix)
            if mount is not None:
                return Location(mount, path[len(prefix) :].removeprefix("/") if prefix != "/" else path[1:])
            if prefix == "/":
                break
            prefix = parent_and_name(prefix)[0]
        if path in self._children:
            return None
        mounts = ", ".join(sorted(self._by_path)) or "none"
        raise NotFoundError(f"no mount covers {path} (mounts: {mounts})")

    def names_below(self, path: str) -> tuple[str, ...]:
        """Return the sorted names of mount points, or of directories that lead to one, directly below `path`."""
        return self._children.get(path, ())


def check_mount_path(path: str) -> None:
    """Raise ConfigError unless `path` can be a mount point: absolute, normalized, without empty components."""
    try:
        normalized = normalize_path(path)
    except OrchestraError as error:
        raise ConfigError(f"mount {path!r}: {error}") from error
    if "//" in path or (normalized != path and path.rstrip("/") != normalized):
        raise ConfigError(f"mount {path!r}: write it with single slashes, as {normalized.replace('//', '/')!r}")
    if normalized != path:
        raise ConfigError(f"mount {path!r}: write it without a trailing slash, as {normalized!r}")


def _children_of_directories(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    names: dict[str, set[str]] = {"/": set()}
    for path in paths:
        while path != "/":
            parent, name = parent_and_name(path)
            names.setdefault(parent, set()).add(name)
            path = parent
    return {directory: tuple(sorted(below)) for directory, below in names.items()}
