"""The client of this node: answers from the cache directory, and asks the daemon for the rest.

Owns: the steps path -> version -> file for any process. Leaves to others: the daemon's side (engine), starting it
(process), the wire (wire).

What it holds belongs to one process: a forked child notices its pid and begins anew.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout
from orchestra.blocks.reader import LocalObject
from orchestra.client.asking import answer_timeout_s, with_daemon
from orchestra.client.changes import NodeChanges
from orchestra.client.contract import READ_MANY_AT_ONCE
from orchestra.client.directory import NodeDirectory, directory_at, entry_at
from orchestra.client.handle import NodeHandle
from orchestra.client.many import read_many
from orchestra.client.memory import keep_freed_memory
from orchestra.client.small import SmallReads
from orchestra.client.stream import MissStream
from orchestra.client.wire import ConnectionLostError, DaemonConnection, entry_from_wire, range_to_wire
from orchestra.clock import Clock, SystemClock, boot_id
from orchestra.config import Config
from orchestra.errors import (
    CacheDirectoryError,
    ConfigError,
    DaemonUnavailableError,
    IsADirectoryPathError,
    NotADirectoryPathError,
    NotFoundError,
)
from orchestra.metadata.reader import Known, MetadataReader
from orchestra.metadata.records import Record, RecordEntry
from orchestra.namespace.mounts import Location, MountTable
from orchestra.namespace.paths import normalize_path
from orchestra.namespace.published import PublishedMount, PublishedNamespace, fingerprint, read_namespace
from orchestra.observe.access_ring import AccessRing
from orchestra.values import Entry, EntryKind, ObjectId

# How long the published namespace is taken to be what it was: a mount that is added or removed by another process is
# seen that much later, and a read saves four calls of stat(2).
_NAMESPACE_RECHECK_NS = 5_000_000
# Above all mounts only `mount add` changes anything; a minute is soon enough to see it.
_TABLE_FRESHNESS_S = 60.0
_FRESHNESS_STEPS = 64

T = TypeVar("T")


class _Namespace:
    """What is published, in the form that look-ups use; replaced whole when the file changes."""

    __slots__ = ("geometry", "identity", "published", "table")

    def __init__(self, published: PublishedNamespace, identity: tuple[int, int]) -> None:
        self.published = published
        self.identity = identity
        self.table: MountTable[PublishedMount] = MountTable(published.mounts)
        self.geometry = Geometry(published.block_size_bytes, published.extent_size_bytes)


class NodeClient:
    """See `orchestra.client.contract.Client`."""

    def __init__(self, config: Config, *, clock: Clock | None = None) -> None:
        self.config = config
        self._clock = clock or SystemClock()
        self._layout = CacheLayout(config.cache.dir)
        self._boot_id = boot_id()
        self._fingerprint = fingerprint(config.mounts)
        self._messages_before = 0
        self._begin()

    def _begin(self) -> None:
        """Make what belongs to this process."""
        self._pid = os.getpid()
        self._namespace: _Namespace | None = None
        self._namespace_path = str(self._layout.namespace)
        self._checked_ns = -_NAMESPACE_RECHECK_NS
        self._connection = DaemonConnection(str(self._layout.socket), timeout_s=answer_timeout_s(self.config))
        self._metadata = MetadataReader(
            self._layout.listing_file, self._layout.attr_file, clock=self._clock, boot_id=self._boot_id
        )
        self._ring: AccessRing | None = None
        self._ring_lock = threading.Lock()

    # -- metadata --------------------------------------------------------------------------------------------------

    def stat(self, path: str, *, refresh: bool = False) -> Entry:
        """See Client."""
        path = normalize_path(path)
        if not refresh:
            entry = self.stat_cached(path)
            if entry is not None:
                return entry
        location = self._locate(path)
        if location is None or not location.key or self._table().names_below(path):
            return directory_at(path)
        answer = self.daemon_request("POST", "/v1/stat", {"path": path, "refresh": refresh})
        return entry_from_wire(path, answer)

    def stat_cached(self, path: str) -> Entry | None:
        """See Client."""
        path = normalize_path(path)
        table = self._table()
        found = self._known(table, _located(table, path), path)
        return found[0] if found is not None else None

    def stat_timed(self, path: str) -> tuple[Entry, float] | None:
        """See Client."""
        path = normalize_path(path)
        table = self._table()
        location = _located(table, path)
        found = self._known(table, location, path)
        if found is None:
            return None
        entry, age_s = found
        if entry.is_directory or location is None or age_s is None or not 0 < location.mount.freshness_s < math.inf:
            return entry, self.freshness_s(path)
        return entry, _left_s(location.mount.freshness_s, age_s)

    def _known(
        self, table: MountTable[PublishedMount], location: Location[PublishedMount] | None, path: str
    ) -> tuple[Entry, float | None] | None:
        """What fresh records say of `path`, and the age in seconds of the record (None: it has none, or cannot be
        told)."""
        if location is None or not location.key or table.names_below(path):
            return directory_at(path), None
        mount = location.mount
        found = self._metadata.lookup_aged(mount.store_id, location.key, mount.freshness_s)
        if found is None:
            return None
        return entry_at(path, _existing(found[0], path)), found[1]

    def list(self, path: str, *, refresh: bool = False) -> NodeDirectory:
        """See Client."""
        path = normalize_path(path)
        if not refresh:
            view = self.list_cached(path)
            if view is not None:
                return view
        location = self._locate(path)
        if location is None:
            return NodeDirectory(path, None, self._table().names_below(path))
        self.daemon_request("POST", "/v1/list", {"path": path, "refresh": refresh})
        record = self._metadata.any_listing(location.mount.store_id, _prefix(location))
        if record is None:
            raise DaemonUnavailableError(f"the daemon listed {path} but its listing cannot be read")
        return self._directory(path, record)

    def list_cached(self, path: str) -> NodeDirectory | None:
        """See Client."""
        path = normalize_path(path)
        location = self._locate(path)
        if location is None:
            return NodeDirectory(path, None, self._table().names_below(path))
        mount = location.mount
        record = self._metadata.listing(mount.store_id, _prefix(location), mount.freshness_s)
        if record is None:
            return None
        if not len(record) and location.key and not self._table().names_below(path):
            # Nothing lies below: a file, nothing at all, or an empty directory. What is known of the key says which.
            known = self._metadata.lookup(mount.store_id, location.key, mount.freshness_s)
            if known is None:
                return None
            if _existing(known, path).kind is not EntryKind.DIRECTORY:
                raise NotADirectoryPathError(f"not a directory: {path}")
        return self._directory(path, record)

    def freshness_s(self, path: str) -> float:
        """See Client."""
        location = self._locate(normalize_path(path))
        if location is None:
            return _TABLE_FRESHNESS_S
        mount = location.mount
        if not 0 < mount.freshness_s < math.inf:
            return mount.freshness_s
        # As a name in its parent, and as a directory with a listing of its own: the older of the two counts.
        keys = {location.key, _prefix(location)}
        ages = [self._metadata.age_s(mount.store_id, key, mount.freshness_s) for key in keys]
        known = [age for age in ages if age is not None]
        if not known:  # a mount point is there because the table says so
            return mount.freshness_s if not location.key or self._table().names_below(path) else 0.0
        return _left_s(mount.freshness_s, max(known))

    def _directory(self, path: str, record: Record) -> NodeDirectory:
        return NodeDirectory(path, record, self._table().names_below(path))

    # -- data ------------------------------------------------------------------------------------------------------

    def open(self, path: str, *, entry: Entry | None = None) -> NodeHandle:
        """See Client."""
        path = normalize_path(path)
        table = self._table()
        location = _located(table, path)
        if entry is None:
            known = self._known(table, location, path)
            entry = known[0] if known is not None else self.stat(path)
        if entry.kind is EntryKind.DIRECTORY or location is None or not location.key:
            raise IsADirectoryPathError(f"is a directory: {path}")
        digest = ObjectId(location.mount.store_id, location.key, entry.version).digest()
        return NodeHandle(self, entry, digest, self._local(digest, entry.size_bytes))

    def read_small_into(self, entry: Entry, buffer: memoryview) -> int | None:
        """See Client."""
        return self._small_reads().read_into(entry, buffer)

    def read_file(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Client."""
        keep_freed_memory()
        if not start and stop is None:
            data = self._small_reads().read(path)
            if data is not None:
                return data
        handle = self.open(path)
        try:
            size = handle.entry.size_bytes
            return handle.read(start, max(0, (size if stop is None else min(stop, size)) - start))
        finally:
            handle.close()

    def read_many(self, paths: Sequence[str], *, at_once: int = READ_MANY_AT_ONCE) -> Sequence[bytes]:
        """See Client."""
        return read_many(self, paths, at_once, self._small_reads().read)

    def _small_reads(self) -> SmallReads:
        current = self._current()
        return SmallReads(
            current.table,
            self._metadata,
            self._layout,
            current.geometry,
            boot_id=self._boot_id,
            note_hit=self._access_ring().hit,
        )

    def cached_bytes(self, entry: Entry) -> int:
        """Return how many bytes of that version are on this node's disk."""
        if entry.kind is EntryKind.DIRECTORY or not entry.size_bytes:
            return 0
        local = self._local(self._object_id(entry).digest(), entry.size_bytes)
        try:
            return local.cached_bytes()
        finally:
            local.close()

    def store_of(self, path: str) -> str:
        """Return the store that `path` lies in, "" above all mounts. Sends nothing."""
        location = self._locate(normalize_path(path))
        return "" if location is None else location.mount.store_id

    def usage(self) -> tuple[int, int]:
        """Return (bytes that the cache holds, bytes it may hold) as the daemon says; starts none."""
        status = self.daemon_request("GET", "/v1/status", start=False)
        return status["used_bytes"], status["capacity_bytes"]

    @property
    def geometry(self) -> Geometry:
        """How objects are cut."""
        return self._current().geometry

    def ensure(self, entry: Entry, digest: str, start: int, stop: int, *, ahead_stop: int, suspect: bool) -> bool:
        """Have the daemon make [start, stop) of the object present; True if it is, False if there is no room for it.

        It goes on to fetch up to `ahead_stop` without being waited for. `suspect`: a checksum did not match.
        """
        body = range_to_wire(entry, digest, start, stop)
        body["ahead_stop"] = ahead_stop
        if suspect:
            body["suspect"] = True
        return bool(self.daemon_request("POST", "/v1/ensure", body)["kept"])

    def read_through(self, entry: Entry, digest: str, offset: int, view: memoryview) -> int:
        """Have the daemon send the bytes: when they cannot be kept, or not be read here."""
        body = range_to_wire(entry, digest, offset, offset + len(view))
        return self._with_daemon(lambda connection: connection.read_into("/v1/read", body, view))

    def miss_stream(self) -> MissStream | None:
        """See Client."""
        if self._pid != os.getpid():
            self._after_fork()
        try:
            return MissStream(self._connection.open_socket(), self._connection.count_message)
        except ConnectionLostError:
            return None

    def changes(self, position: int | None = None) -> NodeChanges | None:
        """See Client."""
        try:
            return NodeChanges(self._table, str(self._layout.changes), position)
        except OSError:
            return None  # no daemon has begun a log, or it is another user's

    def note_hit(self, digest: bytes, first_block: int, block_count: int, size_bytes: int) -> None:
        """Count a read from this node's disk."""
        self._access_ring().hit(digest, first_block, block_count, size_bytes)

    def note_miss(self, digest: bytes, first_block: int, block_count: int, size_bytes: int) -> None:
        """Count a read that had to ask the daemon."""
        self._access_ring().miss(digest, first_block, block_count, size_bytes)

    def _object_id(self, entry: Entry) -> ObjectId:
        location = self._locate(normalize_path(entry.path))
        if location is None or not location.key:
            raise IsADirectoryPathError(f"is a directory: {entry.path}")
        return ObjectId(location.mount.store_id, location.key, entry.version)

    def _local(self, digest: str, size_bytes: int) -> LocalObject:
        current = self._current()
        return LocalObject(
            self._layout,
            current.geometry,
            digest,
            size_bytes,
            boot_id=self._boot_id,
            verify_always=current.published.verify == "always",
        )

    # -- the published namespace -----------------------------------------------------------------------------------

    def _locate(self, path: str) -> Location[PublishedMount] | None:
        return _located(self._table(), path)

    def _table(self) -> MountTable[PublishedMount]:
        return self._current().table

    def _current(self) -> _Namespace:
        """The namespace as published now; starts the daemon if none was published for this configuration."""
        if self._pid != os.getpid():
            self._after_fork()
        namespace = self._namespace
        now_ns = self._clock.now_ns()
        if namespace is not None and now_ns - self._checked_ns < _NAMESPACE_RECHECK_NS:
            return namespace
        self._checked_ns = now_ns
        try:
            info = os.stat(self._namespace_path)
            identity = (info.st_ino, info.st_mtime_ns)
        except OSError:
            identity = (0, 0)
        if namespace is not None and namespace.identity == identity:
            return namespace
        published = read_namespace(self._layout.namespace)
        if published is None or published.fingerprint != self._fingerprint:
            published = self._have_it_published(published)
            info = os.stat(self._layout.namespace)
            identity = (info.st_ino, info.st_mtime_ns)
        elif namespace is None and any(mount.error for mount in published.mounts):
            published = self._published_by_the_living(published)
        namespace = _Namespace(published, identity)
        self._namespace = namespace
        return namespace

    def _published_by_the_living(self, found: PublishedNamespace) -> PublishedNamespace:
        """A mount cannot be used, says a daemon that may be gone: one that starts now may have what that one lacked,
        such as a variable that was set since. Asked once a process, at its first look."""
        try:
            return self._have_it_published(found)
        except (DaemonUnavailableError, CacheDirectoryError):
            return found  # the other mounts' cached files are read without a daemon

    def _have_it_published(self, found: PublishedNamespace | None) -> PublishedNamespace:
        # A daemon that starts now publishes its own configuration; one that runs reads its file again.
        self.daemon_request("POST", "/v1/reload", {})
        published = read_namespace(self._layout.namespace)
        if published is None:
            raise DaemonUnavailableError(f"the daemon published no namespace in {self._layout.namespace}")
        if published.fingerprint != self._fingerprint:
            ours = self.config.source or "the defaults"
            raise ConfigError(
                f"the daemon of cache.dir {self._layout.root} runs with {published.source or 'the defaults'}, this "
                f"process with {ours}, and their mounts differ: run orchestra daemon stop, or use another cache.dir"
            )
        return published

    # -- the daemon ------------------------------------------------------------------------------------------------

    @property
    def messages_sent(self) -> int:
        """See Client."""
        return self._connection.messages_sent

    def daemon_request(
        self, method: str, route: str, body: dict[str, Any] | None = None, *, start: bool = True
    ) -> dict[str, Any]:
        """Send a request to the daemon, starting one if none runs (unless `start` is False or it is configured off).

        Raises what the daemon answers, or DaemonUnavailableError.
        """
        answer = self._with_daemon(lambda connection: connection.request(method, route, body), start=start)
        self._checked_ns = -_NAMESPACE_RECHECK_NS  # what we asked for may have changed the namespace
        return answer

    def _with_daemon(self, call: Callable[[DaemonConnection], T], *, start: bool = True) -> T:
        if self._pid != os.getpid():
            self._after_fork()
        return with_daemon(self.config, self._connection, call, start=start)

    def close(self) -> None:
        """See Client."""
        if self._pid == os.getpid():
            self._connection.close()
            if self._ring is not None:
                self._ring.abandon()
                self._ring = None

    def _access_ring(self) -> AccessRing:
        if self._pid != os.getpid():
            self._after_fork()
        ring = self._ring
        if ring is None:
            with self._ring_lock:
                ring = self._ring
                if ring is None:
                    ring = self._ring = AccessRing(str(self._layout.accesses))
        return ring

    def _after_fork(self) -> None:
        """Leave everything to the parent and begin anew. Its ring is let go of so that its lock is not held by us."""
        if self._ring is not None:
            self._ring.abandon()
        self._connection.close()
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]


def _located(table: MountTable[PublishedMount], path: str) -> Location[PublishedMount] | None:
    """Where the normalized path lies; raises the error of a mount that cannot be used."""
    location = table.locate(path)
    if location is not None and location.mount.error:
        raise ConfigError(f"mount {location.mount.path}: {location.mount.error}")
    return location


def _prefix(location: Location[PublishedMount]) -> str:
    return f"{location.key}/" if location.key else ""


def _left_s(freshness_s: float, age_s: float) -> float:
    """How long something of that age may be believed; in steps, so that callers who keep something per value keep
    little."""
    step_s = freshness_s / _FRESHNESS_STEPS
    return max(0.0, (freshness_s - age_s) // step_s * step_s)


def _existing(known: Known, path: str) -> RecordEntry:
    if known.entry is None:
        raise NotFoundError(f"no such file or directory: {path}")
    return known.entry
