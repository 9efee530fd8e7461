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
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial

from orchestra.client.contract import Client, DirectoryView
from orchestra.fuse.channel import Channel, Message, Undo
from orchestra.fuse.inodes import Inode, InodeTable, inode_number_of, number_of
from orchestra.fuse.names import FOREVER, Attributes
from orchestra.fuse.options import LISTINGS_MAX, NAME_BYTES_MAX, PRIMED_ENTRIES_MAX, PRIMED_INODES_MAX
from orchestra.fuse.positions import DOTS, Positions
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
NAMES_PER_REPLY_MAX = 1024  # the same without attributes
# The smallest entry with attributes that the kernel takes: a name of up to 8 bytes.
_PLUS_BYTES_MIN = ENTRY.size + DIRENT.size + 8
# The first entries of every directory, before the view's own: "." and "..".
_DOTS = DOTS
# With several workers, handles kept by each; one that is not kept is taken up again by name.
OPEN_DIRECTORIES_MAX = 1024
_CACHE = int(OpenFlag.CACHE_DIR)
_KEEP = int(OpenFlag.CACHE_DIR | OpenFlag.KEEP_CACHE)


def spellable(name: bytes) -> bool:
    """Whether a path can name it; the kernel answers EIO for a whole directory that holds one it cannot."""
    return 0 < len(name) <= NAME_BYTES_MAX and b"/" not in name and b"\0" not in name and name not in (b".", b"..")


class _OpenDirectory:
    """A handle. `shift`: how many entries more than its reader counts lie before its reader's place."""

    __slots__ = ("inode", "shift", "view")

    def __init__(self, inode: Inode, view: DirectoryView, shift: int = 0) -> None:
        self.inode = inode
        self.view = view
        self.shift = shift


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
        self._open: OrderedDict[int, _OpenDirectory] = OrderedDict()
        self._positions = Positions(table.memory)
        # Numbers of handles begin anew with each worker of a slot, and must not be those of another's.
        self._next_fh = (table.slot << 24 | table.memory.workers_of(table.slot) & 0xFFFFFF) << 32 | 1
        self._copies: dict[int, _KernelCopy] = {}
        self._is_alone = table.is_alone

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
            self._keep(fh, _OpenDirectory(inode, view))
            flags = self._cache_flags(inode, view) if self._is_alone else 0
        return open_reply(unique, fh, flags), partial(self._close, fh)

    def _keep(self, fh: int, directory: _OpenDirectory) -> None:
        self._open[fh] = directory
        if len(self._open) > OPEN_DIRECTORIES_MAX and not self._is_alone:
            self._open.popitem(last=False)  # its RELEASEDIR may have gone to another worker

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

    def _adopt(
        self,
        unique: int,
        nodeid: int,
        fh: int,
        answer: Callable[[_OpenDirectory], tuple[Message, Undo | None]],
    ) -> None:
        """Go on for a reader of a directory that another worker had opened."""
        inode = self._table.get(nodeid) or self._table.load(nodeid)
        if inode is None:
            self._channel.send_error(unique, errno.ESTALE)
            return

        def work() -> tuple[Message, Undo | None]:
            view = self._channel.patiently(unique, lambda: self._client.list(inode.entry.path))
            directory = _OpenDirectory(inode, view, self._positions.shift(fh, view))
            with self._lock:
                self._keep(fh, directory)
            return answer(directory)

        self._channel.wait(unique, work)

    def _follow(self, fh: int, directory: _OpenDirectory) -> None:
        """Another worker may have answered the last request, from another listing."""
        if not self._is_alone:
            directory.shift = self._positions.shift(fh, directory.view)

    # -- reading --------------------------------------------------------------------------------------------------

    def readdir(self, unique: int, nodeid: int, end: int) -> None:
        """READDIR: names, types and numbers."""
        fh, offset, size = READ_IN.unpack_from(self._incoming, BODY)
        directory = self._open.get(fh)
        if directory is None:
            self._adopt(unique, nodeid, fh, partial(self._readdir, unique, fh, offset, size))
            return
        self._follow(fh, directory)
        self._channel.send(self._readdir(unique, fh, offset, size, directory)[0])

    def _readdir(
        self, unique: int, fh: int, offset: int, size: int, directory: _OpenDirectory
    ) -> tuple[Message, Undo | None]:
        buffer = bytearray(HEAD + size)
        position = HEAD
        for next_offset, name, entry in self._entries_from(directory, offset):
            step = (DIRENT.size + len(name) + 7) & ~7
            if position + step > len(buffer):
                break
            _pack_name(buffer, position, next_offset, name, entry, self._number_of(entry))
            position += step
            last = next_offset, name
        if position > HEAD:
            self._positions.put(fh, *last)
        HEADER_OUT.pack_into(buffer, 0, position, 0, unique)
        return memoryview(buffer)[:position], None

    def readdirplus(self, unique: int, nodeid: int, end: int) -> None:
        """READDIRPLUS: the same with attributes, which count a look-up for every name but the dots; or, where nobody
        seems to want them, with names only (number 0: the kernel takes nothing but the name)."""
        fh, offset, size = READ_IN.unpack_from(self._incoming, BODY)
        directory = self._open.get(fh)
        if directory is None:
            # Names only: what is counted is counted by the loop's thread.
            self._adopt(unique, nodeid, fh, partial(self._readdirplus, unique, fh, offset, size, may_prime=False))
            return
        self._follow(fh, directory)
        self._channel.send_or_undo(*self._readdirplus(unique, fh, offset, size, directory, may_prime=True))

    def _readdirplus(
        self, unique: int, fh: int, offset: int, size: int, directory: _OpenDirectory, *, may_prime: bool
    ) -> tuple[Message, Undo | None]:
        if offset > _DOTS and not (may_prime and self._is_worth_priming(directory)):
            return self._names_only(unique, fh, offset, size, directory), None
        room = size
        taken: list[tuple[int, bytes, Entry]] = []
        for item in self._entries_from(directory, offset):
            room -= (ENTRY.size + DIRENT.size + len(item[1]) + 7) & ~7
            if room < 0:
                break
            taken.append(item)
        dots = sum(next_offset <= _DOTS for next_offset, _, _ in taken)
        primed: list[Inode] = []
        if may_prime and (offset > _DOTS or self._is_worth_priming(directory)):
            primed = self._table.remember_all([entry for _, _, entry in taken[dots:]], unique)
        if taken:
            self._positions.put(fh, *taken[-1][:2])
        message = self._pack_plus(unique, directory.inode, taken, dots, primed)
        return message, partial(self._table.take_back_all, primed) if primed else None

    def _names_only(self, unique: int, fh: int, offset: int, size: int, directory: _OpenDirectory) -> memoryview:
        """READDIRPLUS without attributes, as a million names are listed: from the view's columns, 2 us a name.

        Number 0 in place of an entry: the kernel takes nothing but the name.
        """
        view, first = directory.view, offset + directory.shift - _DOTS
        stop = min(len(view), first + min(NAMES_PER_REPLY_MAX, max(1, size // _PLUS_BYTES_MIN)))
        here = os.fsencode(directory.inode.entry.path)
        prefix = here if here.endswith(b"/") else here + b"/"
        buffer = bytearray(HEAD + size)
        at, last, pack = HEAD, b"", DIRENT.pack_into
        while at == HEAD and first < stop:  # an answer without entries means "the end": see _entries_from
            for index, (name, is_directory, version) in enumerate(view.names(first, stop), first + 1):
                if not spellable(name):
                    self._channel.counters.names_hidden += 1
                    continue
                start = at + ENTRY.size
                after = (start + DIRENT.size + len(name) + 7) & ~7
                if after > len(buffer):
                    break
                number = number_of(b"%b%b\0%b" % (prefix, name, version))
                offset = index + _DOTS - directory.shift
                pack(buffer, start, number, offset, len(name), DT_DIR if is_directory else DT_REG)
                start += DIRENT.size
                buffer[start : start + len(name)] = name
                at, last = after, name
            first, stop = stop, min(len(view), stop + ENTRIES_PER_REPLY_MAX)
        if at > HEAD:
            self._positions.put(fh, offset, last)
        HEADER_OUT.pack_into(buffer, 0, at, 0, unique)
        return memoryview(buffer)[:at]

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
        if offset <= _DOTS:
            directory.shift = 0  # from the beginning: the view as it is
        shift = directory.shift
        offset += shift
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
            yield offset - shift, name, entry

    def _number_of(self, entry: Entry) -> int:
        return ROOT_NODEID if entry is self._table.root.entry else inode_number_of(entry)


def _pack_name(buffer: bytearray, position: int, next_offset: int, name: bytes, entry: Entry, ino: int) -> None:
    kind = DT_DIR if entry.is_directory else DT_REG
    DIRENT.pack_into(buffer, position, ino, next_offset, len(name), kind)
    start = position + DIRENT.size
    buffer[start : start + len(name)] = name
