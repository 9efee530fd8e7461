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
from orchestra.fuse.names import FOREVER, Attributes
from orchestra.fuse.options import LISTINGS_MAX, NAME_BYTES_MAX, PRIMED_ENTRIES_MAX, PRIMED_INODES_MAX
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
        self, client: Client, table: InodeTable, channel: Channel, attributes: Attributes, incoming: memoryview
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
        inode = self._table.get(nodeid) or self._table.load(nodeid)
        if inode is None:
            self._channel.send_error(unique, errno.ESTALE)
            return
        view = self._client.list_cached(inode.entry.path)
        if view is None:
            self._channel.wait(unique, partial(self._list, unique, inode))
            return
        self._channel.send_or_undo(*self._opened(unique, inode, view))

    def _list(self, unique: int, inode: Inode) -> tuple[Message, Undo]:
        view = self._channel.patiently(unique, lambda: self._client.list(inode.entry.path))
        return self._opened(unique, inode, view)

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
        if len(self._copies) > LISTINGS_MAX:
            self._drop_a_copy()
        return _CACHE

    def _drop_a_copy(self) -> None:
        """Forget the oldest listing of a directory that nobody has open; the kernel's copy is then made anew."""
        idle = next((nodeid for nodeid, copy in self._copies.items() if not copy.opens), None)
        if idle is not None:
            del self._copies[idle]

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
        with self._lock:
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
        """READDIRPLUS: the same with attributes, which count a look-up for every name but the dots; or, where nobody
        seems to want them, with names only (number 0: the kernel takes nothing but the name)."""
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
        dots = sum(next_offset <= _DOTS for next_offset, _, _ in taken)
        primed: list[Inode] = []
        if self._is_worth_priming(directory):
            primed = self._table.remember_all([entry for _, _, entry in taken[dots:]], unique)
        message = self._pack_plus(unique, directory.inode, taken, dots, primed)
        if not self._channel.send(message) and primed:
            self._table.take_back_all(primed)

    def _is_worth_priming(self, directory: _OpenDirectory) -> bool:
        was_searched, directory.inode.is_searched = directory.inode.is_searched, False
        if len(self._table) >= PRIMED_INODES_MAX:
            return False
        return was_searched or len(directory.view) <= PRIMED_ENTRIES_MAX

    def _pack_plus(
        self, unique: int, directory: Inode, taken: list[tuple[int, bytes, Entry]], dots: int, primed: list[Inode]
    ) -> bytearray:
        attributes = self._attributes
        # A file has its directory's freshness; a directory may be the root of another mount, and is asked about.
        of_files = attributes.entry_timeout(directory.entry.path)
        buffer = bytearray(HEAD + sum((ENTRY.size + DIRENT.size + len(name) + 7) & ~7 for _, name, _ in taken))
        start = HEAD
        for index, (next_offset, name, entry) in enumerate(taken, -dots):
            if primed and index >= 0:
                attr = attributes.attr(entry)
                timeout = attributes.entry_timeout(entry.path) if entry.is_directory else of_files
                attr_s, attr_ns = timeout if entry.is_directory else FOREVER
                ENTRY.pack_into(buffer, start, primed[index].nodeid, 0, timeout[0], attr_s, timeout[1], attr_ns, *attr)
                ino = attr[0]
            else:
                ino = self._number_of(entry)
            _pack_name(buffer, start + ENTRY.size, next_offset, name, entry, ino)
            start += (ENTRY.size + DIRENT.size + len(name) + 7) & ~7
        HEADER_OUT.pack_into(buffer, 0, len(buffer), 0, unique)
        return buffer

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
