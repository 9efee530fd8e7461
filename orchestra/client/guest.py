"""The client of another user than the cache's owner: everything goes by the owner's daemon.

Owns: asking over the daemon's socket for other users (daemon/guests.py), and only reading. Leaves to others: the wire,
handles (NodeHandle: nothing is ever on this disk for it, so every byte is sent).
"""

from __future__ import annotations

import json
import pwd
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.reader import LocalObject
from orchestra.client.asking import answer_timeout_s
from orchestra.client.contract import READ_MANY_AT_ONCE
from orchestra.client.directory import NodeDirectory
from orchestra.client.handle import NodeHandle
from orchestra.client.node import NodeClient
from orchestra.client.process import foreign_owner
from orchestra.client.reading import in_parallel
from orchestra.client.wire import ConnectionLostError, DaemonConnection, entry_from_wire
from orchestra.clock import Clock
from orchestra.config import Config
from orchestra.errors import DaemonUnavailableError, IsADirectoryPathError, OrchestraError
from orchestra.metadata.records import Record
from orchestra.namespace.paths import normalize_path
from orchestra.values import Entry, EntryKind

_HEAD = struct.Struct("<II")  # as in daemon/api/guests.py: bytes of the mount points' names, bytes of the record
# A daemon that was stopped and started again: the first try finds the old one's connection dead.
_TRIES_MAX = 2

T = TypeVar("T")


class _NothingHere(LocalObject):
    """An object of which no byte can be read here."""

    __slots__ = ()

    def _file(self, index: int) -> None:
        return None


class GuestClient(NodeClient):
    """See `orchestra.client.contract.Client`. Nothing is known here without asking, and no read is a hit; the daemon
    answers from its cache."""

    def __init__(self, config: Config, *, clock: Clock | None = None) -> None:
        """The nodes of a cluster are the daemon's to talk to."""
        super().__init__(replace(config, cluster=None), clock=clock)

    def _begin(self) -> None:
        super()._begin()
        owner = foreign_owner(self.config.cache.dir)
        own = self._connection
        self._connection = DaemonConnection(
            str(self._layout.guest_socket), timeout_s=answer_timeout_s(self.config), owner_uid=owner
        )
        own.close()

    # -- metadata --------------------------------------------------------------------------------------------------

    def stat(self, path: str, *, refresh: bool = False) -> Entry:
        """See Client."""
        return self._ask(normalize_path(path), refresh)[0]

    def stat_cached(self, path: str) -> None:
        """See Client: nothing is known without asking."""
        normalize_path(path)

    def stat_timed(self, path: str) -> None:
        """See Client: nothing is known without asking."""
        normalize_path(path)

    def list(self, path: str, *, refresh: bool = False) -> NodeDirectory:
        """See Client."""
        path = normalize_path(path)
        body = {"path": path, "refresh": refresh}
        answer = self._with_daemon(lambda connection: connection.fetch("/v1/list", body))
        try:
            names_bytes, record_bytes = _HEAD.unpack_from(answer)
            names = tuple(json.loads(answer[_HEAD.size : _HEAD.size + names_bytes]))
            raw = memoryview(answer)[_HEAD.size + names_bytes :]
            return NodeDirectory(path, Record(raw, (0, 0)) if record_bytes else None, names)
        except (ValueError, struct.error) as error:
            raise OrchestraError(f"the daemon's listing of {path} cannot be understood") from error

    def list_cached(self, path: str) -> None:
        """See Client."""
        normalize_path(path)

    def freshness_s(self, path: str) -> float:
        """See Client."""
        normalize_path(path)
        return 0.0

    # -- data ------------------------------------------------------------------------------------------------------

    def open(self, path: str, *, entry: Entry | None = None) -> NodeHandle:
        """See Client."""
        path = normalize_path(path)
        digest = ""
        if entry is None:
            entry, digest = self._ask(path, False)
        if entry.kind is EntryKind.DIRECTORY:
            raise IsADirectoryPathError(f"is a directory: {path}")
        local = _NothingHere(self._layout, self.geometry, digest, entry.size_bytes, boot_id=self._boot_id)
        return NodeHandle(self, entry, digest, local)

    def read_small_into(self, entry: Entry, buffer: memoryview) -> None:
        """See Client: nothing is on this disk."""

    def read_file(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Client."""
        handle = self.open(path)
        size = handle.entry.size_bytes
        return handle.read(start, max(0, (size if stop is None else min(stop, size)) - start))

    def read_many(self, paths: Sequence[str], *, at_once: int = READ_MANY_AT_ONCE) -> Sequence[bytes]:
        """See Client."""
        return in_parallel(self.read_file, paths)

    def cached_bytes(self, entry: Entry) -> int:
        """Return how many bytes of that version the daemon's disk holds."""
        if entry.kind is EntryKind.DIRECTORY or not entry.size_bytes:
            return 0
        body = {"path": entry.path, "version": entry.version, "size_bytes": entry.size_bytes, "start": 0, "stop": 0}
        return int(self.daemon_request("POST", "/v1/cached", body)["cached_bytes"])

    def store_of(self, path: str) -> str:
        """See NodeClient: not told to guests."""
        normalize_path(path)
        return ""

    @property
    def geometry(self) -> Geometry:
        """How long reads are cut; the daemon's own may differ."""
        return Geometry(self.config.cache.block_size_bytes, self.config.cache.extent_size_bytes)

    def ensure(self, entry: Entry, digest: str, start: int, stop: int, *, ahead_stop: int, suspect: bool) -> bool:
        """See NodeClient: nothing can be made present here, so the bytes are sent."""
        return False

    def miss_stream(self) -> None:
        """See Client: there is none."""

    def changes(self, position: int | None = None) -> None:
        """See Client: nobody tells."""

    def note_hit(self, digest: bytes, first_block: int, block_count: int, size_bytes: int) -> None:
        """See NodeClient: the daemon counts what it sends."""

    note_miss = note_hit

    # -- the daemon ------------------------------------------------------------------------------------------------

    def _ask(self, path: str, refresh: bool) -> tuple[Entry, str]:
        """Return the entry, and what the object is called in the cache ("" for a directory)."""
        answer = self.daemon_request("POST", "/v1/stat", {"path": path, "refresh": refresh})
        return entry_from_wire(path, answer), str(answer.get("digest", ""))

    def _with_daemon(self, call: Callable[[DaemonConnection], T], *, start: bool = True) -> T:
        """As NodeClient's; a guest starts no daemon."""
        for _ in range(_TRIES_MAX):
            try:
                return call(self._connection)
            except ConnectionLostError as error:
                lost = error
        self._tell_why(lost)

    def _tell_why(self, lost: ConnectionLostError) -> NoReturn:
        root = self.config.cache.dir
        uid = foreign_owner(root)
        try:
            owner = "its owner" if uid is None else pwd.getpwuid(uid).pw_name
        except KeyError:
            owner = f"uid {uid}"
        raise DaemonUnavailableError(
            f"no daemon serves other users of cache.dir {root}: {owner} has to name you in daemon.readers and to run "
            "orchestra daemon start; or set another cache.dir"
        ) from lost
