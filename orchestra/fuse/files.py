"""OPEN, READ and RELEASE: how each opened file is served.

Owns: the choice between the kernel's page cache and passthrough, the bookkeeping that never mixes the two on an open
inode (the kernel answers EIO otherwise), the backing ids, and the handles of reads in progress. Leaves to others: the
client's handle knows where bytes lie; the channel waits.

Small files (and all in `pagecache` mode) cost nothing at OPEN. A READ of a whole one that is on this disk needs no
handle; any other opens one, which is closed when a read has reached the end. A mount in `auto` that has met small files
only lets the kernel do without OPEN and RELEASE, which are most of what a warm small file costs.

The opens and the backing id of an inode change under the table's lock only; handles are opened and closed by the loop's
thread only, except that a worker closes one that was dropped while it was reading it (`pins`).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from orchestra.client.contract import Client, Handle
from orchestra.errors import IsADirectoryPathError, NotFoundError, StaleObjectError
from orchestra.fuse.channel import Channel, Message, Undo
from orchestra.fuse.inodes import OPENED_CACHED, OPENED_PASSTHROUGH, Inode, InodeTable
from orchestra.fuse.misses import Misses, Waiting
from orchestra.fuse.options import (
    HANDLES_MAX,
    OPEN_WORTH_BYTES,
    PAGECACHE_HANDLES_MAX,
    READ_BYTES_MAX,
    Mode,
    MountOptions,
)
from orchestra.fuse.protocol import (
    BACKING_CLOSE,
    BACKING_MAP,
    BACKING_OPEN,
    BODY,
    HEAD,
    HEADER_OUT,
    OPEN_REPLY,
    READ_IN,
    RELEASE_IN,
    OpenFlag,
    error_reply,
    open_reply,
)
from orchestra.fuse.shared import LARGE_BYTES, LARGE_OPEN, OPENS_OVER
from orchestra.values import Entry

log = logging.getLogger(__name__)

# What RELEASE must know about the OPEN it ends travels as the file's fh.
_FH_CACHED = OPENED_CACHED
_FH_PASSTHROUGH = OPENED_PASSTHROUGH
_FH_SMALL = 3
_CACHED = int(OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH)
_PASSED = int(OpenFlag.PASSTHROUGH | OpenFlag.NOFLUSH)
# The kernel will say the same for every file: no privilege, too many stacked file systems, no such ioctl.
_REFUSED_FOR_GOOD = frozenset({errno.EPERM, errno.ELOOP, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL})


class _OpenFile:
    """A handle and how many workers read it now."""

    __slots__ = ("dropped", "handle", "pins")

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.pins = 0
        self.dropped = False


class Files:
    """Answers OPEN, READ and RELEASE."""

    def __init__(
        self,
        client: Client,
        table: InodeTable,
        channel: Channel,
        options: MountOptions,
        incoming: memoryview,
        on_stale: Callable[[Entry], None],
    ) -> None:
        self._client = client
        self._table = table
        self._channel = channel
        self._counters = channel.counters
        self._incoming = incoming
        self._on_stale = on_stale
        self._mode = options.mode
        self._small_opens = 0
        self._small_opens_max = options.small_opens_max
        self._passthrough_from = 1 if options.mode is Mode.PASSTHROUGH else max(1, options.passthrough_size_bytes)
        table.large_size_bytes = self._passthrough_from
        self.passthrough_allowed = False  # until INIT has said so
        self._lock = threading.Lock()
        self._handles: OrderedDict[int, _OpenFile] = OrderedDict()
        self._reply = bytearray(HEAD + READ_BYTES_MAX)
        self._view = memoryview(self._reply)
        self._payload = self._view[HEAD:]
        self.misses = Misses(client, channel, on_read=self._read_fetched, on_failure=self._read_otherwise)

    # -- OPEN -----------------------------------------------------------------------------------------------------

    def open(self, unique: int, nodeid: int, end: int) -> None:
        """OPEN: small files at once; for large ones a worker looks whether the kernel can read them by itself."""
        if self._mode is Mode.PAGECACHE:
            self._channel.send_error(unique, errno.ENOSYS)
            return
        inode = self._table.get(nodeid) or self._table.load(nodeid)
        if inode is None:
            self._channel.send_error(unique, errno.ESTALE)
            return
        if inode.entry.is_directory:
            raise IsADirectoryPathError(f"{inode.entry.path} is a directory")
        if inode.entry.size_bytes < self._passthrough_from:  # never passed through, so there is nothing to count
            self._small_opens += 1
            if self._small_opens > self._small_opens_max and self._is_over():
                self._channel.send_error(unique, errno.ENOSYS)
                return
            self._channel.send(OPEN_REPLY.pack(OPEN_REPLY.size, 0, unique, _FH_SMALL, _CACHED, 0))
            return
        if self.passthrough_allowed:
            self._channel.wait(unique, partial(self._open_large, unique, inode))
            return
        with self._table.lock:
            answer = self._opened_as_it_is(unique, inode)
        self._channel.send_or_undo(*answer)

    def _is_over(self) -> bool:
        """Whether the kernel may stop to ask for OPENs: `auto`, they cost more than passthrough saves, and no large
        file is open, whose modes would be mixed. No way back: large files are read through the page cache then."""
        words = self._table.memory.words
        if words[OPENS_OVER]:
            return True
        is_worth_it = self._small_opens * OPEN_WORTH_BYTES > words[LARGE_BYTES]
        if self._mode is not Mode.AUTO or not is_worth_it or words[LARGE_OPEN]:
            return False
        with self._table.lock:
            if words[LARGE_OPEN]:
                return False
            self._table.memory.put(OPENS_OVER, 1)
        log.info(
            "%d files under %d bytes were opened, and larger ones of %d bytes met: OPEN is not asked any more, and "
            "passthrough is over for this mount",
            self._small_opens,
            self._passthrough_from,
            words[LARGE_BYTES],
        )
        return True

    def _handles_max(self) -> int:
        """How many handles may be open: without RELEASE nobody says that a file is done with."""
        no_release = self._mode is Mode.PAGECACHE or self._table.memory.words[OPENS_OVER]
        return PAGECACHE_HANDLES_MAX if no_release else HANDLES_MAX

    def _open_large(self, unique: int, inode: Inode) -> tuple[Message, Undo]:
        with self._table.lock:
            if any(self._table.opens(inode)):
                return self._opened_as_it_is(unique, inode)
        handle = self._client.open(inode.entry.path, entry=inode.entry)
        try:
            backing_fd = handle.backing_fd()
            with self._table.lock:  # another OPEN of this inode may have decided meanwhile
                is_over = self._table.memory.words[OPENS_OVER]
                if backing_fd is not None and not is_over and not any(self._table.opens(inode)):
                    self._table.set_backing(inode, self._register(backing_fd))
                return self._opened_as_it_is(unique, inode)
        finally:
            handle.close()  # the kernel holds the file by itself now; a READ opens its own

    def _opened_as_it_is(self, unique: int, inode: Inode) -> tuple[Message, Undo]:
        """Count and answer an open in the mode the inode is in; the caller holds the lock."""
        if self._table.memory.words[OPENS_OVER]:  # asked before the kernel heard of that
            return error_reply(unique, errno.ENOSYS), lambda: None
        _, _, backing_id = self._table.opens(inode)
        fh, flags = (_FH_PASSTHROUGH, _PASSED) if backing_id else (_FH_CACHED, _CACHED)
        self._table.count_open(inode, fh, unique)
        return open_reply(unique, fh, flags, backing_id), partial(self._released, inode, fh, unique, is_undo=True)

    def _register(self, backing_fd: int) -> int:
        """Return the kernel's id for a backing file, 0 if it refuses."""
        request = bytearray(BACKING_MAP.pack(backing_fd, 0, 0))  # mutable: ioctl then returns the id and not a copy
        try:
            backing_id = int(fcntl.ioctl(self._channel.device_fd, BACKING_OPEN, request))
        except OSError as error:
            self._counters.backing_refused += 1
            if error.errno in _REFUSED_FOR_GOOD:
                self.passthrough_allowed = False
                log.warning("passthrough is off, reads go through this process: the kernel says %s", error.strerror)
            return 0
        self._counters.backing_opened += 1
        return backing_id

    # -- RELEASE --------------------------------------------------------------------------------------------------

    def release(self, unique: int, nodeid: int, end: int) -> None:
        """RELEASE: the last one of an inode closes its backing id or its handle."""
        fh, _ = RELEASE_IN.unpack_from(self._incoming, BODY)
        if fh == _FH_SMALL:
            if nodeid in self._handles:  # closed before it was read to its end; another reader opens one anew
                self.drop(nodeid)
            self._channel.send(HEADER_OUT.pack(HEAD, 0, unique))
            return
        inode = self._table.get(nodeid) or self._table.load(nodeid)
        if inode is not None:
            if self._released(inode, fh, unique, is_undo=False) or fh == _FH_PASSTHROUGH:
                self._channel.send_error(unique, 0)
                return
            self.drop(nodeid)
        self._channel.send_error(unique, 0)

    def _released(self, inode: Inode, fh: int, unique: int, *, is_undo: bool) -> int:
        """Take an open back; return how many of its kind are left."""
        table = self._table
        with table.lock:
            _, passed, backing_id = table.opens(inode)
            if fh == _FH_PASSTHROUGH and passed == 1 and backing_id:
                # Noted as closed first: a death in between leaks the kernel's hold, and cannot name a closed file.
                table.set_backing(inode, 0)
                fcntl.ioctl(self._channel.device_fd, BACKING_CLOSE, struct.pack("<I", backing_id))
                self._counters.backing_closed += 1
            return table.count_release(inode, fh, unique, is_undo=is_undo)

    # -- READ -----------------------------------------------------------------------------------------------------

    def read(self, unique: int, nodeid: int, end: int) -> None:
        """READ: bytes on this node's disk go out in one write; anything else is fetched by a worker."""
        _, offset, size = READ_IN.unpack_from(self._incoming, BODY)
        inode = self._table.get(nodeid) or self._table.load(nodeid)
        if inode is None:
            self._channel.send_error(unique, errno.ESTALE)
            return
        size = min(size, READ_BYTES_MAX)
        file = self._handles.get(nodeid)
        if file is None:
            if not offset and inode.entry.size_bytes <= size and self._read_whole(unique, inode.entry):
                return
            file = self._open_handle(inode)
        try:
            count = file.handle.readinto_cached(offset, self._payload[:size])
        except StaleObjectError as error:
            self._stale(unique, inode.entry, error)
            return
        if count is None:
            self._wait_for(unique, inode, file, offset, size)
            return
        self._send_read(unique, count)
        if offset + count >= inode.entry.size_bytes:
            self.drop(nodeid)

    def _read_whole(self, unique: int, entry: Entry) -> bool:
        """Answer a READ of a whole small file without a handle, if its bytes are here; return whether it was."""
        count = self._client.read_small_into(entry, self._payload)
        if count is None:
            return False
        self._send_read(unique, count)
        return True

    def _send_read(self, unique: int, count: int) -> None:
        """Answer with what is in the payload."""
        self._counters.reads_cached += 1
        HEADER_OUT.pack_into(self._reply, 0, HEAD + count, 0, unique)
        self._channel.send(self._view[: HEAD + count])

    def _open_handle(self, inode: Inode) -> _OpenFile:
        entry = inode.entry
        try:
            file = _OpenFile(self._client.open(entry.path, entry=entry))
        except NotFoundError as error:  # who reads has it open: what is gone is the mount
            raise StaleObjectError(f"{entry.path} was unmounted after it was opened") from error
        self._handles[inode.nodeid] = file
        if len(self._handles) > self._handles_max():
            self.drop(next(iter(self._handles)))
        return file

    def _wait_for(self, unique: int, inode: Inode, file: _OpenFile, offset: int, size: int) -> None:
        self._counters.reads_waited += 1
        with self._lock:
            file.pins += 1
        self._handles.move_to_end(inode.nodeid)
        self._channel.begin_wait(unique)
        size = max(0, min(size, inode.entry.size_bytes - offset))
        waiting = Waiting(unique, file.handle, offset, size, (inode, file))
        if not self.misses.ask(waiting):
            self._read_otherwise(waiting)

    def _read_fetched(self, waiting: Waiting) -> None:
        _, file = waiting.context
        self._unpin(file)

    def _read_otherwise(self, waiting: Waiting) -> None:
        """A worker thread waits for this one: there is no daemon now, or something has to be said."""
        inode, file = waiting.context
        work = partial(self._read, waiting.unique, inode, file, waiting.offset, waiting.size_bytes)
        self._channel.hand_over(waiting.unique, work)

    def _read(self, unique: int, inode: Inode, file: _OpenFile, offset: int, size: int) -> tuple[Message, None]:
        buffer = bytearray(HEAD + size)
        view = memoryview(buffer)
        try:
            count = self._channel.patiently(unique, lambda: file.handle.readinto(offset, view[HEAD:]))
        except StaleObjectError:
            self._counters.stale += 1
            self._on_stale(inode.entry)  # first, so that who opens it again because of our answer has the new version
            raise
        finally:
            self._unpin(file)
        HEADER_OUT.pack_into(buffer, 0, HEAD + count, 0, unique)
        return view[: HEAD + count], None

    def _stale(self, unique: int, entry: Entry, error: StaleObjectError) -> None:
        self._counters.stale += 1

        def work() -> tuple[Message, None]:
            self._on_stale(entry)
            raise error

        self._channel.wait(unique, work)

    # -- handles --------------------------------------------------------------------------------------------------

    def drop(self, nodeid: int) -> None:
        """Close the handle of an inode, now or when the last worker has done reading it. The loop's thread only."""
        file = self._handles.pop(nodeid, None)
        if file is None:
            return
        with self._lock:
            file.dropped = True
            unused = not file.pins
        if unused:
            file.handle.close()

    def _unpin(self, file: _OpenFile) -> None:
        with self._lock:
            file.pins -= 1
            unused = file.dropped and not file.pins
        if unused:
            file.handle.close()

    def close(self) -> None:
        """Close every handle that nobody reads; the kernel has let go of the backing files with the mount."""
        self.misses.close()
        for nodeid in list(self._handles):
            self.drop(nodeid)
