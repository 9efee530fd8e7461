"""Where things lie in the cache directory, and whether a directory may be one.

    orchestra-cache.json   marker: format, geometry; without it a non-empty directory is refused
    daemon.lock            held by the one daemon that owns the directory
    namespace.json         the published mount table (see client)
    changes                what was found to be otherwise than published (see observe/change_log)
    extents/ab/<digest>             a small object, sealed
    extents/ab/<digest>.<n>.ext     extent n of a larger object;  .map beside it
    listings/ab/<hash>  attrs/ab/<hash>      see metadata
    accesses/<pid>-<random>         access rings of readers (see observe)
    jobs/<n>.json          loads, and what the next daemon needs to go on with them (see daemon/jobs)
    tmp/                   unfinished files, emptied at start (and finished ones, put in their places then: scan)
    index.sqlite3          the daemon's accounts; losing it loses no bytes

Names are hashes: nothing that a store calls a key ever becomes a path here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import xxhash

from orchestra.blocks.geometry import Geometry
from orchestra.errors import CacheDirectoryError

log = logging.getLogger(__name__)

MARKER = "orchestra-cache.json"
CACHE_FORMAT = 1
# Of files in tmp/ that were in their places, and are to go: they may be damaged, or freed, and are never put back.
REMOVED_SUFFIX = ".removed"
_FOLDERS = ("extents", "listings", "attrs", "accesses", "jobs", "tmp")
# sockaddr_un.sun_path is 108 bytes with its NUL.
SOCKET_PATH_LIMIT_BYTES = 107
# What the accounts count by: the digest of a small object, or digest and number of an extent.
_EXTENT_NAME = re.compile(r"[0-9a-f]{32}(\.(0|[1-9][0-9]{0,8}))?", re.ASCII)


def is_extent_name(name: str) -> bool:
    """Whether `name` can be that of a small object or an extent; anything else in extents/ is not ours."""
    return _EXTENT_NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Paths below one cache directory."""

    root: Path
    prefix: str = ""  # `root` as text: these paths are made on every read, and a Path costs 5 us to print

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", str(self.root))

    @property
    def lock(self) -> Path:
        return self.root / "daemon.lock"

    @property
    def namespace(self) -> Path:
        return self.root / "namespace.json"

    @property
    def changes(self) -> Path:
        return self.root / "changes"

    @property
    def added_mounts(self) -> Path:
        return self.root / "mounts.json"

    @property
    def accesses(self) -> Path:
        return self.root / "accesses"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def index(self) -> Path:
        return self.root / "index.sqlite3"

    @property
    def log(self) -> Path:
        return self.root / "daemon.log"

    @property
    def socket(self) -> Path:
        """The daemon's unix socket; in the system's temporary folder if the cache directory's path is too long."""
        path = self.root / "daemon.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT_BYTES:
            return path
        name = xxhash.xxh3_64_hexdigest(os.fsencode(self.root))
        return Path(tempfile.gettempdir()) / f"orchestra-{os.getuid()}" / f"{name}.sock"

    @property
    def guest_socket(self) -> Path:
        """The socket for other users: beside the directory, which is closed to them."""
        return self.root.with_name(f"{self.root.name}.sock")

    def small_file(self, digest: str) -> str:
        """Path of a small object's file."""
        return f"{self.prefix}/extents/{digest[:2]}/{digest}"

    def extent_file(self, digest: str, extent_index: int) -> str:
        """Path of an extent's bytes."""
        return f"{self.prefix}/extents/{digest[:2]}/{digest}.{extent_index}.ext"

    def map_file(self, digest: str, extent_index: int) -> str:
        """Path of an extent's presence map."""
        return f"{self.prefix}/extents/{digest[:2]}/{digest}.{extent_index}.map"

    def listing_file(self, name: str) -> str:
        """Path of a directory's listing."""
        return f"{self.prefix}/listings/{name[:2]}/{name}"

    def attr_file(self, name: str) -> str:
        """Path of the record of one key."""
        return f"{self.prefix}/attrs/{name[:2]}/{name}"


def prepare(root: Path, geometry: Geometry) -> tuple[CacheLayout, Geometry]:
    """Make `root` a cache directory, or accept one; return its layout and the geometry it was made with.

    Raises CacheDirectoryError in one sentence: relative, not a directory, parent missing, not writable, writable by
    others or owned by another user, not empty and not ours, made by a newer orchestra.
    """
    if not root.is_absolute():
        raise CacheDirectoryError(f"cache.dir {root} is not absolute")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CacheDirectoryError(f"cache.dir {root} is a file, not a directory") from error
    except NotADirectoryError as error:
        raise CacheDirectoryError(f"cache.dir {root}: a parent is a file") from error
    except OSError as error:
        raise CacheDirectoryError(f"cache.dir {root} cannot be made: {error.strerror}") from error
    check_owner(root)
    _check_place(root)
    geometry = _read_or_write_marker(root, geometry)
    try:
        for folder in _FOLDERS:
            (root / folder).mkdir(mode=0o700, exist_ok=True)
        for folder in ("extents", "listings", "attrs"):
            missing = {f"{number:02x}" for number in range(256)} - set(os.listdir(root / folder))
            for name in missing:
                (root / folder / name).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CacheDirectoryError(f"cache.dir {root} is not writable: {error.strerror}") from error
    return CacheLayout(root), geometry


def check_owner(root: Path) -> None:
    """Raise CacheDirectoryError if others could plant bytes in `root`."""
    info = root.stat()
    if info.st_uid != os.getuid():
        raise CacheDirectoryError(
            f"refusing cache directory {root}: it belongs to uid {info.st_uid}, not {os.getuid()}"
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheDirectoryError(f"refusing cache directory {root}: writable by others; run: chmod 700 {root}")


def _check_place(root: Path) -> None:
    """Raise CacheDirectoryError if others could put another directory in the place of `root`, or if what it is to cache
    lies under it."""
    link = root.lstat()
    if stat.S_ISLNK(link.st_mode) and root.parent.stat().st_mode & stat.S_IWOTH and link.st_uid != os.getuid():
        raise CacheDirectoryError(f"refusing cache directory {root}: a link in a folder that others may write to")
    device = root.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[2] == number and fields[fields.index("-") + 1] == "fuse.orchestra":
            raise CacheDirectoryError(
                f"cache.dir {root} lies inside orchestra's own mount {fields[4]}: use a local disk"
            )


def read_geometry(root: Path) -> Geometry | None:
    """Return the geometry of an existing cache directory, None if there is none yet.

    Raises CacheDirectoryError if the marker is damaged or of another format.
    """
    try:
        raw = json.loads((root / MARKER).read_bytes())
        made_by = raw["format"]
        if made_by == CACHE_FORMAT:
            return Geometry(int(raw["block_size_bytes"]), int(raw["extent_size_bytes"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheDirectoryError(f"{root / MARKER} is damaged; empty the directory {root} to start afresh") from error
    raise CacheDirectoryError(
        f"cache {root} has format {made_by}, this orchestra reads {CACHE_FORMAT}: use another cache.dir"
    )


def _read_or_write_marker(root: Path, geometry: Geometry) -> Geometry:
    marker = root / MARKER
    existing = read_geometry(root)
    if existing is not None:
        return existing
    temporary = marker.with_suffix(".tmp")  # may be left by a crash between the next two steps
    if any(path != temporary for path in root.iterdir()):
        raise CacheDirectoryError(
            f"{root} is not empty and holds no {MARKER}: not an orchestra cache; use another cache.dir"
        )
    text = {
        "format": CACHE_FORMAT,
        "block_size_bytes": geometry.block_size_bytes,
        "extent_size_bytes": geometry.extent_size_bytes,
    }
    try:
        temporary.write_text(json.dumps(text))
        temporary.rename(marker)
    except OSError as error:
        raise CacheDirectoryError(f"cache.dir {root} is not writable: {error.strerror}") from error
    return geometry


def empty_tmp(layout: CacheLayout) -> int:
    """Remove what an earlier daemon left unfinished; return how many files.

    A folder stays: the cache makes none there, so it was put where a file of ours should be, and moved out of the way.
    """
    count = 0
    for entry in os.scandir(layout.tmp):
        try:
            os.unlink(entry.path)
            count += 1
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s is not ours and stays: %s", entry.path, error.strerror)
    return count
