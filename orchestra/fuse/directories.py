"""OPENDIR, READDIR, READDIRPLUS and RELEASEDIR: streaming a directory's view to the kernel.

Owns: packing entries, offsets, hiding names that no path can spell, and when the kernel may keep its own copy of a
listing. Leaves to others: the view (the client's; immutable, so offsets are stable for as long as it is open).

The kernel's copy (CACHE_DIR) is allowed for one view at a time: if a directory is open with an older view, a newer one
is served without, so that the copy is never pasted together from two listings.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from functools import partial

from orchestra.client.contract import Client, DirectoryView
from orchestra.fuse.channel import Channel, Message, Undo
from orchestra.fuse.inodes import Inode, InodeTable, inode_number_of
from orchestra.fuse.names import Attributes
from orchestra.fuse.options import NAME_BYTES_MAX
from orchestra.fuse.protocol import (
    BODY,
    DIRENT,
    DT_DIR,
    DT_REG,
    ENTRY,
    HEAD,
    HEADER_OUT,
    READ_IN,
    RELEASE_IN,
    ROOT_NODEID,
    OpenFlag,
    open_reply,
)
from orchestra.values import Entry

# Entries in one answer: some 2 ms of the loop's time, so that a huge directory does not hold up other readers.
ENTRIES_PER_REPLY_MAX = 512
# The first entries of every directory, before the view's own: "." and "..".
_DOTS = 2
_CACHE = int(OpenFlag.CACHE_DIR)
_KEEP = int(OpenFlag.CACHE_DIR | OpenFlag.KEEP_CACHE)


def spellable(name: bytes) -> bool:
    """Whether a path can name it; the kernel answers EIO for a whole directory that holds one it cannot."""
    return 0 < len(name) <= NAME_BYTES_MAX and b"/" not in name and b"\0" not in name and name not in (b".", b"..")


class _OpenDirectory:
    __slots__ = ("inode", "view")

    def __init__(self, inode: Inode, view: DirectoryView) -> None:
        self.inode = inode
        self.view = view


class _KernelCopy:
    """The view that the kernel's copy of a directory was made from, and how many handles have it open."""

    __slots__ = ("opens", "view")

    def __init__(self, view: DirectoryView) -> None:
        self.view = view
        self.opens = 0


class Directories:
    """Answers everything about open directories."""

    def __init__(
        self, client: Client, table: InodeTable, channel: Channel, attributes: Attributes, incoming: bytearray
    ) -> None:
        self._client = client
        self._table = table
        self._channel = channel
        self._attributes = attributes
        self._incoming = incoming
        self._lock = threading.Lock()
        self._open: dict[int, _OpenDirectory] = {}
        self._next_fh = 1
        self._copies: dict[int, _KernelCopy] = {}

    def opendir(self, unique: int, nodeid: int, end: int) -> None:
        """OPENDIR: takes the view; waits on a worker if it is not known."""
        inode = self._table.get(nodeid)
        if inode is None:
            self._channel.send_error(unique, errno.ESTALE)
            return
        view = self._client.list_cached(inode.entry.path)
        if view is None:
            self._channel.wait(unique, partial(self._list, unique, inode))
            return
        self._channel.send_or_undo(*self._opened(unique, inode, view))

    def _list(self, unique: int, inode: Inode) -> tuple[Message, Undo]:
        return self._opened(unique, inode, self._client.list(inode.entry.path))

    def _opened(self, unique: int, inode: Inode, view: DirectoryView) -> tuple[Message, Undo]:
        with self._lock:
            fh = self._next_fh
            self._next_fh += 1
            self._open[fh] = _OpenDirectory(inode, view)
            flags = self._cache_flags(inode, view)
        return open_reply(unique, fh, flags), partial(self._close, fh)

    def _cache_flags(self, inode: Inode, view: DirectoryView) -> int:
        copy = self._copies.get(inode.nodeid)
        if copy is not None and copy.view == view:  # a client may give equal views of one listing
            copy.opens += 1
            return _KEEP
        if copy is not None and copy.opens:
            return 0
        copy = self._copies[inode.nodeid] = _KernelCopy(view)
        copy.opens = 1
        return _CACHE

    def releasedir(self, unique: int, nodeid: int, end: int) -> None:
        """RELEASEDIR."""
        fh, _ = RELEASE_IN.unpack_from(self._incoming, BODY)
        self._close(fh)
        self._channel.send_error(unique, 0)

    def _close(self, fh: int) -> None:
        with self._lock:
            directory = self._open.pop(fh, None)
            if directory is None:
                return
            copy = self._copies.get(directory.inode.nodeid)
            if copy is not None and copy.view == directory.view:
                copy.opens -= 1

    def forgotten(self, nodeid: int) -> None:
        """Drop what is held for a directory that the kernel has forgotten."""
        self._copies.pop(nodeid, None)

    # -- reading --------------------------------------------------------------------------------------------------

    def readdir(self, unique: int, nodeid: int, end: int) -> None:
        """READDIR: names, types and numbers."""
        fh, offset, size = READ_IN.unpack_from(self._incoming, BODY)
        directory = self._open.get(fh)
        if directory is None:
            self._channel.send_error(unique, errno.EBADF)
            return
        buffer = bytearray(HEAD + size)
        position = HEAD
        for next_offset, name, entry in self._entries_from(directory, offset):
            step = (DIRENT.size + len(name) + 7) & ~7
            if position + step > len(buffer):
                break
            _pack_name(buffer, position, next_offset, name, entry, self._number_of(entry))
            position += step
        HEADER_OUT.pack_into(buffer, 0, position, 0, unique)
        self._channel.send(memoryview(buffer)[:position])

    def readdirplus(self, unique: int, nodeid: int, end: int) -> None:
        """READDIRPLUS: the same with attributes; counts a look-up for every name but the dots."""
        fh, offset, size = READ_IN.unpack_from(self._incoming, BODY)
        directory = self._open.get(fh)
        if directory is None:
            self._channel.send_error(unique, errno.EBADF)
            return
        room = size
        taken: list[tuple[int, bytes, Entry]] = []
        for item in self._entries_from(directory, offset):
            room -= (ENTRY.size + DIRENT.size + len(item[1]) + 7) & ~7
            if room < 0:
                break
            taken.append(item)
        self._send_plus(unique, directory.inode, taken)

    def _send_plus(self, unique: int, inode: Inode, taken: list[tuple[int, bytes, Entry]]) -> None:
        first = next((i for i, item in enumerate(taken) if item[0] > _DOTS), len(taken))
        remembered = self._table.remember_all([entry for _, _, entry in taken[first:]])
        buffer = bytearray(HEAD)
        attributes = self._attributes
        # Children of one directory may lie in other mounts, so the timeout is asked for each.
        for index, (next_offset, name, entry) in enumerate(taken):
            start = len(buffer)
            buffer += bytes((ENTRY.size + DIRENT.size + len(name) + 7) & ~7)
            child = remembered[index - first].nodeid if index >= first else 0  # 0: no look-up is counted
            attr = attributes.attr(entry)
            entry_s, entry_ns = attributes.entry_timeout(entry.path)
            attr_s, attr_ns = attributes.attr_timeout(entry)
            ENTRY.pack_into(buffer, start, child, 0, entry_s, attr_s, entry_ns, attr_ns, *attr)
            _pack_name(buffer, start + ENTRY.size, next_offset, name, entry, attr[0])
        HEADER_OUT.pack_into(buffer, 0, len(buffer), 0, unique)
        if not self._channel.send(buffer):
            for known in remembered:
                self._table.forget(known.nodeid, 1)

    def _entries_from(self, directory: _OpenDirectory, offset: int) -> Iterator[tuple[int, bytes, Entry]]:
        """Yield (offset of the next, name, entry) from `offset`, a bounded number of them."""
        view = directory.view
        here = directory.inode.entry
        stop = min(len(view) + _DOTS, offset + ENTRIES_PER_REPLY_MAX)
        sent = False
        while offset < stop:
            if offset < _DOTS:
                name, entry = (b"." if offset == 0 else b".."), here
            else:
                entry = view[offset - _DOTS]
                name = os.fsencode(entry.name)
                if not spellable(name):
                    self._channel.counters.names_hidden += 1
                    offset += 1
                    # An answer without entries means "the end", so hidden ones alone must not fill an answer.
                    stop = stop if sent else min(len(view) + _DOTS, stop + 1)
                    continue
            offset += 1
            sent = True
            yield offset, name, entry

    def _number_of(self, entry: Entry) -> int:
        return ROOT_NODEID if entry is self._table.root.entry else inode_number_of(entry)


def _pack_name(buffer: bytearray, position: int, next_offset: int, name: bytes, entry: Entry, ino: int) -> None:
    kind = DT_DIR if entry.is_directory else DT_REG
    DIRENT.pack_into(buffer, position, ino, next_offset, len(name), kind)
    start = position + DIRENT.size
    buffer[start : start + len(name)] = name
