"""Whole small files of this node's disk: many in one call, as an epoch of a training reads them, or one known entry.

Owns: looking up a batch of names by their directories, each directory once, and the shortest way from a name to its
checked bytes. Leaves to others: everything unusual (not cached, not known, no such file, large, empty, a name with an
empty component), for which the answer is None and which `NodeClient.open` does or explains.

Against `open` and `read_here` a file it saves the file's handle, two calls to the kernel and a look at its directory.
What is checked of a hit is the same (`blocks/reader.read_small_file`); how fresh a name is, is asked once a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout
from orchestra.blocks.reader import read_small_file, read_small_into
from orchestra.errors import OrchestraError
from orchestra.metadata.reader import MetadataReader
from orchestra.metadata.records import Record
from orchestra.namespace.mounts import MountTable
from orchestra.namespace.paths import normalize_path
from orchestra.namespace.published import PublishedMount
from orchestra.values import Entry, EntryKind, ObjectId


@dataclass(frozen=True, slots=True)
class _Folder:
    """A directory with a fresh listing: the names in it that are files and no mount points."""

    store_id: str
    prefix: str
    record: Record
    mount_names: tuple[str, ...]


class SmallReads:
    """Reads of one batch; made for it and thrown away."""

    def __init__(
        self,
        table: MountTable[PublishedMount],
        metadata: MetadataReader,
        layout: CacheLayout,
        geometry: Geometry,
        *,
        boot_id: bytes,
        note_hit: Callable[[bytes, int, int, int], None],
    ) -> None:
        self._table = table
        self._metadata = metadata
        self._small_file = layout.small_file
        self._size_max = geometry.block_size_bytes
        self._boot_id = boot_id
        self._note_hit = note_hit
        self._folders: dict[str, _Folder | None] = {}

    def read(self, path: str) -> bytes | None:
        """Return the file's bytes if all that has to be known of it is known here, else None. Raises UsageError."""
        path = normalize_path(path)
        head, _, name = path.rpartition("/")
        try:
            folder = self._folders[head]
        except KeyError:
            folder = self._folders[head] = self._look(head)
        if folder is None or name in folder.mount_names:
            return None
        row = folder.record.find(name.encode("utf-8", "surrogateescape"))
        if row is None or row.kind is not EntryKind.FILE or not 0 < row.size_bytes <= self._size_max:
            return None
        digest = ObjectId(folder.store_id, folder.prefix + name, row.version).digest()
        raw_digest = bytes.fromhex(digest)
        data = read_small_file(self._small_file(digest), raw_digest, row.size_bytes, self._boot_id)
        if data is not None:
            self._note_hit(raw_digest, 0, 1, len(data))
        return data

    def read_into(self, entry: Entry, buffer: memoryview) -> int | None:
        """See Client.read_small_into. Against `open` and a read it saves three objects, two calls and two locks."""
        size_bytes = entry.size_bytes
        if not 0 < size_bytes <= self._size_max or size_bytes >= len(buffer):
            return None
        try:
            location = self._table.locate(entry.path)
        except OrchestraError:
            return None
        if location is None or location.mount.error or not location.key:
            return None
        digest = ObjectId(location.mount.store_id, location.key, entry.version).digest()
        raw_digest = bytes.fromhex(digest)
        count = read_small_into(self._small_file(digest), raw_digest, size_bytes, self._boot_id, buffer)
        if count is not None:
            self._note_hit(raw_digest, 0, 1, count)
        return count

    def _look(self, head: str) -> _Folder | None:
        """What is known and fresh of the directory `head` ("" for the root)."""
        if "//" in head or head.endswith("/"):
            return None  # a key with an empty component
        try:
            location = self._table.locate(head or "/")
        except OrchestraError:
            return None
        if location is None or location.mount.error:
            return None
        mount = location.mount
        prefix = f"{location.key}/" if location.key else ""
        record = self._metadata.listing(mount.store_id, prefix, mount.freshness_s)
        if record is None:
            return None
        return _Folder(mount.store_id, prefix, record, self._table.names_below(head or "/"))
