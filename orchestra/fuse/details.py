"""What a file or the mount says of itself beside bytes and names: extended attributes, and what `df` shows.

Owns: the attributes' names and texts, the figures of STATFS. Leaves to others: the client knows the figures; a client
that does not (it is no part of the contract) has files with a version and nothing more.

`df` must never wait for a daemon (a watcher asks it whether a mount is alive), so it is told what was true at the last
question, and that question has the figures renewed.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import Protocol, runtime_checkable

from orchestra.client.contract import Client
from orchestra.errors import OrchestraError
from orchestra.fuse.channel import Channel
from orchestra.fuse.inodes import Inode, InodeTable
from orchestra.fuse.options import NAME_BYTES_MAX
from orchestra.fuse.protocol import BODY, GETXATTR_IN, data_reply, error_reply, statfs_reply, xattr_size_reply
from orchestra.values import Entry

PREFIX = b"user.orchestra."
_BLOCK_SIZE_BYTES = 4096
# What `df` shows until the cache's size is known: 1 PiB.
_UNKNOWN_BYTES = 1 << 50
_FILES = 1 << 32


@runtime_checkable
class DetailedClient(Protocol):
    """A client that can also say where bytes are; `orchestra.client.node.NodeClient` can."""

    def cached_bytes(self, entry: Entry) -> int:
        """How many bytes of that version are on this node's disk; may ask the daemon."""
        ...

    def store_of(self, path: str) -> str:
        """The store that a path lies in, "" for none. Sends nothing."""
        ...

    def usage(self) -> tuple[int, int]:
        """(bytes that the cache holds, bytes it may hold). Raises DaemonUnavailableError; starts no daemon."""
        ...


class Details:
    """Answers GETXATTR, LISTXATTR and STATFS."""

    def __init__(self, client: Client, table: InodeTable, channel: Channel, incoming: memoryview) -> None:
        self._client = client if isinstance(client, DetailedClient) else None
        self._table = table
        self._channel = channel
        self._incoming = incoming
        self._usage = (_UNKNOWN_BYTES, _UNKNOWN_BYTES)

    # -- extended attributes --------------------------------------------------------------------------------------

    def getxattr(self, unique: int, nodeid: int, end: int) -> None:
        """GETXATTR: user.orchestra.version, cached, location and store of a file; ENODATA for the rest."""
        size, _ = GETXATTR_IN.unpack_from(self._incoming, BODY)
        name = bytes(self._incoming[BODY + GETXATTR_IN.size : end - 1])
        inode = (self._table.get(nodeid) or self._table.load(nodeid)) if name.startswith(PREFIX) else None
        if inode is None or name not in self._names_of(inode):
            self._channel.send_error(unique, errno.ENODATA)
            return
        # A guest's client asks the daemon for some of them.
        self._channel.wait(unique, partial(self._look, unique, size, inode.entry, name))

    def listxattr(self, unique: int, nodeid: int, end: int) -> None:
        """LISTXATTR."""
        size, _ = GETXATTR_IN.unpack_from(self._incoming, BODY)
        inode = self._table.get(nodeid) or self._table.load(nodeid)
        names = self._names_of(inode) if inode is not None else []
        self._channel.send(_value_reply(unique, size, b"".join(name + b"\0" for name in names)))

    def _names_of(self, inode: Inode) -> list[bytes]:
        if inode.entry.is_directory:
            return []
        names = ["version"] if inode.entry.version else []
        names += ["cached", "location", "store"] if self._client is not None else []
        return [PREFIX + name.encode() for name in names]

    def _look(self, unique: int, size: int, entry: Entry, name: bytes) -> tuple[bytes, None]:
        return _value_reply(unique, size, self._value(entry, name).encode("utf-8", "surrogateescape")), None

    def _value(self, entry: Entry, name: bytes) -> str:
        what = name.removeprefix(PREFIX)
        if what == b"version":
            return entry.version
        assert self._client is not None, "only such a client has more names"
        if what == b"store":
            return self._client.store_of(entry.path)
        cached = self._client.cached_bytes(entry)
        if what == b"cached":
            return f"{cached}/{entry.size_bytes}"
        return os.uname().nodename if cached or not entry.size_bytes else "the store only"

    # -- the mount ------------------------------------------------------------------------------------------------

    def statfs(self, unique: int, nodeid: int, end: int) -> None:
        """STATFS: the size of the file system is what the cache may hold, used is what it holds, and nothing can be
        written, so nothing is available."""
        used_bytes, capacity_bytes = self._usage
        message = statfs_reply(
            unique,
            blocks=capacity_bytes // _BLOCK_SIZE_BYTES,
            blocks_free=max(0, capacity_bytes - used_bytes) // _BLOCK_SIZE_BYTES,
            files=_FILES,
            block_size_bytes=_BLOCK_SIZE_BYTES,
            name_bytes_max=NAME_BYTES_MAX,
        )
        self._channel.send(message)
        if self._client is not None:
            self._channel.run_aside(self.renew)

    def renew(self) -> None:
        """Ask for the figures of the next STATFS; may wait, so not on the loop's thread."""
        if self._client is None:
            return
        try:
            self._usage = self._client.usage()
        except OrchestraError:
            return  # no daemon now: the last figures hold


def _value_reply(unique: int, size: int, value: bytes) -> bytes:
    """Return the answer to who has room for `size` bytes; 0: who asks how many there are."""
    if size == 0:
        return xattr_size_reply(unique, len(value))
    return error_reply(unique, errno.ERANGE) if size < len(value) else data_reply(unique, value)
