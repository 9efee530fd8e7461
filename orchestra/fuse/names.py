"""LOOKUP and GETATTR: what a name is.

Owns: turning the client's entries into the kernel's attributes and timeouts. Leaves to others: the client decides what
is fresh; the channel answers; the table counts.
"""

from __future__ import annotations

import errno
import os
from functools import partial

from orchestra.client.contract import Client
from orchestra.errors import NameTooLongError, NotADirectoryPathError, NotFoundError
from orchestra.fuse.channel import Channel, Message, Undo
from orchestra.fuse.inodes import Inode, InodeTable, child_path, inode_number_of
from orchestra.fuse.notices import Notices
from orchestra.fuse.options import NAME_BYTES_MAX, MountOptions
from orchestra.fuse.protocol import (
    BODY,
    ROOT_NODEID,
    S_IFDIR,
    S_IFREG,
    Attr,
    Timeout,
    attr_reply,
    entry_reply,
    negative_entry_reply,
    timeout_of,
)
from orchestra.values import Entry

_BLOCK_SIZE_BYTES = 4096
# How long the answer to a stale read waits for the kernel to know: starting who tells it takes 30 ms, once.
_TOLD_WITHIN_S = 1.0
# A file's attributes belong to one version and cannot change (see inodes); only the way to them, the name, expires.
FOREVER = timeout_of(float("inf"))


class Attributes:
    """Makes the kernel's view of entries: owner, permissions and timeouts are the mount's, the rest is the entry's."""

    def __init__(self, client: Client, root: Entry, options: MountOptions) -> None:
        self._freshness_s = client.freshness_s
        self._fixed = None if options.attr_timeout_s is None else timeout_of(options.attr_timeout_s)
        self._timeouts: dict[float, Timeout] = {}  # one entry a distinct freshness, of which a namespace has few
        self._owner = (options.uid, options.gid)
        self._file_mode = S_IFREG | (0o444 & ~options.umask)
        self._directory_mode = S_IFDIR | (0o555 & ~options.umask)
        self._root_path = root.path

    def entry_timeout(self, path: str) -> Timeout:
        """How long the kernel may believe that `path` leads where it does, or nowhere."""
        return self._fixed or self.timeout(self._freshness_s(path))

    def timeout(self, freshness_s: float) -> Timeout:
        """The same, of what the client may believe for that long."""
        if self._fixed is not None:
            return self._fixed
        found = self._timeouts.get(freshness_s)
        if found is None:
            found = self._timeouts[freshness_s] = timeout_of(freshness_s)
        return found

    def attr_timeout(self, entry: Entry) -> Timeout:
        """How long the kernel may believe the attributes."""
        return self.entry_timeout(entry.path) if entry.is_directory else FOREVER

    def attr(self, entry: Entry) -> Attr:
        """Return the attributes of `entry`; directories count one link, which tells `find` not to count on links."""
        seconds, nanoseconds = divmod(max(0, entry.mtime_ns), 1_000_000_000)
        size = entry.size_bytes
        ino = ROOT_NODEID if entry.path == self._root_path else inode_number_of(entry)
        mode = self._directory_mode if entry.is_directory else self._file_mode
        times = (seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds)
        return (ino, size, (size + 511) >> 9, *times, mode, 1, *self._owner, 0, _BLOCK_SIZE_BYTES, 0)


class Names:
    """Answers LOOKUP and GETATTR."""

    def __init__(
        self,
        client: Client,
        table: InodeTable,
        channel: Channel,
        attributes: Attributes,
        incoming: memoryview,
        notices: Notices,
    ) -> None:
        self._client = client
        self._table = table
        self._channel = channel
        self._attributes = attributes
        self._incoming = incoming
        self._notices = notices
        self._suspects: set[str] = set()  # paths whose next look-up must ask the store: a read found them changed

    # -- look-ups -------------------------------------------------------------------------------------------------

    def lookup(self, unique: int, nodeid: int, end: int) -> None:
        """LOOKUP: from what is known at once, else from a worker."""
        parent = self._table.get(nodeid) or self._table.load(nodeid)
        if parent is None:
            self._channel.send_error(unique, errno.ESTALE)
            return
        name = bytes(self._incoming[BODY : end - 1])
        if len(name) > NAME_BYTES_MAX:
            raise NameTooLongError(f"the name {name[:40]!r}... is longer than {NAME_BYTES_MAX} bytes")
        parent.is_searched = True
        path = child_path(parent.entry.path, os.fsdecode(name))
        if path in self._suspects:
            self._channel.wait(unique, partial(self._look_up, unique, path, refresh=True))
            return
        try:
            found = self._client.stat_timed(path)
        except (NotFoundError, NotADirectoryPathError):
            self._channel.send(negative_entry_reply(unique, self._attributes.entry_timeout(path)))
            return
        if found is None:
            self._channel.wait(unique, partial(self._look_up, unique, path, refresh=False))
            return
        entry, freshness_s = found
        self._channel.send_or_undo(*self._found(unique, entry, self._attributes.timeout(freshness_s)))

    def _look_up(self, unique: int, path: str, *, refresh: bool) -> tuple[Message, Undo | None]:
        try:
            entry = self._channel.patiently(unique, lambda: self._client.stat(path, refresh=refresh))
        except (NotFoundError, NotADirectoryPathError):
            return negative_entry_reply(unique, self._attributes.entry_timeout(path)), None
        finally:
            self._suspects.discard(path)
        return self._found(unique, entry, self._attributes.entry_timeout(entry.path))

    def _found(self, unique: int, entry: Entry, timeout: Timeout) -> tuple[Message, Undo]:
        message_attr = self._attributes.attr(entry)
        inode = self._table.remember(entry, unique)
        attr_timeout = timeout if entry.is_directory else FOREVER
        message = entry_reply(unique, inode.nodeid, timeout, attr_timeout, message_attr)
        return message, partial(self._table.take_back, inode.nodeid, unique)

    def suspect(self, entry: Entry) -> None:
        """Have the kernel and the client look `entry`'s path up afresh at its next use; may wait, so on a worker only.

        After a read that found the object replaced: without this the same stale version would be opened again until
        the mount's freshness has passed.
        """
        if len(self._suspects) < 100_000:  # a bound; beyond it the freshness alone does the work
            self._suspects.add(entry.path)
        self._notices.expire(entry.path, within_s=_TOLD_WITHIN_S)

    # -- attributes -----------------------------------------------------------------------------------------------

    def getattr(self, unique: int, nodeid: int, end: int) -> None:
        """GETATTR: a file's are fixed; a directory's come from the client."""
        inode = self._table.get(nodeid) or self._table.load(nodeid)
        if inode is None:
            self._channel.send_error(unique, errno.ESTALE)
            return
        if inode.entry.is_directory:
            entry = self._client.stat_cached(inode.entry.path)
            if entry is None:
                self._channel.wait(unique, partial(self._get_attr, unique, inode))
                return
            self._adopt(inode, entry)
        self._channel.send(self._attr_message(unique, inode.entry))

    def _get_attr(self, unique: int, inode: Inode) -> tuple[Message, None]:
        self._adopt(inode, self._channel.patiently(unique, lambda: self._client.stat(inode.entry.path)))
        return self._attr_message(unique, inode.entry), None

    @staticmethod
    def _adopt(inode: Inode, entry: Entry) -> None:
        if not entry.is_directory:
            raise NotADirectoryPathError(f"{entry.path} was a directory and is a file now")
        inode.entry = entry

    def _attr_message(self, unique: int, entry: Entry) -> bytes:
        return attr_reply(unique, self._attributes.attr_timeout(entry), self._attributes.attr(entry))


def root_entry(client: Client, path: str) -> Entry:
    """Return the entry that a mount shows as its root. Raises NotADirectoryPathError for a file, and the client's."""
    entry = client.stat(path)
    if not entry.is_directory:
        raise NotADirectoryPathError(f"cannot mount {path}: it is a file; mount the directory that holds it")
    return entry
